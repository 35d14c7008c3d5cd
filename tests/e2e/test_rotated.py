"""Rotated runs: the rotated model is the original, the folder loads like any other, and all is repeatable."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from llmmpq import quantizing, rotating
from llmmpq.errors import CheckpointError, UnsupportedModelError
from llmmpq.evaluate.card import Origin, write_card
from llmmpq.hf import LlmmpqForCausalLM
from llmmpq.job import open_job
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.residual import Residual
from llmmpq.output import _untie
from llmmpq.pipeline import inspect, quantize_model
from llmmpq.progress import Silent
from llmmpq.quantize import rotation
from llmmpq.recipe import Recipe
from llmmpq.session import open_session
from tests import tiny
from tests.e2e.running import Recorder, digests, interrupted_after, raw_tensors, run_here, tiny_recipe

OTHERS = {
    "gemma": (GemmaForCausalLM, GemmaConfig, {"intermediate_size": 120, "head_dim": 16, "tie_word_embeddings": True}),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig,
        {"intermediate_size": 72, "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
    ),
    "biases": (LlamaForCausalLM, LlamaConfig, {"intermediate_size": 96, "attention_bias": True, "mlp_bias": True}),
}
EXACT = ("llama", "mistral", "qwen2", "qwen3", "phi3", *OTHERS)
TIED = ("qwen2", "gemma")


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "STEPS", 20)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    if name not in OTHERS:
        return tiny.save(name, folder, dtype=dtype)
    model_class, config_class, options = OTHERS[name]
    common = {"vocab_size": tiny.VOCAB, "hidden_size": tiny.HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(
            config_class(**common, num_key_value_heads=2, max_position_embeddings=256, **options, **tiny.SPECIAL)
        )
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    tiny.tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    known: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in known:
            known[name] = save(name, tmp_path_factory.mktemp(name))
        return known[name]

    return folder


def recipe_of(model: Path, calibration_file: Path, **changes: Any) -> Recipe:
    settings = {"quantizer__rotate": True, "budget__bits": 4} | changes
    return tiny_recipe(model, calibration_file, **settings)


@pytest.mark.parametrize("name", EXACT)
def test_the_rotated_model_is_the_original(
    name: str, sources: Callable[[str], Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Loaded by transformers from the weights that the stages read, with a head of its own."""
    source = sources(name)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    session = open_session(recipe_of(source, calibration_file))
    with open_job(session, out=tmp_path / "out", work_dir=tmp_path, progress=Silent()) as job:
        names = job.session.skeleton.stored_names
        stored = job.session.checkpoint.read(names.values(), dtype=torch.float32)
        weights = {name: stored[key] for name, key in names.items()}
    config = AutoConfig.from_pretrained(source)
    config.tie_word_embeddings = False
    rotated = type(original)(config).eval()
    rotated.load_state_dict(weights)
    turned = [key for key, weight in original.state_dict().items() if not torch.equal(weight, weights[key])]
    assert len([key for key in turned if key.endswith("proj.weight")]) == (4 if name == "phi3" else 7) * len(
        original.model.layers
    )
    ids = tiny.token_ids()
    with torch.no_grad():
        one, two = (model(ids).logits.log_softmax(-1) for model in (original, rotated))
    assert (one - two).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "opt"])
def test_where_it_would_not_be_exact_the_model_is_refused_before_long_work(
    name: str,
    sources: Callable[[str], Path],
    calibration_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["quantize", sources(name), "--rotate", "--calib", calibration_file, "--out", tmp_path / "out"]
    outcome = run_here([*arguments, "--tokens", 64, "--window", 64, "--quiet"], capsys)
    assert outcome.code == 2
    assert "residual stream cannot be rotated" in outcome.stderr
    assert "Leave out --rotate" in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_only_looks_right_is_refused_by_what_it_computes(
    sources: Callable[[str], Path], calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a weight had been overlooked: the comparison, not the search, is what vouches for the model."""
    found = rotating.residual_of

    def overlooking(block: Any) -> Residual:
        residual = found(block)
        readers = {name: norm for name, norm in residual.readers.items() if "layers.1.mlp.up_proj" not in name}
        return Residual(readers=readers, writers=residual.writers, embeddings=(), norms=residual.norms)

    monkeypatch.setattr(rotating, "residual_of", overlooking)
    with pytest.raises(UnsupportedModelError, match=r"what enters model.layers.2 would differ"):
        quantize_model(recipe_of(sources("llama"), calibration_file), out=tmp_path / "out")


def test_a_model_that_only_predicts_something_else_is_refused_too(
    sources: Callable[[str], Path], calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rotating.residual_around

    def overlooking(*args: Any) -> Residual:
        residual = found(*args)
        return Residual(readers={}, writers=(), embeddings=residual.embeddings, norms={})

    monkeypatch.setattr(rotating, "residual_around", overlooking)
    with pytest.raises(UnsupportedModelError, match=r"its predictions would differ"):
        quantize_model(recipe_of(sources("llama"), calibration_file), out=tmp_path / "out")


def test_what_16_bits_cannot_hold_once_it_is_rotated_is_found_early(calibration_file: Path, tmp_path: Path) -> None:
    source = save("llama", tmp_path / "source", dtype=torch.float16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] *= 4000
    tensors["lm_head.weight"] *= 400
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    progress = Recorder()
    with pytest.raises(CheckpointError, match=r"'lm_head.weight', rotated, .*float16 holds: leave out --rotate"):
        quantize_model(recipe_of(source, calibration_file), out=tmp_path / "out", progress=progress)
    assert "quantize" not in progress.tasks


def test_a_folder_that_holds_another_model_is_refused_before_anything_is_learned(
    sources: Callable[[str], Path], calibration_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(sources("llama"), calibration_file, quantizer__rotate=False)
    quantize_model(recipe, out=tmp_path / "out")
    progress = Recorder()
    with pytest.raises(CheckpointError, match="made from other inputs"):
        quantize_model(recipe_of(sources("llama"), calibration_file), out=tmp_path / "out", progress=progress)
    assert "learn the rotation" not in progress.tasks


def test_what_is_done_is_not_learned_again(
    sources: Callable[[str], Path], calibration_file: Path, tmp_path: Path
) -> None:
    recipe, progress = recipe_of(sources("llama"), calibration_file), Recorder()
    quantize_model(recipe, out=tmp_path / "out", work_dir=tmp_path / "one")
    again = quantize_model(recipe, out=tmp_path / "out", work_dir=tmp_path / "two", progress=progress)
    assert again["already_done"]
    assert "learn the rotation" not in progress.tasks


def test_rows_to_learn_from_are_those_that_will_be_quantized(tmp_path: Path) -> None:
    """With the gain in them, along the stream's channels, each matrix at a mean square of one."""
    tensors = {"read": torch.randn(5, 8), "write": torch.randn(8, 3), "norm": torch.rand(8), "bias": torch.randn(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    residual = Residual(readers={"read": "norm"}, writers=("write", "bias"), embeddings=(), norms={"norm": 0.0})
    rows = list(rotating._rows(Checkpoint.open(tmp_path), residual, torch.device("cpu")))
    expected = [tensors["read"] * (1 + tensors["norm"]), tensors["write"].t()]
    assert len(rows) == 2
    for found, wanted in zip(rows, expected, strict=True):
        torch.testing.assert_close(found, wanted / wanted.square().mean().sqrt())


def test_a_plain_and_a_rotated_run_share_no_measurement(
    sources: Callable[[str], Path], calibration_file: Path, tmp_path: Path
) -> None:
    """In one work folder, after a plain run, a rotated one ends as it does alone."""
    plain, rotated = (
        recipe_of(sources("llama"), calibration_file, quantizer__tune=2, quantizer__rotate=rotate)
        for rotate in (False, True)
    )
    quantize_model(plain, out=tmp_path / "plain", work_dir=tmp_path / "shared")
    quantize_model(rotated, out=tmp_path / "after", work_dir=tmp_path / "shared")
    quantize_model(rotated, out=tmp_path / "alone", work_dir=tmp_path / "own")
    assert digests(tmp_path / "after") == digests(tmp_path / "alone")
    assert len(list((tmp_path / "shared").glob("*/metric-*"))) == 2


@pytest.mark.parametrize("stored", ["embedding", "head", "both", "both, different"])
def test_however_a_shared_head_is_stored(
    stored: str, sources: Callable[[str], Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Where both are stored and differ, transformers shares nothing, whatever the config says."""
    source = tmp_path / "source"
    shutil.copytree(sources("qwen2"), source)
    tensors = load_file(source / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    other = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1)) / 10
    if stored != "head":
        tensors["model.embed_tokens.weight"] = embedding
    if stored != "embedding":
        tensors["lm_head.weight"] = other if "different" in stored else embedding.clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    summary = quantize_model(recipe_of(source, calibration_file, budget__bits=8), out=tmp_path / "out")
    assert summary["source_nbytes"] == sum(tensor.nbytes for tensor in tensors.values())
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    loaded = LlmmpqForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    with torch.no_grad():
        one, two = (model(tiny.token_ids()).logits.log_softmax(-1) for model in (original, loaded))
    assert (one.exp() * (one - two)).sum(-1).mean() < 0.01


def test_a_config_of_several_parts(calibration_file: Path, tmp_path: Path) -> None:
    """What is said of the text's part counts: a head that is packed must not be said to be shared."""
    shared = {"vocab_size": tiny.VOCAB, "hidden_size": tiny.HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text = Qwen3_5TextConfig(
        **shared,
        **linear,
        **tiny.SPECIAL,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        max_position_embeddings=256,
        layer_types=["linear_attention", "full_attention"],
        tie_word_embeddings=True,
    )
    source = tmp_path / "source"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = Qwen3_5ForCausalLM(text).eval()
    original.save_pretrained(source)
    tiny.tokenizer(source)
    Qwen3_5Config(text_config=text.to_dict()).save_pretrained(source)
    assert json.loads((source / "config.json").read_text())["text_config"]["tie_word_embeddings"]
    recipe = recipe_of(source, calibration_file, budget__bits=8, allocation__head_bits=8)
    quantize_model(recipe, out=tmp_path / "out")
    loaded = LlmmpqForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    with torch.no_grad():
        one, two = (model(tiny.token_ids()).logits.log_softmax(-1) for model in (original, loaded))
    assert (one.exp() * (one - two)).sum(-1).mean() < 0.01


def test_every_part_of_a_config_says_of_each_that_nothing_is_shared() -> None:
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "hidden_size": 8}, "x": [1]}
    _untie(config)
    assert config == {
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False, "hidden_size": 8},
        "x": [1],
    }


@pytest.mark.parametrize("name", TIED)
def test_a_shared_head_gets_weights_of_its_own(
    name: str, calibration_file: Path, tmp_path: Path, sources: Callable[[str], Path]
) -> None:
    source = save(name, tmp_path / "source", dtype=torch.bfloat16)
    summary = quantize_model(recipe_of(source, calibration_file, budget__bits=8), out=tmp_path / "out")
    assert inspect(tmp_path / "out")["problems"] == []
    stored = raw_tensors(tmp_path / "out")
    head, embedding = (stored[f"{key}.weight"] for key in ("lm_head", "model.embed_tokens"))
    assert (head.dtype, head.shape) == (embedding.dtype, embedding.shape) == ("BF16", (tiny.VOCAB, tiny.HIDDEN))
    assert head.data != embedding.data
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert summary["total_nbytes"] == sum(len(tensor.data) for tensor in stored.values())
    assert summary["source_nbytes"] == sum(len(tensor.data) for tensor in raw_tensors(source).values())
    ids = tiny.token_ids()
    with torch.no_grad():
        one = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits.log_softmax(-1)
        loaded = LlmmpqForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
        two = loaded(ids).logits.log_softmax(-1)
    divergence = (one.exp() * (one - two)).sum(-1).mean()
    assert divergence < 0.02 * -(one.exp() * one).sum(-1).mean()


def test_the_head_of_its_own_can_be_quantized(
    calibration_file: Path, tmp_path: Path, sources: Callable[[str], Path]
) -> None:
    recipe = recipe_of(sources("qwen2"), calibration_file, budget__bits=4, allocation__head_bits=8)
    plan = quantize_model(recipe, out=tmp_path / "out")["plan"]
    assert plan["linears"]["lm_head"]["bits"] == 8
    assert inspect(tmp_path / "out")["problems"] == []


def test_norms_keep_a_gain_of_one_and_the_report_tells_of_the_rotation(
    calibration_file: Path, tmp_path: Path, sources: Callable[[str], Path]
) -> None:
    out = tmp_path / "out"
    quantize_model(recipe_of(sources("llama"), calibration_file, output__keep=["layers.1.mlp.down_proj"]), out=out)
    loaded = LlmmpqForCausalLM.from_pretrained(str(out), dtype=torch.float32)
    norms = [weight for name, weight in loaded.named_parameters() if "norm" in name]
    assert len(norms) == 7
    assert all((weight == 1).all() for weight in norms)
    told = json.loads((out / "report.json").read_text())["rotation"]
    assert 1 < told["fourth_power"] < told["fourth_power_at_random"]
    assert len(json.loads((out / "plan.json").read_text())["provenance"]["rotation"]) == 64


def test_the_rotation_is_learned_once_for_all_budgets_and_again_where_it_is_damaged(
    calibration_file: Path, tmp_path: Path, sources: Callable[[str], Path]
) -> None:
    work, told = tmp_path / "work", []
    for number, bits in enumerate((3, 4, 4)):
        progress = Recorder()
        recipe = recipe_of(sources("llama"), calibration_file, budget__bits=bits)
        quantize_model(recipe, out=tmp_path / f"{number}", work_dir=work, progress=progress)
        told.append("learn the rotation" in progress.tasks)
        if number == 1:
            (path,) = work.glob("*/rotation-*/rotation.safetensors")
            path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert told == [True, False, True]
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_weights_that_may_not_wait_in_memory_are_read_at_every_step(
    calibration_file: Path, tmp_path: Path, sources: Callable[[str], Path]
) -> None:
    made = []
    for size in ("8GB", "1kB"):
        quantize_model(recipe_of(sources("llama"), calibration_file, measurement__memory=size), out=tmp_path / size)
        made.append(digests(tmp_path / size)["model.safetensors"])
    assert len(set(made)) == 1


def test_another_seed_is_another_rotation_and_none_is_another_model(
    calibration_file: Path, tmp_path: Path, sources: Callable[[str], Path]
) -> None:
    found = []
    for number, changes in enumerate(({}, {"calibration__seed": 1}, {"quantizer__rotate": False})):
        quantize_model(recipe_of(sources("llama"), calibration_file, **changes), out=tmp_path / f"{number}")
        found.append(json.loads((tmp_path / f"{number}" / "plan.json").read_text())["provenance"].get("rotation"))
    assert len(set(found)) == 3
    assert found[2] is None


@pytest.mark.parametrize(
    ("stage", "after"), [("rotation", "rotation"), ("metric", "block-0001"), ("quantize", "block-0000")]
)
def test_an_interrupted_run_ends_in_the_same_bytes(
    stage: str,
    after: str,
    calibration_file: Path,
    sources: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_of(sources("qwen2"), calibration_file, quantizer__tune=2)
    with interrupted_after(monkeypatch, stage, after):
        quantize_model(recipe, out=tmp_path / "one")
    quantize_model(recipe, out=tmp_path / "one")
    quantize_model(recipe, out=tmp_path / "deep" / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "deep" / "two")


def test_what_stays_at_16_bits_is_rounded_before_anything_is_measured(
    calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states that linears are calibrated on are those that the stored embedding gives."""
    source, seen = save("llama", tmp_path / "source", dtype=torch.bfloat16), []
    quantize_block = quantizing.quantize_block

    def recording(block: Any, *args: Any, **options: Any) -> Any:
        seen.append(block.states[0].clone())
        return quantize_block(block, *args, **options)

    monkeypatch.setattr(quantizing, "quantize_block", recording)
    quantize_model(recipe_of(source, calibration_file), out=tmp_path / "out")
    stored = raw_tensors(tmp_path / "out")["model.embed_tokens.weight"]
    rows = torch.frombuffer(bytearray(stored.data), dtype=torch.bfloat16).reshape(stored.shape).float()
    states = seen[0].reshape(-1, tiny.HIDDEN)
    assert ((states[:, None] == rows[None]).all(-1).any(-1)).all()


def test_people_are_told(
    calibration_file: Path, tmp_path: Path, sources: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """On the screen, on the page, and on the card; a model that is not rotated says nothing of it."""
    told = {}
    for flag in ("--rotate", "--no-rotate"):
        out = tmp_path / flag
        given = ["--calib", calibration_file, "--tokens", 256, "--window", 64, "--bits", 4, "--quiet"]
        outcome = run_here(["quantize", sources("llama"), flag, *given, "--out", out], capsys)
        run_here(["report", out, "--out", tmp_path / "page.html"], capsys)
        card = write_card(
            inspect(out), name="a/b", origin=Origin(name="llama"), digests={}, results=None, has_picture=False
        )
        told[flag] = ["Rotated" in outcome.stdout, "Rotation of" in (tmp_path / "page.html").read_text()]
        told[flag].append("| Rotated |" in card)
    assert told == {"--rotate": [True] * 3, "--no-rotate": [False] * 3}


def test_check_knows_of_the_second_head(
    calibration_file: Path, sources: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []
    for flag in ("--rotate", "--no-rotate"):
        outcome = run_here(["check", sources("qwen2"), "--calib", calibration_file, flag, "--json"], capsys)
        assert outcome.code == 0
        sizes.append(json.loads(outcome.stdout)["kept_nbytes"])
    assert sizes[0] - sizes[1] == 4 * tiny.VOCAB * tiny.HIDDEN
