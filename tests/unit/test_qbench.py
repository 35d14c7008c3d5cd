"""eval/qbench.py without any competitor installed: configs, bytes, the evaluator, and what happens when one fails."""

import csv
import importlib.util
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import qbench
import qbench_config
import qbench_install
import torch
from qbench_exchange import AdapterError, Job, packed_nbytes, stored_tensors
from qbench_gptq import read_gptq, unpack_bits
from qbench_judge import Judge
from qbench_report import read_rows
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llmmpq.errors import CheckpointError, RecipeError
from llmmpq.hf import LlmmpqForCausalLM
from llmmpq.quantize import rotation
from tests import tiny

EVAL = Path(qbench.__file__).parent

CONFIG = """
model: {model}
calibration: {{tokens: 128, window: 32}}
evaluation: {{tokens: 96, window: 32}}
timeout_s: {timeout}
competitors:
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: demo", "competitors is missing"),
        ("model: demo\ncompetitors: []", "a list with at least one entry"),
        ("modle: demo\ncompetitors: []", "unknown key 'modle'"),
        ("model: demo\ncompetitors: [{name: a, tool: b, bits: [3]}]", "tool is 'b'; allowed: autoround, "),
        ("model: demo\ncompetitors: [{name: a, tool: hqq, bits: 3}]", "bits is 3; allowed: a list"),
        ("model: demo\ncompetitors: [{name: a, tool: hqq, bits: [0]}]", "bits is [0]"),
        ("model: demo\ncompetitors: [{name: a, tool: hqq}]", "competitors[0]: bits is missing"),
        ("model: demo\nthreads: 0\ncompetitors: [{name: a, tool: hqq, bits: [3]}]", "threads is 0"),
        ("model: demo\ncalibration: {seed: -1}\ncompetitors: [{name: a, tool: hqq, bits: [3]}]", "seed is -1"),
        ("model: [", "not valid YAML"),
    ],
)
def test_a_wrong_config_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        qbench_config.load_config(path)
    assert expected in str(caught.value)


def test_the_demo_config_names_every_tool_and_every_tool_can_be_installed() -> None:
    config = qbench_config.load_config(EVAL / "qbench" / "demo.yaml")
    tools = {competitor.tool for competitor in config.competitors}
    assert tools == {"ours", *qbench_install.ENVIRONMENTS}
    assert tools == {path.stem for path in (EVAL / "qbench").glob("*.py")}
    assert {c.settings["measurement.tokens"] for c in config.competitors if c.tool == "ours"} == {2048}
    assert config.evaluation.text == qbench_config.BUILTIN


def test_an_environment_made_with_other_versions_is_not_used(tmp_path: Path) -> None:
    assert "not installed" in str(qbench_install.reason_not_installed("hqq", tmp_path))
    stamp = tmp_path / "hqq" / qbench_install.STAMP
    stamp.parent.mkdir()
    stamp.write_text(qbench_install.describe("hqq"))
    assert qbench_install.reason_not_installed("hqq", tmp_path) is None
    stamp.write_text(qbench_install.describe("hqq").replace("hqq==", "hqq==9."))
    assert "other versions" in str(qbench_install.reason_not_installed("hqq", tmp_path))


def _pack(codes: list[int], bits: int) -> list[int]:
    """One column, the slow way: a single large number cut into signed words of 32 bits."""
    number = sum(code << (bits * position) for position, code in enumerate(codes))
    words = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(codes) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_read_across_words(bits: int) -> None:
    codes = torch.randint(2**bits, (96, 3), generator=torch.Generator().manual_seed(bits))
    words = torch.tensor([_pack(column.tolist(), bits) for column in codes.T], dtype=torch.int32).T
    assert torch.equal(unpack_bits(words, bits=bits, num_codes=96), codes)


@pytest.mark.parametrize("stored_zero_is_less", [0, 1])
@pytest.mark.parametrize("reordered", [False, True])
def test_gptq_files_give_weights_and_bytes(tmp_path: Path, stored_zero_is_less: int, reordered: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    in_features, out_features, bits, group = 64, 32, 3, 32
    codes = torch.randint(8, (in_features, out_features), generator=generator)
    zeros = torch.randint(2, 6, (2, out_features), generator=generator)
    scales = (0.5 + torch.rand(2, out_features, generator=generator)).half()
    group_of = torch.arange(in_features) // group
    if reordered:
        group_of = group_of[torch.randperm(in_features, generator=generator)]
    weight = ((codes - zeros[group_of]) * scales.float()[group_of]).T
    stored = {
        "qweight": torch.tensor([_pack(c.tolist(), bits) for c in codes.T], dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor([_pack((z - stored_zero_is_less).tolist(), bits) for z in zeros], dtype=torch.int32),
        "scales": scales,
        "g_idx": group_of.int(),
        "bias": torch.zeros(out_features),
    }
    save_file({f"model.one.{part}": tensor for part, tensor in stored.items()}, tmp_path / "model.safetensors")
    original = weight + 0.2 * torch.randn(weight.shape, generator=generator)
    weights, nbytes = read_gptq(tmp_path, {"model.one": original})
    assert torch.equal(weights["model.one"], weight)
    codes_zeros_scales = in_features * out_features * 3 // 8 + 2 * out_features * 3 // 8 + 2 * out_features * 2
    assert nbytes == {"model.one": codes_zeros_scales + (4 * in_features if reordered else 0)}


def test_gptq_files_in_another_format_are_refused(tmp_path: Path) -> None:
    save_file({"one.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match="not the GPTQ format"):
        read_gptq(tmp_path, {"one": torch.ones(2, 2)})
    with pytest.raises(AdapterError, match="nothing was stored for two"):
        stored_tensors(tmp_path, ["two"])


def test_packed_bytes_round_up() -> None:
    assert packed_nbytes(10, 3, 16, 3) == 4 + 2 + 1


def test_settings_are_checked(tmp_path: Path) -> None:
    job = Job(model="m", linears=("a",), calibration={}, bits=3.0, settings={"x": 1}, threads=1, scratch=str(tmp_path))
    assert Job.read(job.write()) == job
    assert (job.whole_bits(2, 3), job.setting("y", 5)) == (3, 5)
    with pytest.raises(AdapterError, match="this tool has 2, 4"):
        job.whole_bits(2, 4)
    with pytest.raises(AdapterError, match="unknown setting 'x'"):
        job.accept_settings("y")
    with pytest.raises(AdapterError, match="allowed: 2, 3"):
        job.setting("x", 2, (2, 3))


def test_the_judge_compares_with_the_original() -> None:
    model = tiny.build("llama")
    windows = tiny.token_ids(3, 16)
    with torch.no_grad():
        before = torch.log_softmax(model(input_ids=windows).logits[:, :-1], dim=-1)
    judge = Judge(model, windows)
    with torch.no_grad():
        rounded = torch.log_softmax(tiny.build("llama").bfloat16()(input_ids=windows).logits[:, :-1].float(), dim=-1)
    assert judge.noise_floor.kl == pytest.approx((before.exp() * (before - rounded)).sum(-1).mean().item(), rel=0.01)
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight.detach().clone()
    same = judge.judge({name: tuple(weight.shape)}, lambda _: weight)
    assert (same.extra_nll, same.kl, same.top1) == (0.0, 0.0, 1.0)
    changed = judge.judge({name: tuple(weight.shape)}, lambda _: 3 * weight)
    with torch.no_grad():
        after = torch.log_softmax(model(input_ids=windows).logits[:, :-1], dim=-1)
    kl = (before.exp() * (before - after)).sum(-1).mean().item()
    nll = [-logs.gather(2, windows[:, 1:, None]).mean().item() for logs in (before, after)]
    assert changed.kl == pytest.approx(kl, rel=1e-4)
    assert changed.extra_nll == pytest.approx(nll[1] - nll[0], rel=1e-4)
    assert changed.top1 == pytest.approx((before.argmax(-1) == after.argmax(-1)).float().mean().item())
    assert changed.extra_nll_error > 0
    with pytest.raises(CheckpointError, match=r"expected finite \(2, 2\)"):
        judge.judge({name: (2, 2)}, lambda _: weight)
    with pytest.raises(CheckpointError, match="expected finite"):
        judge.judge({name: tuple(weight.shape)}, lambda _: weight * float("nan"))


FAKES = {
    "honest": """
        from pathlib import Path
        from safetensors.torch import load_file
        from qbench_exchange import Result
        def quantize(job):
            assert job.ids().shape == (4, 32)
            stored = load_file(Path(job.model) / "model.safetensors")
            step = 0.5 ** job.bits
            weights = {name: (stored[name + ".weight"] / step).round() * step for name in job.linears}
            nbytes = {name: weight.numel() for name, weight in weights.items()}
            return Result(weights=weights, nbytes=nbytes, counted="a byte each", package="torch", notes=("a note",))
    """,
    "refuses": """
        from qbench_exchange import AdapterError
        def quantize(job):
            raise AdapterError("cannot do this")
    """,
    "crashes": "import a_package_that_is_not_there",
}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    for name, source in FAKES.items():
        (adapters / f"{name}.py").write_text(textwrap.dedent(source))
    (adapters / "hqq.py").touch()
    monkeypatch.setattr(qbench_config, "ADAPTERS", adapters)
    monkeypatch.setenv("PYTHONPATH", str(EVAL.parent))
    return tmp_path


def _write_config(folder: Path, model: Path, *entries: str, timeout: int = 120) -> Path:
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(model=model, timeout=timeout) + "".join(f"  - {entry}\n" for entry in entries))
    return path


def test_missing_competitors_are_reported_and_the_rest_go_on(
    fakes: Path, folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _write_config(
        fakes,
        folders("llama"),
        "{name: without, tool: hqq, bits: [3]}",
        "{name: breaks, tool: crashes, bits: [3]}",
        "{name: says no, tool: refuses, bits: [3]}",
        "{name: works, tool: honest, bits: [8]}",
    )
    call = [str(config), "--out", str(fakes / "out" / "found"), "--envs", str(fakes / "envs")]
    assert qbench.main(call) == 0
    printed = capsys.readouterr().out
    page = (fakes / "out" / "found.md").read_text()
    for text in (printed, page):
        assert "without: not installed" in text
        assert "No module named 'a_package_that_is_not_there'" in text
        assert "says no at 3 bits: cannot do this" in text
    assert "- works at 8 bits: a note" in page
    assert (fakes / "out" / "found.png").read_bytes().startswith(b"\x89PNG")
    with (fakes / "out" / "found.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert (row["name"], row["true_bits"], row["version"]) == ("works", "8.0000", torch.__version__)
    assert 0 < float(row["kl"]) < 0.1
    assert len(row["commit"]) >= 40
    assert row["machine"]
    assert row["date"]

    # Finished rows are not made again, unless asked.
    monkeypatch.setattr(qbench, "_work", lambda *_: "was run again")
    assert qbench.main([*call, "--only", "honest"]) == 0
    assert "was run again" not in capsys.readouterr().out
    assert qbench.main([*call, "--only", "honest", "--again", "honest"]) == 0
    assert "was run again" in capsys.readouterr().out
    assert len(read_rows(fakes / "out" / "found.csv")) == 1


def test_one_that_takes_too_long_is_stopped(
    fakes: Path, folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = _write_config(fakes, folders("llama"), "{name: slow, tool: honest, bits: [3]}", timeout=1)
    (fakes / "adapters" / "honest.py").write_text("import time; time.sleep(100)")
    assert qbench.main([str(config), "--out", str(fakes / "found"), "--envs", str(fakes / "envs")]) == 1
    assert "stopped after timeout_s, 1 s" in capsys.readouterr().out
    assert not (fakes / "found.md").exists()


def test_a_mistake_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qbench.main([str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml cannot be read" in capsys.readouterr().err


def test_a_rotated_model_of_ours_is_judged_as_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights, turned back into the original, predict what the rotated folder predicts."""
    spec = importlib.util.spec_from_file_location("ours_under_test", EVAL / "qbench" / "ours.py")
    assert spec is not None
    assert spec.loader is not None
    ours = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ours)
    monkeypatch.setattr(rotation, "STEPS", 5)
    source = tiny.save("qwen2", tmp_path / "source")
    (tmp_path / "text.txt").write_text("A hundred sentences, none of them the same. " * 200)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    modules = original.model.named_modules()
    linears = tuple(f"model.{name}" for name, module in modules if isinstance(module, torch.nn.Linear))
    calibration = {"source": str(tmp_path / "text.txt"), "tokens": 320, "window": 32, "seed": 0}
    settings = {"measurement.tokens": 64, "quantizer.rotate": True, "uniform": True}
    job = Job(
        model=str(source),
        linears=linears,
        calibration=calibration,
        bits=3,
        settings=settings,
        threads=1,
        scratch=str(tmp_path),
    )
    result = ours.quantize(job)
    assert set(result.weights) == set(linears)
    with torch.no_grad():
        for name, weight in result.weights.items():
            original.get_submodule(name).weight.copy_(weight)
        loaded = LlmmpqForCausalLM.from_pretrained(str(tmp_path / "quantized"), dtype=torch.float32)
        logits = [model(tiny.token_ids()).logits for model in (original, loaded)]
    assert (logits[0] - logits[1]).abs().max() < 2e-3
