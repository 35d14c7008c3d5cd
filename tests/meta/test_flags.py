"""The flags are frozen: one more, one less or another name is a decision, taken here and in CHANGELOG.md."""

from dataclasses import is_dataclass

import pytest
from typer.main import get_command

from llmmpq.cli import DECIDED_BY_A_PLAN, RECIPE_FLAGS, app
from llmmpq.recipe import Recipe

SHARED = """--avg-bits --max-size --fit-vram --context --sequences
--recipe --revision --calib --tokens --window --seed --method --refine
--widths --head-bits --layer-only --group-bits --fuse --no-fuse --pin --keep
--quantizer --group-size --symmetric --asymmetric --scale-dtype --sweeps --sequential --no-sequential --correction
--rotate --no-rotate --tune --device --dtype
--activations --batch --threads --max-shard-size --out --work-dir --quiet --json"""
FLAGS = {
    "quantize": f"{SHARED} --bits --overwrite --plan --push-to-hub --private",
    "check": f"{SHARED} --bits --overwrite",
    "plan": f"{SHARED} --pareto",
    "inspect": "--runtime --json",
    "report": "--out --pareto --results --json",
    "eval": """--baseline --text --window --stride --tokens --kl-tokens --cache-dir --tasks --limit --num-fewshot
--batch-size --include-path --out --device --dtype --quiet --json""",
    "bench": "--batch --prompt --new --device --dtype --quiet --json",
    "generate": "--prompt --max-new-tokens --temperature --seed --device --dtype --json",
    "push": "--private --revision --overwrite --results --base-model --message --quiet --json",
}
TAKES_MODEL = ("quantize", "check", "plan")


def test_the_verbs_are_exactly_these_in_this_order():
    assert list(get_command(app).commands) == [
        "quantize",
        "check",
        "plan",
        "inspect",
        "report",
        "eval",
        "bench",
        "generate",
        "push",
    ]


def test_before_a_verb_there_is_only_the_version():
    assert [flag for parameter in get_command(app).params for flag in parameter.opts] == ["--version"]


@pytest.mark.parametrize("verb", FLAGS)
def test_the_flags_of_a_verb_are_exactly_these(verb):
    parameters = get_command(app).commands[verb].params
    options = [parameter for parameter in parameters if parameter.param_type_name == "option"]
    flags = [flag for option in options for flag in [*option.opts, *option.secondary_opts]]
    assert sorted(flags) == sorted(FLAGS[verb].split())
    arguments = [parameter.metavar for parameter in parameters if parameter.param_type_name == "argument"]
    assert arguments == ["MODEL" if verb in TAKES_MODEL else "DIR", *(["USER/NAME"] if verb == "push" else [])]


@pytest.mark.parametrize("verb", FLAGS)
def test_every_flag_says_what_it_does(verb):
    assert [parameter.name for parameter in get_command(app).commands[verb].params if not parameter.help] == []


def test_every_flag_sets_keys_that_recipes_have():
    recipe = Recipe()
    for keys, _ in RECIPE_FLAGS.values():
        for key in keys:
            section, _, name = key.partition(".")
            assert hasattr(getattr(recipe, section), name) if name else not is_dataclass(getattr(recipe, section)), key


def test_what_a_plan_decides_are_flags():
    assert set(DECIDED_BY_A_PLAN) < set(RECIPE_FLAGS)
