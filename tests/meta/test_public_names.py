"""The public surface is frozen: a name more or less is a decision, taken here and in CHANGELOG.md."""

import pytest

import llmmpq

PUBLIC_NAMES = {
    "LlmmpqConfig",
    "LlmmpqError",
    "LlmmpqForCausalLM",
    "Plan",
    "Recipe",
    "Scheme",
    "__version__",
    "quantize_model",
}


def test_the_public_names_are_exactly_these() -> None:
    assert set(llmmpq.__all__) == PUBLIC_NAMES
    assert len(llmmpq.__all__) == len(PUBLIC_NAMES)
    assert set(dir(llmmpq)) >= PUBLIC_NAMES


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(llmmpq, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = llmmpq.quantise
