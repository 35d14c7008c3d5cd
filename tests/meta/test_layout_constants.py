"""What the format fixes is written down thrice, since kernels know no toolkit and recipes need literals: one value."""

from typing import get_args

from llmmpq import recipe, scheme
from llmmpq_kernels import layout


def test_the_widths_agree() -> None:
    assert scheme.WIDTHS == layout.WIDTHS == get_args(recipe.Width)
    assert recipe.Allocation().widths == scheme.WIDTHS


def test_the_chunks_agree() -> None:
    assert scheme.CODES_PER_CHUNK == layout.CODES_PER_CHUNK
