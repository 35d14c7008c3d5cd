"""`llmmpq::packed_linear`: a matrix product with a packed matrix, as one torch operator.

`choice.explain` says which backend runs and why. The operator is opaque to `torch.compile` (its fake implementation
gives the shape), so a compiled model holds one call for each linear. It reads nothing from a device, so it can be
captured in a CUDA graph, once it has run: a kernel is compiled by its first call.

Rejected: letting the compiler trace the torch reference. It would fuse the unpacking, but the graph of a 32-layer
model grows by thousands of nodes, and a kernel could not be swapped in at run time.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch

from llmmpq.errors import KernelUnavailableError
from llmmpq.runtime.choice import (
    CPU,
    REFERENCE,
    Candidate,
    choose,
    choose_together,
    explain,
    explain_together,
    give_up_on,
    give_up_together,
    together_on,
)
from llmmpq.scheme import Scheme
from llmmpq_kernels import reference
from llmmpq_kernels.operands import MisfitError, Operands

# Named in a RuntimeError where memory on the CPU runs out: torch has an error of its own for devices only.
CPU_ALLOCATOR = "DefaultCPUAllocator"

# What of `Operands` are tensors.
TENSORS = ("words", "scales", "zeros", "order", "scale_base", "bias")

__all__ = ["Candidate", "explain", "explain_together", "multiply", "multiply_together", "packed_linear", "together_on"]


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
    operands = Operands(
        words=words,
        scales=scales,
        zeros=zeros,
        order=order,
        scale_base=scale_base,
        bias=bias,
        runs=tuple(zip(runs[::2], runs[1::2], strict=True)),
        group_size=group_size,
        shape=(words.shape[0], x.shape[-1]),
    )
    return multiply(x, operands)


def multiply(x: torch.Tensor, operands: Operands) -> torch.Tensor:
    """`x @ weight.T + bias` past the operator, whose way through torch takes as long as a small product.

    For callers whom nobody traces, and who ask for no gradient.
    """
    shape, runs, group_size = operands.shape, operands.runs, operands.group_size
    if x.shape[-1] != shape[1]:
        raise ValueError(f"input has {x.shape[-1]} features, the packed matrix of shape {shape} takes {shape[1]}")
    if operands.words.device != x.device:
        raise KernelUnavailableError(
            f"the packed matrix of shape {shape} is on {operands.words.device}, its input on {x.device}: load or move"
            " the model to the device of its input (on meta it holds no data)"
        )
    num_rows = x.numel() // shape[1]
    if num_rows == 0:
        return x.new_empty((*x.shape[:-1], shape[0]))
    # Rounded up to a power of two: lengths of prompts are many, classes of them few.
    backend = choose(x.device, x.dtype, shape, runs, group_size, 1 << (num_rows - 1).bit_length())
    if backend != REFERENCE:
        try:
            return _run_kernel(backend, x.reshape(num_rows, shape[1]), operands).view(*x.shape[:-1], shape[0])
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except MisfitError as error:
            raise KernelUnavailableError(f"packed matrix of shape {shape}: {error}") from error
        except Exception as error:  # whatever a compiler or a driver raises: the model still runs, slowly, and says so
            if CPU_ALLOCATOR in str(error):
                raise
            give_up_on(backend, x.device, runs, group_size, error)
    return reference.packed_linear(
        x,
        operands.words,
        operands.scales,
        operands.zeros,
        operands.bias,
        order=operands.order,
        scale_base=operands.scale_base,
        runs=runs,
        group_size=group_size,
    )


def multiply_together(x: torch.Tensor, members: Sequence[Operands]) -> list[torch.Tensor] | None:
    """What `multiply` gives for each matrix, from one launch; None where each must go alone, which says why."""
    num_columns = x.shape[-1]
    if any(each.shape[1] != num_columns or each.words.device != x.device for each in members):
        return None
    num_rows = x.numel() // num_columns
    if num_rows == 0:
        return None
    described = tuple([(each.shape, each.runs, each.group_size) for each in members])
    backend = choose_together(x.device, x.dtype, described, 1 << (num_rows - 1).bit_length())
    if backend is None:
        return None
    try:
        outputs = _run_kernel_together(backend, x.reshape(num_rows, num_columns), members)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except MisfitError:  # whose it is, is said where each goes alone
        return None
    except Exception as error:  # as in `multiply`
        if CPU_ALLOCATOR in str(error):
            raise
        give_up_together(backend, x.device, described, error)
        return None
    return [output.view(*x.shape[:-1], output.shape[1]) for output in outputs]


def _run_kernel_together(backend: str, x_MK: torch.Tensor, members: Sequence[Operands]) -> list[torch.Tensor]:
    if backend == CPU:
        from llmmpq_kernels import cpu

        return cpu.multiply_together(x_MK, members)
    from llmmpq_kernels import tuning

    return tuning.multiply_together(x_MK if x_MK.stride(1) == 1 else x_MK.contiguous(), members)


def _run_kernel(backend: str, x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    if backend == CPU:
        from llmmpq_kernels import cpu

        return cpu.multiply(x_MK, operands)
    from llmmpq_kernels import tuning

    return tuning.multiply(backend, x_MK if x_MK.stride(1) == 1 else x_MK.contiguous(), operands)


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
