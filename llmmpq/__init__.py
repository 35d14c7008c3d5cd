"""llmmpq: mixed-precision quantization of large language models.

The public names are loaded on first use, so that `import llmmpq` and `llmmpq --help` never wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmmpq.errors import LlmmpqError
    from llmmpq.hf import LlmmpqConfig, LlmmpqForCausalLM
    from llmmpq.pipeline import quantize_model
    from llmmpq.recipe import Recipe
    from llmmpq.records import Plan, Scheme

__version__ = "0.1.0"

__all__ = [
    "LlmmpqConfig",
    "LlmmpqError",
    "LlmmpqForCausalLM",
    "Plan",
    "Recipe",
    "Scheme",
    "__version__",
    "quantize_model",
]

_HOME = {
    "LlmmpqConfig": "llmmpq.hf",
    "LlmmpqError": "llmmpq.errors",
    "LlmmpqForCausalLM": "llmmpq.hf",
    "Plan": "llmmpq.records",
    "Recipe": "llmmpq.recipe",
    "Scheme": "llmmpq.records",
    "quantize_model": "llmmpq.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmmpq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
