"""What a careless or hostile user gives `llmmpq quantize`: one line that begins with `error:`, and exit code 2.

No traceback, and no half model: neither the output folder nor an unfinished one beside it.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from llmmpq.pipeline import quantize_model
from tests import tiny
from tests.e2e.forked import Process
from tests.e2e.running import GROUP_SIZE, Outcome, digests, leftovers, read_plan, run_apart, run_here, tiny_recipe

SHARD, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama") / "model", dtype=torch.bfloat16)


@dataclass
class Attempt:
    """One command line on a copy of a sound model, to be spoiled."""

    folder: Path
    model: Path
    calibration: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def arguments(self, *extra: object, budget: tuple[object, ...] = ("--avg-bits", 5)) -> list[object]:
        return [
            *("quantize", self.model, "--out", self.out, "--calib", self.calibration, "--quiet"),
            *("--tokens", 256, "--window", 64, "--group-size", GROUP_SIZE, "--threads", 1, "--layer-only"),
            *("--sweeps", 0, "--refine", 0, *budget, *extra),
        ]

    def fails(self, *extra: object, says: str, budget: tuple[object, ...] = ("--avg-bits", 5)) -> None:
        self.check(run_here(self.arguments(*extra, budget=budget), self.capsys), says=says)

    def check(self, outcome: Outcome, *, says: str) -> None:
        assert "Traceback" not in outcome.stderr
        lines = outcome.stderr.splitlines()
        assert len(lines) == 1, outcome.stderr
        assert lines[0].startswith("error: ")
        assert says in lines[0]
        assert (outcome.code, outcome.stdout) == (2, "")
        assert not self.out.exists()
        assert leftovers(self.folder) == []


@pytest.fixture
def attempt(sound: Path, calibration_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Attempt:
    model = tmp_path / "model"
    shutil.copytree(sound, model)
    return Attempt(tmp_path, model, calibration_file, capsys)


def _edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / SHARD)
    change(tensors)
    save_file(tensors, model / SHARD, {"format": "pt"})


def _edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_sound_model_works(attempt: Attempt) -> None:
    """Otherwise every test below could pass for a reason of its own."""
    outcome = run_here(attempt.arguments("--json"), attempt.capsys)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert json.loads(outcome.stdout)["plan"]["bits_per_weight"] <= 5


# --- the model's weights


@pytest.mark.parametrize("num_bytes", [0, 7, 100, -1])
def test_truncated_shard(num_bytes: int, attempt: Attempt) -> None:
    shard = attempt.model / SHARD
    shard.write_bytes(shard.read_bytes()[:num_bytes])
    attempt.fails(says="truncated or damaged")


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.2.mlp.down_proj.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(name: str, value: float, attempt: Attempt) -> None:
    _edit_tensors(attempt.model, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    attempt.fails(says=f"tensor '{name}'")


def test_weights_too_large_for_the_scales(attempt: Attempt) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    _edit_tensors(attempt.model, lambda tensors: tensors[name].mul_(1e8))
    attempt.fails(says="float16", budget=("--bits", 3))


def test_whole_numbers_as_weights(attempt: Attempt) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    _edit_tensors(attempt.model, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    attempt.fails(says=name)


def test_a_missing_tensor(attempt: Attempt) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    _edit_tensors(attempt.model, lambda tensors: tensors.__delitem__(name))
    attempt.fails(says=name)


@pytest.mark.parametrize(
    ("shard", "says"),
    [
        ("model-00002-of-00002.safetensors", "which is missing"),
        ("../outside.safetensors", "inside the model folder"),
        ("/etc/passwd", "inside the model folder"),
        ("..", "inside the model folder"),
        ("a\nb.safetensors", "which is missing"),
        (7, "inside the model folder"),
    ],
)
def test_an_index_that_names(shard: object, says: str, attempt: Attempt) -> None:
    shutil.copy(attempt.model / SHARD, attempt.folder / "outside.safetensors")
    first = "model-00001-of-00002.safetensors"  # a single model.safetensors would be read in the index's place
    (attempt.model / SHARD).rename(attempt.model / first)
    weight_map = dict.fromkeys(load_file(attempt.model / first), first) | {"lm_head.weight": shard}
    (attempt.model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    attempt.fails(says=says)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_that_is_none(content: str, attempt: Attempt) -> None:
    (attempt.model / SHARD).rename(attempt.model / "model-00001-of-00001.safetensors")
    (attempt.model / INDEX).write_text(content)
    attempt.fails(says=INDEX)


def test_pickled_weights_alone(attempt: Attempt) -> None:
    torch.save(load_file(attempt.model / SHARD), attempt.model / "pytorch_model.bin")
    (attempt.model / SHARD).unlink()
    attempt.fails(says="pytorch_model.bin")


# --- the model's other files


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", "{}", '{"model_type": ["llama"]}', "\xff"])
def test_a_config_that_is_none(content: str, attempt: Attempt) -> None:
    (attempt.model / CONFIG).write_bytes(content.encode("latin1"))
    attempt.fails(says=CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "no_such_model"},
        {"hidden_size": "wide"},
        {"hidden_size": None},
        {"hidden_size": -64},
        {"num_attention_heads": 0},
        {"vocab_size": 0},
        {"hidden_act": "no_such_function"},
        {"rope_parameters": {"rope_type": "no_such_kind", "rope_theta": 1e4}},
        {"pad_token_id": 5000},
        {"dtype": "no_such_dtype"},
        {"quantization_config": "gptq"},
    ],
    ids=lambda change: "-".join(map(str, *change.items())),
)
def test_a_config_with(change: dict[str, Any], attempt: Attempt) -> None:
    _edit_json(attempt.model / CONFIG, **change)
    attempt.fails(says=str(attempt.model))


def test_a_config_of_another_model(attempt: Attempt) -> None:
    _edit_json(attempt.model / CONFIG, intermediate_size=64)
    attempt.fails(says="not of one model")


def test_an_already_quantized_model(attempt: Attempt) -> None:
    _edit_json(attempt.model / CONFIG, quantization_config={"quant_method": "gptq", "bits": 4})
    attempt.fails(says="already quantized (gptq)")


def test_our_own_output_as_the_model(attempt: Attempt) -> None:
    first = attempt.folder / "first"
    assert run_here([*attempt.arguments(budget=("--bits", 3)), "--out", first], attempt.capsys).code == 0
    attempt.model = first
    attempt.fails(says="already quantized (llmmpq)")


def test_code_in_the_model_folder_is_not_run(attempt: Attempt) -> None:
    (attempt.model / "evil.py").write_text(f"open({str(attempt.folder / 'ran')!r}, 'w')\n")
    _edit_json(
        attempt.model / CONFIG,
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    attempt.fails(says="trust_remote_code is off")
    assert not (attempt.folder / "ran").exists()


def test_gpt2_stores_its_weights_transposed(attempt: Attempt) -> None:
    shutil.rmtree(attempt.model)
    config = GPT2Config(vocab_size=tiny.VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2, **tiny.SPECIAL)
    GPT2LMHeadModel(config).save_pretrained(attempt.model)
    tiny.tokenizer(attempt.model)
    attempt.fails(says="Conv1D")


def test_no_tokenizer(attempt: Attempt) -> None:
    for path in attempt.model.glob("tokenizer*"):
        path.unlink()
    attempt.fails(says="no tokenizer")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "null", '{"tokenizer_class": 3}'])
def test_a_broken_tokenizer(file: str, content: str, attempt: Attempt) -> None:
    (attempt.model / file).write_text(content)
    attempt.fails(says="no tokenizer")


def test_a_tokenizer_of_a_larger_model(attempt: Attempt) -> None:
    path = attempt.model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["e"] = 5000
    path.write_text(json.dumps(tokenizer))
    attempt.fails(says="token 5000, the model knows 128")


# --- the calibration text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"too short", "gives 9 tokens"),
        (b"", "gives 0 tokens"),
        ("caf\xe9 ".encode("latin1") * 200, "not UTF-8"),
        ("The quick brown fox".encode("utf-16") * 50, "not UTF-8"),
        (None, "does not exist"),
    ],
    ids=["short", "empty", "latin1", "utf-16", "missing"],
)
def test_a_calibration_text_that_is(content: bytes | None, says: str, attempt: Attempt) -> None:
    attempt.calibration = attempt.folder / "text.txt"
    if content is not None:
        attempt.calibration.write_bytes(content)
    attempt.fails(says=says)


@pytest.mark.parametrize("line", ["not json", "[1]", '{"text": 3}', '{"text": "\\ud800' + "abc " * 200 + '"}'])
def test_calibration_lines_that_are_no_text(line: str, attempt: Attempt) -> None:
    attempt.calibration = attempt.folder / "text.jsonl"
    attempt.calibration.write_text(line + "\n")
    attempt.fails(says="text.jsonl")


# --- what is asked for


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (("--avg-bits", 1), "the smallest plan needs 2."),
        (("--avg-bits", 0), "allowed"),
        (("--avg-bits", -3), "allowed"),
        (("--avg-bits", "nan"), "allowed"),
        (("--avg-bits", "inf"), "allowed"),
        (("--avg-bits", "three"), "--avg-bits"),
        (("--bits", 5), "allowed"),
        (("--bits", 3, "--avg-bits", 3), "not both"),
        (("--bits", 3, "--group-size", 0), "allowed"),
        (("--bits", 3, "--group-size", 10**30), "group"),
        (("--bits", 3, "--threads", 10**30), "threads"),
        (("--bits", 3, "--device", "meta"), "meta"),
        (("--bits", 3, "--device", "no_such_device"), "no_such_device"),
        (("--bits", 3, "--pin", "nothing=4"), "matches no linear"),
        (("--bits", 3, "--pin", "nothing"), "PATTERN=BITS"),
        (("--bits", 3, "--keep", "*"), "nothing is left to quantize"),
        (("--avg-bits", 5, "--fuse", "--pin", "*.q_proj=8", "--pin", "*.k_proj=2"), "must agree"),
        (("--no-such-flag",), "no-such-flag"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_wish_that_cannot_be_met(budget: tuple[object, ...], says: str, attempt: Attempt) -> None:
    attempt.fails(says=says, budget=budget)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("budget:\n  avg_bit: 3\n", "'budget.avg_bit'; the nearest valid key is 'budget.avg_bits'"),
        ("budget: [3]\n", "allowed: a mapping"),
        ("budget: {avg_bits: 3\n", "not valid YAML"),
        ("model: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
    ids=["unknown-key", "list", "syntax", "object", "nul"],
)
def test_a_recipe_with(content: str, says: str, attempt: Attempt) -> None:
    recipe = attempt.folder / "recipe.yaml"
    recipe.write_text(content)
    attempt.fails("--recipe", recipe, says=says)


def test_a_model_that_is_not_there(attempt: Attempt) -> None:
    shutil.rmtree(attempt.model)
    attempt.fails(says="does not exist")


def test_a_folder_that_is_no_model(attempt: Attempt) -> None:
    (attempt.model / CONFIG).unlink()
    attempt.fails(says="no config.json")


# --- the plan


@pytest.fixture(scope="module")
def made_plan(
    sound: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("plan")
    # Scales as in layout 1, so that the plan says 1.
    recipe = tiny_recipe(sound, calibration_file, budget__bits=3, quantizer__scale_dtype="float16")
    quantize_model(recipe, out=folder / "out")
    return folder / "out" / "plan.json", read_plan(folder / "out")


def _fails_with_plan(attempt: Attempt, content: object, *, says: str) -> None:
    path = attempt.folder / "edited.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    # A plan brings its own groups: the flag for them is refused beside it.
    arguments = ["quantize", attempt.model, "--out", attempt.out, "--calib", attempt.calibration, "--quiet"]
    arguments += ["--tokens", 256, "--window", 64, "--threads", 1, "--plan", path]
    attempt.check(run_here(arguments, attempt.capsys), says=says)


def test_a_plan_for_another_model(made_plan: tuple[Path, dict[str, Any]], attempt: Attempt) -> None:
    shutil.rmtree(attempt.model)
    tiny.save("opt", attempt.model)
    _fails_with_plan(attempt, made_plan[1], says="which the model lacks")


def test_a_plan_for_another_size(made_plan: tuple[Path, dict[str, Any]], attempt: Attempt) -> None:
    shutil.rmtree(attempt.model)
    tiny.save("mistral", attempt.model)
    plan = made_plan[1] | {
        "linears": {name: entry for name, entry in made_plan[1]["linears"].items() if ".2." not in name}
    }
    _fails_with_plan(attempt, plan, says="has shape")


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5},
        {"bits": 3.0},
        {"bits": "3"},
        {"bits": {"2": 1, "3": 2}},  # new in layout 2, and the plan says 1
        {"scale_dtype": "float8"},  # likewise
        {"group_size": 0},
        {"group_size": True},
        {"group_size": 10**30},
        {"symmetric": "no"},
        {"symmetric": None},
        {"shape": None},
        {"shape": 3},
    ],
    ids=str,
)
def test_a_plan_with(change: dict[str, Any], made_plan: tuple[Path, dict[str, Any]], attempt: Attempt) -> None:
    name = next(iter(made_plan[1]["linears"]))
    linears = made_plan[1]["linears"] | {name: made_plan[1]["linears"][name] | change}
    _fails_with_plan(attempt, made_plan[1] | {"linears": linears}, says=name)


@pytest.mark.parametrize("block", [1, 99, "x"])
def test_a_plan_with_a_wrong_block(block: object, made_plan: tuple[Path, dict[str, Any]], attempt: Attempt) -> None:
    """Where a matrix lies is the model's business: refused before the run, or ignored, but never a late failure."""
    name = next(iter(made_plan[1]["linears"]))
    linears = made_plan[1]["linears"] | {name: made_plan[1]["linears"][name] | {"block": block}}
    path = attempt.folder / "edited.json"
    path.write_text(json.dumps(made_plan[1] | {"linears": linears}))
    arguments = ["quantize", attempt.model, "--out", attempt.out, "--calib", attempt.calibration, "--quiet"]
    arguments += ["--tokens", 256, "--window", 64, "--threads", 1, "--plan", path]
    outcome = run_here(arguments, attempt.capsys)
    if outcome.code == 0:
        assert read_plan(attempt.out)["linears"] == made_plan[1]["linears"]
    else:
        attempt.check(outcome, says=name)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"format": "llmmpq-plan", "layout_version": 1, "linears": [1]}']
)
def test_a_plan_that_is_none(content: str, attempt: Attempt) -> None:
    _fails_with_plan(attempt, content, says="edited.json")


def test_a_plan_of_a_later_layout(made_plan: tuple[Path, dict[str, Any]], attempt: Attempt) -> None:
    _fails_with_plan(attempt, made_plan[1] | {"layout_version": 3}, says="'layout_version' is 3")


def test_a_file_where_plans_shall_go(attempt: Attempt) -> None:
    taken = attempt.folder / "taken"
    taken.write_text("x")
    arguments = ["plan", attempt.model, "--calib", attempt.calibration, "--avg-bits", 5, "--quiet", "--out", taken]
    attempt.check(run_here([*arguments, "--group-size", GROUP_SIZE, "--tokens", 256], attempt.capsys), says="taken")


# --- where it is written


def test_an_output_folder_that_holds_something_else(attempt: Attempt) -> None:
    taken = attempt.folder / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    for extra in ((), ("--overwrite",)):
        outcome = run_here([*attempt.arguments(*extra), "--out", taken], attempt.capsys)
        attempt.check(outcome, says="'thesis.tex'")
        assert digests(taken).keys() == {"thesis.tex"}
    # Before any work: nothing was measured for a folder that can never be written.
    assert list(attempt.folder.glob(".llmmpq-work/*/measure-*/block-*")) == []


@pytest.mark.parametrize("kind", ["file", "link"])
def test_an_output_that_is_a(kind: str, attempt: Attempt) -> None:
    taken = attempt.folder / "taken"
    if kind == "file":
        taken.write_text("x")
    else:
        taken.symlink_to(attempt.folder / "nowhere")
    outcome = run_here([*attempt.arguments("--overwrite"), "--out", taken], attempt.capsys)
    attempt.check(outcome, says="not a folder")
    assert taken.is_symlink() if kind == "link" else taken.read_text() == "x"


def test_the_model_as_its_own_output(attempt: Attempt) -> None:
    before = digests(attempt.model)
    outcome = run_here([*attempt.arguments("--overwrite"), "--out", attempt.model], attempt.capsys)
    attempt.check(outcome, says="something else than a quantized model")
    assert digests(attempt.model) == before


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250], ids=["300", "250"])
def test_a_name_too_long_for_the_file_system(name: str, attempt: Attempt) -> None:
    """250 characters fit, but not with what an unfinished folder's name has beside them: said before the run."""
    outcome = run_here([*attempt.arguments(budget=("--bits", 3)), "--out", attempt.folder / name], attempt.capsys)
    attempt.check(outcome, says="name too long")
    assert list(attempt.folder.glob(".llmmpq-work/*/quantize-*/block-*")) == []


def test_the_current_folder_as_output(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one is as good as a new one; if it cannot be replaced, that is said before the run."""
    here = attempt.folder / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    arguments = [*attempt.arguments("--work-dir", attempt.folder / "work", budget=("--bits", 3)), "--out", "."]
    outcome = run_here(arguments, attempt.capsys)
    if outcome.code != 0:
        attempt.check(outcome, says="--out .")
        assert list(attempt.folder.glob("work/*/quantize-*/block-*")) == []
    else:
        assert (here / "plan.json").is_file()


def test_a_work_folder_that_is_a_file(attempt: Attempt) -> None:
    attempt.fails("--work-dir", attempt.calibration, says="--work-dir")


# --- a disk that fills up, in a process of its own as a user would see it


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = False

    def mount(size: str) -> Path:
        nonlocal mounted
        if os.geteuid() != 0:
            pytest.skip("only root can mount a small disk")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.decode().strip()}")
        mounted = True
        return disk

    yield mount
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_too_small_for_the_output(attempt: Attempt, small_disk: Callable[[str], Path]) -> None:
    out = small_disk("64k") / "out"
    arguments = [*attempt.arguments("--work-dir", attempt.folder / "work"), "--out", out]
    attempt.check(run_here(arguments, attempt.capsys), says="not enough disk space")
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("num_free", "says"),
    [
        (0, "No space left on device"),
        (4, "No space left on device"),
        (40, "are needed for the journal of finished blocks"),
    ],
)
def test_a_disk_too_small_for_the_journal(
    num_free: int, says: str, attempt: Attempt, small_disk: Callable[[str], Path]
) -> None:
    """`num_free` pages of 4 KiB are left: nothing, the inputs of a stage, a measurement but not all blocks."""
    disk = small_disk("1m")
    num_pages = shutil.disk_usage(disk).free // 4096
    (disk / "ballast").write_bytes(bytes(4096 * (num_pages - num_free)))
    attempt.fails("--work-dir", disk / "work", says=says)
    assert leftovers(disk) == []
    assert num_free > 4 or list(disk.glob("work/*/quantize-*")) == []
    # Room again: the same command goes on.
    (disk / "ballast").unlink()
    assert run_here(attempt.arguments("--work-dir", disk / "work"), attempt.capsys).code == 0


def test_a_disk_that_fills_up_under_the_writer(attempt: Attempt) -> None:
    """A limit on the size of files: every block of the journal fits, the shard does not."""
    arguments = attempt.arguments("--quantizer", "rtn", budget=("--bits", 3))
    limited = Process(arguments, largest_file=60_000)  # bytes: a block takes 15 thousand, the shard over 70
    stdout, stderr = limited.communicate(timeout=120)
    attempt.check(Outcome(limited.returncode, stdout, stderr), says="cannot write")
    outcome = run_here([*arguments, "--json"], attempt.capsys)
    assert outcome.code == 0
    assert json.loads(outcome.stdout)["resumed_blocks"] == 3


def test_a_truncated_shard_in_a_process_of_its_own(attempt: Attempt) -> None:
    shard = attempt.model / SHARD
    os.truncate(shard, shard.stat().st_size // 2)
    attempt.check(run_apart(attempt.arguments()), says="truncated or damaged")
