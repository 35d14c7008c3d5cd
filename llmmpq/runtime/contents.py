"""What headers cannot tell: whether the stored numbers of a packed matrix are such as the layout allows.

Asked before anything computes with them: an order that is no permutation would make a kernel write outside its matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmmpq.records import Scheme


def checked_names(scheme: Scheme) -> tuple[str, ...]:
    """The stored tensors that `content_problems` looks into."""
    names = ["order"] if scheme.mixed else []
    return (*names, "scales", "scale_base") if scheme.scale_dtype == "float8" else tuple(names)


def content_problems(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> list[str]:
    """What is wrong with the tensors of `checked_names`, which have the dtypes and shapes of the scheme."""
    problems = []
    if scheme.mixed:
        counts = [count for _, count in scheme.widths(shape)]
        order = tensors["order"].long()
        if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
            problems.append(f"order is no permutation of 0 to {len(order) - 1}")
        elif not all(bool((part.diff() > 0).all()) for part in order.split(counts)):
            problems.append("order does not rise inside each run of equal width")
    if scheme.scale_dtype == "float8":
        base = float(tensors["scale_base"])
        if not torch.finfo(torch.float32).tiny <= base <= torch.finfo(torch.float32).max:
            problems.append(f"scale_base is {base}, expected a positive normal number")
        if bool((tensors["scales"] == 0).any()):
            problems.append("scales has the code 0, which stands for no scale")
    return problems
