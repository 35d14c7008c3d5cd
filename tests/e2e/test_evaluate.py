"""`llmmpq eval`: perplexity by its protocols, KL against the original, and the cache that keeps the original."""

import hashlib
import json
import math
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmmpq
from llmmpq import reading
from llmmpq.inference import evaluate
from tests import tiny
from tests.e2e.running import run_here

ASSETS = Path(llmmpq.__file__).parent / "assets"
QUANTIZED = Path(__file__).parents[1] / "golden" / "tiny-llama-v1"
Evaluated = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chr(4 + (7 * n * n + n) % 120) for n in range(700)), encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="module")
def other(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama, slightly changed: stands for a quantized one."""
    model = AutoModelForCausalLM.from_pretrained(folders("llama"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    folder = tmp_path_factory.mktemp("other")
    model.save_pretrained(folder)
    tiny.tokenizer(folder)
    return folder


@pytest.fixture
def evaluated(folders: Callable[[str], Path], text: Path, tmp_path: Path) -> Evaluated:
    def run(model: Path | None = None, **options: Any) -> dict[str, Any]:
        baseline = str(folders("llama"))
        given = {"baseline": baseline, "text": str(text), "window": 64, "cache_dir": tmp_path / "cache"} | options
        return evaluate(str(model or baseline), **given)

    return run


def _logits(folder: Path, dtype: torch.dtype, text: Path, *, stride: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    content = text.read_bytes().decode()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(content)["input_ids"]).unfold(0, 64, stride)
    with torch.inference_mode():
        return torch.cat([model(row[None]).logits.float() for row in ids]), ids


def _kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    p, q = first.double().softmax(-1), second.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


def test_the_demo_has_the_perplexity_of_a_plain_computation(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "demo")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "demo", dtype=torch.float32)
    ids = torch.tensor(tokenizer((ASSETS / "heldout.txt").read_text(encoding="utf-8"))["input_ids"])[:2048]
    losses = []
    with torch.no_grad():
        for row in ids.reshape(2, 1024):
            losses.append(model(row[None], labels=row[None]).loss.item())
    expected = math.exp(sum(losses) / 2)
    found = evaluate("demo", tokens=2048)
    assert (found["window"], found["stride"], found["num_tokens"]) == (1024, 1024, 2046)
    assert found["perplexity"] == pytest.approx(expected, abs=1e-4)
    assert found["notes"] == ["No more than the first 2,048 tokens are read (--tokens)."]


def test_the_original_against_itself_is_zero_and_its_rounding_is_the_noise_floor(
    evaluated: Evaluated, folders: Callable[[str], Path], text: Path
) -> None:
    found = evaluated()
    assert found["divergence"] == {
        "kl_mean": 0.0,
        "kl_median": 0.0,
        "kl_p90": 0.0,
        "kl_p99": 0.0,
        "top1_agreement": 1.0,
        "num_tokens": 630,
    }
    assert found["extra_nll"] == 0.0
    original, _ = _logits(folders("llama"), torch.float32, text)
    rounded, _ = _logits(folders("llama"), torch.bfloat16, text)
    kl = _kl(original, rounded)[:, :-1]
    floor = found["noise_floor"]
    assert floor["kl_mean"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert floor["kl_p99"] == pytest.approx(kl.flatten().quantile(0.99).item(), rel=1e-2)
    assert 1e-7 < floor["kl_mean"] < 1e-2
    as_rounded = evaluated(dtype="bfloat16")["divergence"]
    assert as_rounded == floor


def test_another_model_has_the_divergence_of_a_plain_computation(
    evaluated: Evaluated, other: Path, folders: Callable[[str], Path], text: Path
) -> None:
    found = evaluated(other)
    original, ids = _logits(folders("llama"), torch.float32, text)
    changed, _ = _logits(other, torch.float32, text)
    kl = _kl(original, changed)[:, :-1].flatten()
    assert found["divergence"]["kl_mean"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found["divergence"]["kl_median"] == pytest.approx(kl.median().item(), rel=1e-2)
    same = (original.argmax(-1) == changed.argmax(-1))[:, :-1]
    assert found["divergence"]["top1_agreement"] == pytest.approx(same.double().mean().item())
    losses = [
        torch.nn.functional.cross_entropy(one[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for one in (original, changed)
    ]
    assert found["extra_nll"] == pytest.approx((losses[1] - losses[0]).item(), abs=1e-5)
    assert found["tokens_per_second"] > 0


@pytest.mark.parametrize("stride", [9, 17, 63, 64])
def test_a_stride_scores_every_token_once_with_more_context(
    stride: int, evaluated: Evaluated, other: Path, folders: Callable[[str], Path], text: Path
) -> None:
    found = evaluated(other, stride=stride, tokens=200)
    original, ids = _logits(folders("llama"), torch.float32, text, stride=stride)
    changed, _ = _logits(other, torch.float32, text, stride=stride)
    num = 1 + (200 - 64) // stride
    losses, kl = [], []
    for index in range(num):
        start = 1 if index == 0 or stride == 64 else 64 - stride
        log_p = changed[index].log_softmax(-1)
        losses += [-log_p[t - 1, ids[index, t]].item() for t in range(start, 64)]
        kl.append(_kl(original[index], changed[index])[start - 1 : -1])
    assert found["num_tokens"] == len(losses)
    assert found["nll"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found["divergence"]["num_tokens"] == len(losses)
    assert found["divergence"]["kl_mean"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which models are read, and in which dtype."""
    seen: list[str] = []
    plain = reading.Reader.logits

    def logits(self: reading.Reader, windows: torch.Tensor) -> Any:
        seen.append(f"{self.folder.name} {str(self.dtype).removeprefix('torch.')}")
        return plain(self, windows)

    monkeypatch.setattr(reading.Reader, "logits", logits)
    return seen


def test_five_models_cost_one_run_of_the_original(
    evaluated: Evaluated, other: Path, folders: Callable[[str], Path], passes: list[str], tmp_path: Path
) -> None:
    name = folders("llama").name
    first = evaluated(other)
    assert passes == [f"{name} float32", f"{name} bfloat16", f"{other.name} float32"]
    again = evaluated(other)
    assert passes[3:] == [f"{other.name} float32"]
    assert (first["baseline"]["from_cache"], again["baseline"]["from_cache"]) == (False, True)
    for key in ("nll", "extra_nll", "divergence", "noise_floor"):
        assert first[key] == again[key]
    evaluated(other, kl_tokens=0)
    assert passes[4:] == [f"{name} float32", f"{other.name} float32"]  # other windows, another entry
    assert not list(tmp_path.rglob("*partial*"))


def test_an_original_that_is_in_the_cache_is_not_loaded(
    evaluated: Evaluated, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluated(other)
    loads, plain = list[str](), reading._load

    def load(folder: Path, *arguments: Any) -> Any:
        loads.append(folder.name)
        return plain(folder, *arguments)

    monkeypatch.setattr(reading, "_load", load)
    assert evaluated(other)["divergence"] == first["divergence"]
    assert loads == [other.name]


@pytest.mark.parametrize("damage", ["logits", "figures", "text", "size"])
def test_a_damaged_cache_is_made_again(damage: str, evaluated: Evaluated, other: Path, tmp_path: Path) -> None:
    first = evaluated(other)
    (logits,), (figures,) = tmp_path.rglob("logits.f32"), tmp_path.rglob("reference.json")
    whole = logits.read_bytes()
    if damage == "logits":
        logits.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    elif damage == "size":
        logits.write_bytes(whole[:-4])
    elif damage == "text":
        figures.write_text("{")
    else:
        stored = json.loads(figures.read_text())
        stored["figures"]["nll_by_window"][0] += 1
        figures.write_text(json.dumps(stored))
    again = evaluated(other)
    assert not again["baseline"]["from_cache"]
    assert again["divergence"] == first["divergence"]
    assert again["extra_nll"] == first["extra_nll"]
    assert logits.read_bytes() == whole


def test_a_run_that_was_cut_off_leaves_nothing_that_counts(
    evaluated: Evaluated, other: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = reading.Reader.logits

    def cut(self: reading.Reader, windows: torch.Tensor) -> Any:
        yield next(iter(plain(self, windows)))
        raise KeyboardInterrupt

    monkeypatch.setattr(reading.Reader, "logits", cut)
    with pytest.raises(KeyboardInterrupt):
        evaluated(other)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*partial*"))
    assert not evaluated(other)["baseline"]["from_cache"]


def test_an_original_larger_than_memory_gives_the_same_figures(
    evaluated: Evaluated, other: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    held = evaluated(other)
    monkeypatch.setattr(reading, "WEIGHTS_SHARE", 0.0)
    streamed = evaluated(other, cache_dir=tmp_path / "another")
    assert not streamed["baseline"]["from_cache"]
    for key in ("nll", "extra_nll", "divergence", "noise_floor"):
        assert streamed[key] == held[key]


def test_few_tokens_are_compared_where_few_are_asked_for(evaluated: Evaluated, other: Path) -> None:
    few = evaluated(other, kl_tokens=130)
    assert few["divergence"]["num_tokens"] == 126
    assert few["num_tokens"] == 630
    # With a stride the first window scores 63 tokens, the others 8 each.
    assert evaluated(other, kl_tokens=200, stride=8)["divergence"]["num_tokens"] == 63 + 17 * 8
    assert evaluated(other, kl_tokens=64, stride=8)["divergence"]["num_tokens"] == 63
    assert "divergence" not in evaluated(other, kl_tokens=0)


def test_tokens_that_are_not_cut_off_get_no_note(evaluated: Evaluated) -> None:
    assert evaluated(baseline=None, tokens=700)["notes"] == []  # the text has 700; the last 60 fill no window
    assert evaluated(baseline=None, tokens=699)["notes"] == ["No more than the first 699 tokens are read (--tokens)."]


def test_text_of_a_folder_and_of_a_data_set(
    evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = ["abc " * 40, "defg\n" * 40]
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text(pieces[1])
    (folder / "a.txt").write_text(pieces[0])
    (tmp_path / "joined.txt").write_text("\n\n".join(pieces))
    (tmp_path / "stripped.txt").write_text("\n\n".join(piece.strip("\n") for piece in pieces))
    rows = [{"text": piece} for piece in pieces]
    served = types.SimpleNamespace(load_dataset=lambda path, name, *, split, streaming: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", served)
    from_rows = evaluated(baseline=None, text="hf:some/texts:test")
    assert from_rows["text"] == "hf:some/texts:test:text"
    assert from_rows["nll"] == evaluated(baseline=None, text=str(tmp_path / "joined.txt"))["nll"]
    from_files = evaluated(baseline=None, text=str(folder))
    assert from_files["nll"] == evaluated(baseline=None, text=str(tmp_path / "stripped.txt"))["nll"]


def test_windows_by_default_and_by_name(evaluated: Evaluated, folders: Callable[[str], Path], tmp_path: Path) -> None:
    assert evaluated(baseline=None, window=None)["window"] == 256  # what the model reads is less than 2,048
    assert evaluated(baseline=None, window="own")["window"] == 256
    lowered = evaluated(baseline=None, window=300)
    assert lowered["window"] == 256
    assert "lowered from 300 to 256" in lowered["notes"][0]
    longer = shutil.copytree(folders("llama"), tmp_path / "longer")
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    (tmp_path / "long.txt").write_text("abcdefgh" * 300)
    default = evaluate(str(longer), text=str(tmp_path / "long.txt"))
    assert (default["window"], default["num_tokens"]) == (2048, 2047)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--stride", 65], "--stride is 65; allowed: 1 to the window of 64"),
        (["--window", 1], "--window is '1'; allowed: a whole number of at least 2, or own"),
        (["--tokens", 40], "gives 40 tokens, less than one evaluation window of 64"),
        (["--limit", 3], "--limit needs --tasks"),
        (["--tasks", "x"], "--text and --window and --cache-dir cannot be had with --tasks"),
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[object],
    complaint: str,
    folders: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["eval", folders("llama"), "--text", text, "--window", 64, "--cache-dir", tmp_path, "--quiet"]
    outcome = run_here([*given, *arguments], capsys)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert complaint in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_a_damaged_model_is_named_before_the_original_is_read(
    evaluated: Evaluated, other: Path, passes: list[str], tmp_path: Path
) -> None:
    damaged = shutil.copytree(other, tmp_path / "damaged")
    shard = damaged / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(llmmpq.LlmmpqError, match=r"damaged/model\.safetensors .*truncated"):
        evaluated(damaged)
    assert passes == []


def test_models_of_other_vocabularies_and_disks_that_are_full(
    evaluated: Evaluated,
    folders: Callable[[str], Path],
    passes: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = AutoModelForCausalLM.from_pretrained(folders("llama"))
    wide.resize_token_embeddings(tiny.VOCAB + 8)
    wide.save_pretrained(tmp_path / "wide")
    tiny.tokenizer(tmp_path / "wide")
    with pytest.raises(llmmpq.LlmmpqError, match="know 136 and 128 words"):
        evaluated(tmp_path / "wide")
    assert passes == []  # known from the configs, before the original is read
    assert evaluated(tmp_path / "wide", kl_tokens=0)["num_tokens"] == 630
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(llmmpq.LlmmpqError, match=r"logits take 322\.6 kB, 1\.0 kB are free in .*--cache-dir"):
        evaluated(cache_dir=tmp_path / "full")


def test_the_digest_says_of_which_folder_the_figures_are(
    evaluated: Evaluated, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(QUANTIZED, kl_tokens=0, tokens=128)
    assert found["digest"] == hashlib.sha256((QUANTIZED / "digests.json").read_bytes()).hexdigest()
    assert found["baseline"]["digest"] is None  # a plain model
    undigested = shutil.copytree(QUANTIZED, tmp_path / "undigested", ignore=shutil.ignore_patterns("digests.json"))
    outcome = run_here(["eval", undigested, "--text", text, "--window", 64, "--quiet", "--json"], capsys)
    assert json.loads(outcome.stdout)["digest"] is None


def test_what_is_printed(
    other: Path, folders: Callable[[str], Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["eval", other, "--baseline", folders("llama"), "--text", text, "--window", 64, "--stride", 32, "--quiet"]
    outcome = run_here([*given, "--cache-dir", tmp_path], capsys)
    assert (outcome.code, outcome.stderr) == (0, "")
    for wanted in ("perplexity", "bf16 noise floor", "mean", "median", "p90", "p99", "same first choice", "%"):
        assert wanted in outcome.stdout
    assert "in windows of 64 that begin 32 tokens apart." in outcome.stdout.replace("\n", " ")
