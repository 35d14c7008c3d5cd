"""The command line on a pipeline that only records: flags to recipe, output, exit codes."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from rich.console import Console

import llmmpq
from llmmpq import tables
from llmmpq.cli import main
from llmmpq.errors import CheckpointError
from llmmpq.progress import Silent, Terminal
from llmmpq.ranks import ALONE
from llmmpq.recipe import Budget, Recipe, load_recipe
from llmmpq.records import Plan, PlannedLinear, Scheme

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_plan(num_blocks=2, roles=ROLES, bits=lambda block, column: (2, 3, 4, 8)[(block + column) % 4]):
    linears = {
        f"model.layers.{block}.{role}": PlannedLinear(
            shape=(64, 64), block=block, role=role, scheme=Scheme(bits=bits(block, column), group_size=64)
        )
        for block in range(num_blocks)
        for column, role in enumerate(roles)
    }
    return Plan(
        linears=linears,
        method="additive",
        budget={"kind": "avg_bits", "value": 3.5},
        predicted_loss=0.0123,
        optimality_gap=0.0,
    )


PLAN = make_plan()
QUANTIZED = {
    "out": "somewhere/demo-3.5bit",
    "plan": PLAN.to_json(),
    "total_nbytes": 4_000_000,
    "kept_nbytes": 2_000_000,
    "source_nbytes": 12_000_000,
    "fallbacks": ["model.layers.0.q_proj: rounded to nearest instead"],
    "warnings": ["few tokens"],
    "resumed_blocks": 1,
    "already_done": False,
    "pushed": None,
    "seconds": 75.2,
    "peak_rss_nbytes": 500_000_000,
}
CHECKED = {
    "model": "demo",
    "architecture": "LlamaForCausalLM",
    "num_blocks": 6,
    "num_linears": 42,
    "num_weights": 4_718_592,
    "source_nbytes": 12_000_000,
    "budget": "--avg-bits 3.5",
    "budget_parts": {},
    "budget_total_nbytes": None,
    "quantized_nbytes": 2_000_000,
    "kept_nbytes": 2_000_000,
    "output_nbytes": 4_000_000,
    "smallest_bits": 2.28,
    "largest_bits": 8.38,
    "device": "cpu",
    "dtype": "float32",
    "ram_nbytes": 500_000_000,
    "ram_free_nbytes": 8_000_000_000,
    "vram_nbytes": None,
    "vram_free_nbytes": None,
    "disk_nbytes": 6_000_000,
    "disk_free_nbytes": 9_000_000_000,
    "work_disk_nbytes": None,
    "work_disk_free_nbytes": None,
    "seconds": None,
    "kept": [
        {"name": "model.embed_tokens.weight", "shape": [4096, 256], "nbytes": 2_000_000, "reason": "embedding"},
        {"name": "model.norm.weight", "shape": [256], "nbytes": 512, "reason": "norm"},
        {"name": "model.layers.0.norm.weight", "shape": [256], "nbytes": 512, "reason": "norm"},
    ],
    "short_groups": [f"model.layers.{block}.q_proj" for block in range(5)],
    "notes": ["5 linears have a short last group"],
    "problems": [],
}
TOTAL = {"budget_parts": {"quantized": 2_000_000, "kept": 900_000}, "budget_total_nbytes": 3_000_000}
INSPECTED = {
    "folder": "somewhere/demo-3.5bit",
    "layout_version": 1,
    "method": "additive",
    "budget": {"kind": "avg_bits", "value": 3.5},
    "bits_per_weight": 3.49,
    "code_bits_per_weight": 3.2,
    "num_weights": PLAN.num_weights,
    "quantized_nbytes": 2_000_000,
    "kept_nbytes": 2_000_000,
    "total_nbytes": 4_000_000,
    "predicted_loss": math.nan,
    "optimality_gap": None,
    "linears": [{"name": name, **linear} for name, linear in PLAN.to_json()["linears"].items()],
    "problems": [],
    "verified": True,
    "fallbacks": [],
    "warnings": [],
}
EVALUATED = {
    "model": "demo-3.5bit",
    "window": 1024,
    "stride": 1024,
    "num_tokens": 8184,
    "nll": 5.147,
    "perplexity": 171.9,
    "bits_per_weight": 3.494,
    "total_nbytes": 4_000_000,
    "tokens_per_second": 4499.0,
    "text": "packaged held-out text",
    "notes": [],
}
KL = {"kl_mean": 0.0086, "kl_median": 0.0054, "kl_p90": 0.0189, "kl_p99": 0.0486, "top1_agreement": 0.9085}
COMPARED = {"divergence": KL | {"num_tokens": 8184}, "noise_floor": KL | {"num_tokens": 8184}, "extra_nll": 0.001}
BASELINE = EVALUATED | {"model": "demo", "nll": 5.146, "perplexity": 171.7, "bits_per_weight": None}

TASKS = {
    "model": "demo-3.5bit",
    "results": {"llmmpq_cloze": {"acc": 0.45, "acc_stderr": 0.1141, "exact_match,first": 0.4}},
    "num_examples": {"llmmpq_cloze": 20},
    "num_fewshot": {"llmmpq_cloze": 0},
    "lm_eval": "0.4.13",
    "files": ["results/demo/results_2026-11-21.json"],
}

CURVE = {
    "format": "llmmpq-pareto",
    "method": "additive",
    "kept_nbytes": 2_000_000,
    "points": [
        {
            "nbytes": 10_345_678,
            "total_nbytes": 12_345_678,
            "bits_per_weight": 3.49,
            "code_bits_per_weight": 3.2,
            "predicted_loss": 0.0123,
            "optimality_gap": 0.0,
        }
    ],
    "num_budgets": 24,
    "files": [],
    "notes": ["no picture"],
}

BENCHED = {
    "model": "folder",
    "device": "cpu",
    "threads": 2,
    "torch": "2.13.0",
    "prompt": 64,
    "new": 16,
    "copy_bandwidth": 2e10,
    "rows": [
        {
            "kind": "plain",
            "dtype": "float32",
            "batch": 1,
            "first_token_s": 0.1,
            "prefill_tokens_per_s": 640.0,
            "decode_tokens_per_s": 50.0,
            "weights_nbytes": 1000,
            "bandwidth_share": 0.4,
        }
    ],
    "notes": ["nothing"],
}


class Recorder(types.ModuleType):
    """Stands for `llmmpq.pipeline`: remembers the call, prints what a careless library would, returns a sample."""

    def __init__(self):
        super().__init__("llmmpq.pipeline")
        self.answers = {
            "quantize_model": QUANTIZED,
            "check": CHECKED,
            "make_plans": [PLAN],
            "trace_curve": CURVE,
            "inspect": INSPECTED,
            "evaluate": EVALUATED,
            "run_tasks": TASKS,
            "bench": BENCHED,
            "generate": "The library is closed.",
        }
        self.called = None

    def __getattr__(self, name):
        if name.startswith("__") or name not in self.answers:
            raise AttributeError(name)

        def call(*arguments, **keywords):
            print("a library says hello")
            self.called = (name, arguments, keywords)
            if isinstance(self.answers[name], BaseException):
                raise self.answers[name]
            return self.answers[name]

        return call

    @property
    def recipe(self):
        return self.called[1][0]

    @property
    def keywords(self):
        return self.called[2]


@pytest.fixture
def pipeline(monkeypatch, tmp_path):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "llmmpq.pipeline", recorder)
    monkeypatch.setattr(llmmpq, "pipeline", recorder, raising=False)
    monkeypatch.chdir(tmp_path)
    return recorder


def run(command_line):
    return main(command_line.split())


def changed(recipe, start=None):
    """The dotted keys in which a recipe differs from the default."""
    start = (start or Recipe()).to_dict()
    flat = {}
    for key, value in recipe.to_dict().items():
        if isinstance(value, dict) and key != "pins":
            flat |= {f"{key}.{inner}": item for inner, item in value.items() if item != start[key][inner]}
        elif value != start[key]:
            flat[key] = value
    return flat


@pytest.mark.parametrize("verb", ["quantize", "check", "plan"])
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {}),
        ("--revision v2", {"revision": "v2"}),
        ("--calib builtin", {"calibration.source": "builtin"}),
        ("--tokens 99", {"calibration.tokens": 99}),
        ("--window 64", {"calibration.window": 64}),
        ("--seed 7", {"calibration.seed": 7}),
        ("--method uniform", {"allocation.method": "uniform"}),
        ("--widths 2,4", {"allocation.widths": [2, 4]}),
        ("--fuse", {"allocation.fuse": True}),
        ("--pin *.o_proj=8 --pin *a=b*=2", {"allocation.pins": {"*.o_proj": 8, "*a=b*": 2}}),
        ("--keep *.0.* --keep *.1.*", {"output.keep": ["*.0.*", "*.1.*"]}),
        ("--quantizer rtn", {"quantizer.algorithm": "rtn", "measurement.quantizer": "rtn"}),
        ("--group-size 128", {"quantizer.group_size": 128}),
        ("--symmetric", {"quantizer.symmetric": True}),
        ("--no-sequential", {"quantizer.sequential": False}),
        ("--correction 0.25", {"quantizer.correction": 0.25}),
        ("--device cuda:1", {"run.device": "cuda:1"}),
        ("--dtype float16", {"run.dtype": "float16"}),
        ("--activations host", {"run.activations": "host"}),
        ("--batch 4", {"run.batch": 4}),
        ("--threads 3", {"run.threads": 3}),
        ("--max-shard-size 200MB", {"output.max_shard_size": "200MB"}),
    ],
)
def test_a_flag_changes_its_keys_and_no_other(pipeline, verb, flags, expected):
    assert main([verb, "some/model", *flags.split()]) == 0
    found = changed(pipeline.recipe)
    if "budget.avg_bits" not in expected:
        found.pop("budget.avg_bits", None)  # `plan` spells the default out
    assert found == {"model": "some/model"} | expected


@pytest.mark.parametrize("verb", ["quantize", "check"])
@pytest.mark.parametrize(
    ("flags", "budget"),
    [
        ("", Budget()),
        ("--avg-bits 2.75", Budget(avg_bits=2.75)),
        ("--avg-bits 3", Budget(avg_bits=3.0)),
        ("--bits 4", Budget(bits=4)),
        ("--max-size 5.5GB", Budget(max_size="5.5GB")),
        ("--fit-vram 24GB", Budget(fit_vram="24GB")),
        ("--fit-vram 24GB --context 99 --sequences 3", Budget(fit_vram="24GB", context=99, sequences=3)),
    ],
)
def test_the_budget(pipeline, verb, flags, budget):
    assert main([verb, "demo", *flags.split()]) == 0
    assert pipeline.recipe.budget == budget


def test_flags_override_a_recipe_and_leave_the_rest_of_it(pipeline, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "model: demo\nbudget: {bits: 4}\nquantizer: {symmetric: true, sequential: false}\n"
        "allocation: {fuse: true, pins: {'*.q_proj': 4, '*.k_proj': 2}}\noutput: {keep: ['*.0.*']}\n"
    )
    flags = "--asymmetric --sequential --no-fuse --avg-bits 3 --pin *.k_proj=8 --keep *.1.*"
    assert main(["quantize", "--recipe", str(file), *flags.split()]) == 0
    assert changed(pipeline.recipe) == {
        "model": "demo",
        "budget.avg_bits": 3.0,
        "allocation.pins": {"*.q_proj": 4, "*.k_proj": 8},
        "output.keep": ["*.0.*", "*.1.*"],
    }


def test_a_packaged_recipe_and_another_model(pipeline):
    assert main(["quantize", "user/name", "--recipe", "demo"]) == 0
    assert changed(pipeline.recipe, load_recipe("demo")) == {"model": "user/name"}


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ("demo", "demo-3.5bit"),
        ("demo --avg-bits 2.25", "demo-2.25bit"),
        ("user/Model-7B --avg-bits 3", "Model-7B-3bit"),
        ("./models/mine/ --bits 4", "mine-4bit"),
        ("demo --max-size 5.5GB", "demo-5.5GB"),
        ("demo --fit-vram 24GB", "demo-24GB-vram"),
        ("demo --plan plans/plan-3.json", "demo-plan-3"),
        ("demo --out elsewhere", "elsewhere"),
    ],
)
def test_where_quantize_writes(pipeline, arguments, folder):
    assert main(["quantize", *arguments.split()]) == 0
    assert pipeline.keywords["out"] == Path(folder)


def test_what_quantize_hands_on(pipeline):
    assert run("quantize demo --work-dir w --overwrite --plan p.json --quiet") == 0
    progress = pipeline.keywords.pop("progress")
    assert isinstance(progress, Silent)
    assert pipeline.keywords == {
        "out": Path("demo-p"),
        "work_dir": Path("w"),
        "overwrite": True,
        "plan_file": Path("p.json"),
        "publish": None,
        "ranks": ALONE,
    }
    assert main(["quantize", "demo"]) == 0
    assert isinstance(pipeline.keywords.pop("progress"), Terminal)
    assert pipeline.keywords == {
        "out": Path("demo-3.5bit"),
        "work_dir": None,
        "overwrite": False,
        "plan_file": None,
        "publish": None,
        "ranks": ALONE,
    }


@pytest.mark.parametrize(
    ("flags", "budgets"),
    [
        ("", [Budget(avg_bits=3.5)]),
        ("--avg-bits 3", [Budget(avg_bits=3.0)]),
        ("--avg-bits 2.5,3,2.5,4", [Budget(avg_bits=bits) for bits in (2.5, 3.0, 4.0)]),
        ("--recipe demo", [Budget(avg_bits=3.5)]),
        ("--recipe demo --max-size 4GB,5.5GB", [Budget(max_size="4GB"), Budget(max_size="5.5GB")]),
        ("--fit-vram 8GB,1GiB --context 9", [Budget(fit_vram=size, context=9) for size in ("8GB", "1GiB")]),
        ("--fit-vram 8GB --avg-bits 3", [Budget(avg_bits=3.0), Budget(fit_vram="8GB")]),
    ],
)
def test_plan_takes_several_budgets(pipeline, flags, budgets):
    assert main(["plan", "demo", "--out", "plans", *flags.split()]) == 0
    assert pipeline.called[1][1] == budgets
    assert pipeline.recipe.budget == budgets[0]
    assert pipeline.keywords["out"] == Path("plans")


@pytest.mark.parametrize(
    ("flags", "num_budgets"), [("--pareto", 24), ("--pareto 7", 7), ("--pareto --quiet", 24), ("--quiet --pareto", 24)]
)
def test_a_curve_needs_no_budget(pipeline, flags, num_budgets, capsys):
    assert main(["plan", "demo", *flags.split()]) == 0
    assert pipeline.called[:2] == ("trace_curve", (pipeline.recipe, num_budgets))
    assert "12.35 MB  0.0123" in " ".join(capsys.readouterr().out.split()).replace("MB ", "MB  ")


def test_plans_and_a_curve_in_one_command(pipeline, capsys):
    assert main(["plan", "demo", "--avg-bits", "3", "--pareto", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["plans"], result["curve"]) == ([PLAN.to_json()], CURVE)


def test_what_the_other_verbs_hand_on(pipeline):
    assert run("check demo --out there --work-dir w --overwrite --quiet") == 0
    assert pipeline.keywords == {"out": Path("there"), "work_dir": Path("w"), "overwrite": True}
    assert main(["inspect", "folder"]) == 0
    assert pipeline.called == ("inspect", (Path("folder"),), {"runtime": False})
    assert run("bench folder --batch 1,4 --prompt 64 --new 16 --device cpu") == 0
    pipeline.keywords.pop("progress")
    lengths = {"batches": [1, 4], "prompt": 64, "new": 16}
    assert pipeline.called == ("bench", ("folder",), lengths | {"device": "cpu", "dtype": "auto"})
    assert run("eval folder --baseline demo --text t.txt --window 64 --device cpu --dtype float32") == 0
    pipeline.keywords.pop("progress")
    machine = {"device": "cpu", "dtype": "float32"}
    assert pipeline.called == ("evaluate", ("folder",), {"baseline": "demo", "text": "t.txt", "window": 64} | machine)
    assert run("eval folder --window own --stride 9 --tokens 99 --kl-tokens 0 --cache-dir c") == 0
    pipeline.keywords.pop("progress")
    windows = {"window": "own", "stride": 9, "tokens": 99, "kl_tokens": 0, "cache_dir": Path("c")}
    assert pipeline.keywords == windows | {"baseline": None, "device": "auto", "dtype": "auto"}
    tasks = "--limit 0.5 --num-fewshot 2 --batch-size auto --include-path own --out there"
    assert run(f"eval folder --tasks wikitext,arc_easy {tasks}") == 0
    pipeline.keywords.pop("progress")
    settings = {"limit": 0.5, "num_fewshot": 2, "batch_size": "auto", "include_path": Path("own"), "out": Path("there")}
    settings |= {"baseline": None, "device": "auto", "dtype": "auto"}
    assert pipeline.called == ("run_tasks", ("folder", ["wikitext", "arc_easy"]), settings)
    assert run("generate folder --prompt Once --max-new-tokens 5 --temperature 0.5 --seed 3") == 0
    settings = {"max_new_tokens": 5, "temperature": 0.5, "seed": 3, "device": "auto", "dtype": "auto"}
    assert pipeline.called == ("generate", ("folder", "Once"), settings)


VERBS = {
    "quantize": ["quantize", "demo"],
    "check": ["check", "demo"],
    "plan": ["plan", "demo"],
    "inspect": ["inspect", "folder"],
    "eval": ["eval", "folder"],
    "generate": ["generate", "folder", "--prompt", "The library"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_json_is_one_object_and_nothing_else(pipeline, verb, capsys):
    assert main([*VERBS[verb], "--json"]) == 0
    captured = capsys.readouterr()
    assert "hello" in captured.err  # what a library prints must not be lost, only elsewhere
    assert captured.out.count("\n") == 1

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    result = json.loads(captured.out, parse_constant=refuse)
    expected = {
        "quantize": QUANTIZED,
        "check": CHECKED,
        "plan": {"out": None, "plans": [PLAN.to_json()]},
        "inspect": INSPECTED | {"predicted_loss": None},
        "eval": EVALUATED,
        "generate": {"model": "folder", "prompt": "The library", "max_new_tokens": 64, "temperature": 0.0, "seed": 0}
        | {"text": "The library is closed."},
    }
    assert result == expected[verb]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_an_error_of_ours_is_one_line_and_exit_code_2(pipeline, verb, as_json, capsys):
    name = {"quantize": "quantize_model", "plan": "make_plans", "eval": "evaluate"}.get(verb, verb)
    pipeline.answers[name] = CheckpointError("shard 3 is\nmissing [bold]")
    assert main([*VERBS[verb], *as_json]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == "error: shard 3 is missing [bold]"


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError(3), AssertionError()])
def test_a_bug_of_ours_keeps_its_traceback(pipeline, error):
    pipeline.answers["inspect"] = error
    with pytest.raises(type(error)):
        main(["inspect", "folder"])


def test_what_the_system_refuses_is_one_line(pipeline, capsys):
    pipeline.answers["inspect"] = OSError(36, "File name too long", "some/file")
    assert main(["inspect", "folder"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: some/file: File name too long"


def test_interrupted(pipeline, capsys):
    pipeline.answers["quantize_model"] = KeyboardInterrupt()
    assert main(["quantize", "demo"]) == 130
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "interrupted; run the same command again to continue"
    assert captured.out == ""


@pytest.mark.parametrize("verb", ["check", "inspect"])
@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_problems_are_shown_and_give_exit_code_2(pipeline, verb, as_json, capsys):
    pipeline.answers[verb] = pipeline.answers[verb] | {"problems": ["not enough disk space"]}
    assert main([*VERBS[verb], *as_json]) == 2
    assert "not enough disk space" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("quantize", "no model is named"),
        ("plan", "no model is named"),
        ("quantize demo --recipe nope", "packaged are: 70b-one-gpu"),
        ("quantize demo --recipe own.yaml", "unknown key 'quantizer.bits'"),
        ("quantize demo --avg-bits 3 --bits 4", "one of them, not both"),
        ("quantize demo --avg-bits 3 --max-size 4GB", "one of them, not both"),
        ("quantize demo --max-size 3GB --fit-vram 4GB --bits 4", "one of them, not all"),
        ("quantize demo --max-size big", "such as 5GB"),
        ("quantize demo --fit-vram 4GB --context 0", "budget.context is 0"),
        ("quantize demo --avg-bits 3 --context 99", "--context would change nothing: the budget is --avg-bits"),
        ("check demo --context 9 --sequences 2", "--context and --sequences would change nothing"),
        ("plan demo --max-size 4GB --sequences 2", "--sequences would change nothing: the budget is --max-size"),
        ("plan demo --max-size 4GB,", "budget.max_size is ''"),
        ("plan demo --pareto 1", "--pareto"),
        ("plan demo --pareto -3", "--pareto"),
        ("quantize demo --avg-bits 17", "at most 16"),
        ("quantize demo --avg-bits nan", "budget.avg_bits is nan"),
        ("quantize demo --avg-bits three", "'--avg-bits'"),
        ("quantize demo --bits 5", "one of 2, 3, 4, 8"),
        ("quantize demo --widths 2,x", "--widths is '2,x'"),
        ("quantize demo --widths 2,5", "one of 2, 3, 4, 8"),
        ("quantize demo --pin =4", "PATTERN=BITS"),
        ("quantize demo --pin *.q_proj=", "PATTERN=BITS"),
        ("quantize demo --pin *.q_proj=5", "one of 2, 3, 4, 8"),
        ("quantize demo --method best", "one of iqp, additive, local, uniform"),
        ("quantize demo --device GPU", "such as auto, cpu or cuda:1"),
        ("quantize demo --plan p.json --avg-bits 3 --group-size 32", "--avg-bits, --group-size are both given"),
        ("quantize demo --max-shard-size big", "sizes such as 5GB|such as 5GB"),
        ("plan demo --avg-bits 2,,3", "--avg-bits is '2,,3'"),
        ("plan demo --avg-bits 2,40", "at most 16"),
        ("plan demo --bits 4", "No such option: --bits"),
        ("plan demo --recipe own4.yaml", "4 bits everywhere"),
        ("eval folder --device GPU", "such as auto, cpu or cuda:1"),
        ("eval folder --dtype int8", "float32"),
        ("eval folder --window 1", "--window"),
        ("generate folder", "Missing option '--prompt'"),
        ("generate folder --prompt Once --seed -1", "^error: --seed is -1; allowed: a whole number from 0"),
        ("inspect", "Missing argument 'DIR'"),
        ("quantise demo", "Did you mean 'quantize'"),
        ("quantize demo --overwite", "--overwrite"),
        ("quantize demo extra", "extra"),
    ],
)
def test_mistakes_are_one_line_and_spend_nothing(pipeline, arguments, complaint, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("quantizer: {bits: 3}\n")
    (tmp_path / "own4.yaml").write_text("budget: {bits: 4}\n")
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert re.search(complaint, captured.err)
    assert pipeline.called is None


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_verb_it_helps(arguments, capsys):
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for verb in VERBS:
        assert re.search(rf"\b{verb}\b", captured.out)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_helps(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"llmmpq {llmmpq.__version__}\n"


def text_of(show, result, width=80):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show(console, result)
    return console.file.getvalue()


def columns_of(text):
    """Rows of words of the map on top, up to the first empty line."""
    return [line.split() for line in text.split("\n\n")[0].splitlines()]


@pytest.mark.parametrize(
    ("show", "result"),
    [
        (tables.show_quantized, QUANTIZED | {"warnings": [], "fallbacks": []}),
        (tables.show_plans, {"out": "plans", "plans": [PLAN.to_json()]}),
        (tables.show_plans, {"out": "plans", "plans": [PLAN.to_json()] * 4}),
        (tables.show_check, CHECKED | {"short_groups": []}),
        (tables.show_inspected, INSPECTED),
        (tables.show_evaluated, EVALUATED | {"baseline": BASELINE} | COMPARED),
        (tables.show_tasks, TASKS | {"baseline": TASKS | {"model": "demo"}}),
        (tables.show_evaluated, EVALUATED),
        (tables.show_check, CHECKED | TOTAL | {"short_groups": []}),
        (tables.show_plans, {"out": "plans", "plans": [PLAN.to_json(), PLAN.to_json() | {"measured_kl": 0.0405}]}),
        (tables.show_plans, {"out": "plans", "plans": [], "curve": CURVE | {"notes": []}}),
    ],
)
@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_fit_the_terminal(show, result, width):
    lines = text_of(show, result, width).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert "\x1b" not in "".join(lines)


def test_the_bit_map_reads_without_colour():
    rows = columns_of(text_of(tables.show_quantized, QUANTIZED))
    assert rows[0] == ["block", "q", "k", "v", "o", "gate", "up", "down"]
    assert rows[1] == ["0", *"2348234"]
    assert rows[2] == ["1", *"3482348"]


@pytest.mark.parametrize(
    ("budget", "asked"),
    [
        ({"kind": "avg_bits", "value": 3.25, "nbytes": 1}, "3.25 true bits per weight on average"),
        ({"kind": "bits", "value": 4, "nbytes": 1}, "4 bits everywhere"),
        ({"kind": "max_size", "value": "5.5GB", "nbytes": 1}, "at most 5.5GB of files of weights"),
        ({"kind": "fit_vram", "value": "24GB", "nbytes": 1}, "to run in 24GB of GPU memory"),
        ({"kind": "plan", "value": 3.1234567, "nbytes": 1}, "the widths of a plan file"),
    ],
)
def test_what_was_asked_for_is_shown(budget, asked):
    assert f"Asked for  {asked}" in text_of(tables.show_inspected, INSPECTED | {"budget": budget})


def test_equal_blocks_become_one_row():
    plan = make_plan(80, bits=lambda block, column: 8 if block in (0, 79) else 3)
    rows = columns_of(text_of(tables.show_plans, {"out": None, "plans": [plan.to_json()]}))
    assert [row[0] for row in rows[1:]] == ["0", "1-78", "79"]


@pytest.mark.parametrize(("width", "num_rows"), [(80, 40), (40, 80), (200, 40)])
def test_many_blocks_continue_beside_the_first(width, num_rows):
    plan = make_plan(80)
    rows = columns_of(text_of(tables.show_plans, {"out": None, "plans": [plan.to_json()]}, width))
    assert len(rows) == 1 + num_rows
    assert rows[1][0] == "0"
    if num_rows == 40:
        assert rows[1][8] == "40"
        assert rows[40][8] == "79"


def test_roles_too_long_for_the_terminal_become_letters():
    roles = tuple(f"attention.some_rather_long_projection_{index}" for index in range(4))
    text = text_of(tables.show_plans, {"out": None, "plans": [make_plan(2, roles).to_json()]})
    assert f"a = {roles[0]}" in text
    assert ["block", "a", "b", "c", "d"] in [line.split() for line in text.splitlines()]


def test_plans_that_were_measured_say_so():
    measured = PLAN.to_json() | {"measured_kl": 0.0405}
    assert "0.0405" in text_of(tables.show_plans, {"out": None, "plans": [PLAN.to_json(), measured]})
    assert "measured" not in text_of(tables.show_plans, {"out": None, "plans": [PLAN.to_json()] * 2})


def test_a_matrix_that_is_not_in_the_plan_shows_as_a_gap():
    plan = PLAN.to_json()
    del plan["linears"]["model.layers.1.k_proj"]
    text = text_of(tables.show_plans, {"out": None, "plans": [plan]})
    assert columns_of(text)[2] == ["1", "3", "-", *"82348"]
    assert "holds no quantized matrix" in text


def test_fallbacks_warnings_and_problems_are_shown_whole():
    long = "model.layers.0.self_attn.q_proj: " + "a reason that goes on " * 10
    text = text_of(tables.show_quantized, QUANTIZED | {"fallbacks": [long], "warnings": ["[red] alert"]})
    assert f"fallback: {long}\n" in text
    assert "warning: [red] alert\n" in text
    assert f"problem: {long}\n" in text_of(tables.show_inspected, INSPECTED | {"problems": [long]})


def test_kept_tensors_are_grouped_by_reason():
    text = text_of(tables.show_check, CHECKED)
    assert re.search(r"embedding +1 +2\.00 MB +model\.embed_tokens\.weight", text)
    assert re.search(r"norm +2 +1\.02 kB", text)
    assert "and 2 more" in text  # of five linears with a short last group


def test_the_map_is_coloured_on_a_terminal():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard", highlight=False)
    tables.show_bit_map(console, INSPECTED["linears"])
    assert "\x1b[31m2\x1b[0m" in console.file.getvalue()


COMMAND = [sys.executable, "-m", "llmmpq"]


def test_a_reader_that_stops_is_no_error():
    """The read end of the pipe is closed before anything is written."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as broken:
        result = subprocess.run([*COMMAND, "--version"], stdout=broken, stderr=subprocess.PIPE, text=True, check=False)
    assert result.stderr == ""
    assert result.returncode == 1


@pytest.mark.slow
def test_a_real_interrupt_of_a_real_run(tmp_path):
    command = [*COMMAND, "quantize", "demo", "--recipe", "demo", "--threads", "1", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any((tmp_path / ".llmmpq-work").glob("*/*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted; run the same command again to continue"
    assert "Traceback" not in err
    assert out == ""


def test_matrices_of_several_widths_are_shown_by_their_mean_and_their_shares():
    rows = [
        {"role": "q_proj", "block": 0, "bits": {"2": 3, "3": 1}, "shape": [64, 256]},
        {"role": "q_proj", "block": 1, "bits": {"4": 1, "8": 1}, "shape": [64, 256]},
    ]
    stream = io.StringIO()
    tables.show_bit_map(Console(file=stream, width=80), rows)
    assert stream.getvalue().split() == ["block", "q_proj", "0", "2.2", "1", "6.0"]
    assert tables._shares(rows, separator=", ") == "2 bits 38 %, 3 bits 12 %, 4 bits 25 %, 8 bits 25 %"
