"""The public surface is frozen: a name more or less is a decision, taken here and in CHANGELOG.md."""

import subprocess
import sys

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
    "quantize",
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


@pytest.mark.parametrize(
    "first_import",
    ["import llmmpq.quantize", "from llmmpq.quantize import *", "import llmmpq.pipeline", "import llmmpq.hf"],
)
def test_the_subpackage_never_hides_the_function_quantize(first_import: str) -> None:
    code = f"{first_import}\nfrom llmmpq import quantize\nassert quantize.__module__ == 'llmmpq.pipeline', quantize"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
