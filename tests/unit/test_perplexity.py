"""Perplexity against a plain computation, and text generation, on the demo model."""

import logging
import math
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmmpq
from llmmpq.errors import CalibrationError, RecipeError
from llmmpq.evaluate import perplexity
from llmmpq.evaluate.perplexity import NllResult, token_nll
from llmmpq.evaluate.sample import generate_text

ASSETS = Path(llmmpq.__file__).parent / "assets"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ASSETS / "demo", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "demo")


@pytest.fixture(scope="module")
def windows(tokenizer):
    ids = tokenizer((ASSETS / "heldout.txt").read_text(encoding="utf-8"), verbose=False)["input_ids"]
    return torch.tensor(ids[: 5 * 96]).reshape(5, 96)


def read(model, windows, *, batch=1):
    seen = []
    return token_nll(model, windows, batch=batch, advance=seen.append), seen


def plain_nll(model, windows):
    losses = []
    with torch.no_grad():
        for window in windows:
            log_probabilities = model(window[None]).logits[0].double().log_softmax(-1)
            for position in range(1, len(window)):
                losses.append(-log_probabilities[position - 1, window[position]].item())
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_equals_a_plain_computation(model, windows, batch):
    result, seen = read(model, windows, batch=batch)
    nll, num_tokens = plain_nll(model, windows)
    assert result.nll == pytest.approx(nll, abs=1e-6)
    assert result.num_tokens == num_tokens == 5 * 95
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-6)
    assert result.seconds > 0
    assert sum(seen) == 5
    assert max(seen) == min(batch, 5)


@pytest.mark.parametrize("num_positions", [1, 7, 95, 1000])
def test_chunks_change_nothing(model, windows, num_positions, monkeypatch):
    whole, _ = read(model, windows)
    monkeypatch.setattr(perplexity, "CHUNK_NUM_LOGITS", num_positions * model.config.vocab_size)
    chunked, _ = read(model, windows, batch=2)
    assert chunked.nll == pytest.approx(whole.nll, abs=1e-6)


def test_every_window_is_read_on_its_own(model, windows):
    together, _ = read(model, windows[:2])
    alone = [read(model, window[None])[0].nll for window in windows[:2]]
    assert together.nll == pytest.approx(sum(alone) / 2, abs=1e-9)


def test_a_loss_that_is_not_finite_is_an_error_that_says_where(windows):
    broken = AutoModelForCausalLM.from_pretrained(ASSETS / "demo", dtype=torch.float32)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"loss is nan in windows 1 to 2 of 5, computed in float32.*--dtype"):
        read(broken, windows, batch=2)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1)])
def test_windows_that_predict_nothing_are_an_error(model, shape):
    with pytest.raises(CalibrationError, match="predict nothing"):
        read(model, torch.zeros(shape, dtype=torch.long))


def test_the_perplexity_of_a_hopeless_model_does_not_overflow():
    assert NllResult(nll=1e4, num_tokens=1, seconds=1.0).perplexity == math.inf


def generate(model, tokenizer, prompt="The library", **changes):
    return generate_text(model, tokenizer, prompt, **({"max_new_tokens": 12, "temperature": 0.0, "seed": 0} | changes))


def test_temperature_zero_takes_the_likeliest_token(model, tokenizer):
    text = generate(model, tokenizer)
    ids = tokenizer("The library", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text.startswith("The library")
    assert text == generate(model, tokenizer, seed=1)


def test_sampling_follows_the_seed_and_leaves_the_generator_of_others_alone(model, tokenizer):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    texts = [generate(model, tokenizer, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.rand(1), expected)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generation_gives_transformers_nothing_to_warn_about(tokenizer, temperature, recwarn):
    """Also where a model's own settings ask for sampling."""
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "demo", dtype=torch.float32)
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    transformers.logging.warning_once.cache_clear()  # else only the first of all tests could see a warning
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        generate(model, tokenizer, temperature=temperature)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert said == []
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"temperature": -0.5}, "--temperature is -0.5"),
        ({"temperature": math.nan}, "--temperature is nan"),
        ({"prompt": ""}, "gives no tokens"),
        ({"max_new_tokens": 1024}, "more than the 1024 the model reads"),
    ],
)
def test_mistakes_are_errors(model, tokenizer, changes, complaint):
    with pytest.raises(RecipeError, match=complaint):
        generate(model, tokenizer, **changes)
