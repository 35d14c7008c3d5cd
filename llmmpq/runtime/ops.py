"""`llmmpq::packed_linear`: a matrix product with a packed matrix, as one torch operator.

`explain` is where the backend is chosen, and says why each one was or was not taken. The operator is opaque to
`torch.compile` (its fake implementation gives the shape), so a compiled model holds one call for each linear.

Rejected: letting the compiler trace the torch reference. It would fuse the unpacking, but the graph of a 32-layer
model grows by thousands of nodes, and a kernel could not be swapped in at run time.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch

from llmmpq.errors import KernelUnavailableError
from llmmpq.scheme import Runs, Scheme
from llmmpq_kernels import reference


class Candidate(NamedTuple):
    """One backend, whether it can do the job, and why."""

    backend: str
    accepted: bool
    reason: str


def explain(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], scheme: Scheme) -> list[Candidate]:
    """Every backend for activations of this dtype and a matrix of this shape, best first; the first accepted runs."""
    return [_consider_reference(dtype)]


def _consider_reference(dtype: torch.dtype) -> Candidate:
    if not dtype.is_floating_point:
        return Candidate("reference", False, f"activations are {dtype}, not floating point")
    return Candidate("reference", True, "plain torch, runs on any device; dequantizes the whole matrix for each call")


@functools.lru_cache(maxsize=1024)
def _scheme_of(runs: Runs, group_size: int, *, symmetric: bool, scale_dtype: str) -> Scheme:
    if len(runs) == 1:
        return Scheme(bits=runs[0][0], group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    return Scheme(bits=None, runs=runs, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)


@functools.lru_cache(maxsize=1024)
def _choose(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], scheme: Scheme) -> str:
    candidates = explain(device, dtype, shape, scheme)
    for candidate in candidates:
        if candidate.accepted:
            return candidate.backend
    reasons = "; ".join(f"{candidate.backend}: {candidate.reason}" for candidate in candidates)
    bits = scheme.to_json()["bits"]
    raise KernelUnavailableError(f"no backend runs a {bits}-bit matrix of shape {shape} on {device} ({reasons})")


_BACKENDS = {"reference": reference.packed_linear}


@torch.library.custom_op("llmmpq::packed_linear", mutates_args=())
def _packed_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    order: torch.Tensor | None,
    scale_base: torch.Tensor | None,
    runs: Sequence[int],
    group_size: int,
) -> torch.Tensor:
    """`runs` are the pairs of `Scheme.widths` in one row: an operator takes no nested lists."""
    pairs = tuple(zip(runs[::2], runs[1::2], strict=True))
    scale_dtype = "float16" if scale_base is None else "float8"
    scheme = _scheme_of(pairs, group_size, symmetric=zeros is None, scale_dtype=scale_dtype)
    backend = _BACKENDS[_choose(x.device, x.dtype, (words.shape[0], x.shape[-1]), scheme)]
    return backend(x, words, scales, zeros, bias, order=order, scale_base=scale_base, runs=pairs, group_size=group_size)


@_packed_linear.register_fake
def _packed_linear_fake(x: torch.Tensor, words: torch.Tensor, *_others: object) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[0]))


def _refuse_gradient(context: object, grad_output: torch.Tensor) -> NoReturn:
    raise KernelUnavailableError(
        "packed_linear has no gradient: quantized layers are for inference only. Run the model under"
        " torch.no_grad(), or call model.dequantize() before training"
    )


_packed_linear.register_autograd(_refuse_gradient)


def packed_linear(
    x: torch.Tensor,
    *,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    order: torch.Tensor | None = None,
    scale_base: torch.Tensor | None = None,
    shape: tuple[int, int],
    scheme: Scheme,
) -> torch.Tensor:
    """`x @ weight.T + bias` for x of shape [..., in_features], in x's dtype."""
    if x.shape[-1] != shape[1]:
        raise ValueError(f"input has {x.shape[-1]} features, the packed matrix of shape {shape} takes {shape[1]}")
    runs = [number for run in scheme.widths(shape) for number in run]
    return _packed_linear(x, words, scales, zeros, bias, order, scale_base, runs, scheme.group_size)
