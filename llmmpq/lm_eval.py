"""lm-eval's own command line, for models quantized by llmmpq.

    python -m llmmpq.lm_eval run --model hf --model_args pretrained=DIR --tasks wikitext,arc_easy

It is `lm-eval` with one thing before it: transformers learns to load the format. lm-eval 0.4.13 has no other way in:
its registry of model classes is a table in its own source, and it looks for no entry points. A model class of ours
would add nothing, since its `hf` class loads whatever transformers knows.
"""

from __future__ import annotations

import sys

import llmmpq.hf  # noqa: F401  (teaches transformers the format)
from llmmpq.evaluate.harness import MISSING


def main() -> int:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        if error.name not in ("lm_eval", "datasets"):
            raise
        print("error:", MISSING, file=sys.stderr)
        return 2
    cli_evaluate()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
