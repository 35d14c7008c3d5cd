"""What the format fixes is written down thrice, since kernels know no toolkit and recipes need literals: one value."""

from typing import get_args

from llmmpq import recipe, records
from llmmpq_kernels import layout


def test_the_widths_agree() -> None:
    assert records.WIDTHS == layout.WIDTHS == get_args(recipe.Width)
    assert recipe.Allocation().widths == records.WIDTHS


def test_the_chunks_agree() -> None:
    assert records.CODES_PER_CHUNK == layout.CODES_PER_CHUNK
