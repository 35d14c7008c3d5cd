"""`PackedLinear`, the only module we define: an `nn.Linear` whose weight is stored as packed codes.

The stored tensors are parameters (never trained) rather than buffers, because device maps and disk
offloading in accelerate move parameters and leave buffers where they are. Casting the model changes the bias only:
the stored tensors keep the dtypes of the layout, so a saved copy is the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from llmmpq.errors import CheckpointError
from llmmpq.records import FUSED_ROLES, PackedTensor, Scheme
from llmmpq.runtime import ops, together
from llmmpq_kernels import reference
from llmmpq_kernels.operands import Operands

STORED = ("words", "scales", "zeros", "order", "scale_base")


class PackedLinear(nn.Module):
    """`y = x @ dequantized(stored tensors).T + bias`; built empty, filled by loading or by `from_packed`."""

    words: nn.Parameter
    scales: nn.Parameter
    zeros: nn.Parameter | None
    order: nn.Parameter | None
    scale_base: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, int],
        scheme: Scheme,
        *,
        has_bias: bool = False,
        bias_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.scheme = scheme
        stored = scheme.tensors(shape)
        for name in STORED:
            parameter = None
            if name in stored:
                dtype, dims = stored[name]
                empty = torch.empty(dims, dtype=getattr(torch, dtype), device=device)
                parameter = nn.Parameter(empty, requires_grad=False)
            self.register_parameter(name, parameter)
        bias = torch.empty(self.out_features, dtype=bias_dtype, device=device) if has_bias else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def from_packed(cls, packed: PackedTensor, bias: torch.Tensor | None = None) -> PackedLinear:
        """Wrap packed tensors (no copy) and an optional bias."""
        linear = cls(
            packed.shape, packed.scheme, has_bias=bias is not None, bias_dtype=getattr(bias, "dtype", torch.float32)
        )
        given = packed.tensors() | ({} if bias is None else {"bias": bias})
        expected = dict(linear.named_parameters())
        if given.keys() != expected.keys():
            raise CheckpointError(f"packed matrix has the tensors {sorted(given)}, its scheme needs {sorted(expected)}")
        for name, tensor in given.items():
            if (tensor.dtype, tensor.shape) != (expected[name].dtype, expected[name].shape):
                raise CheckpointError(
                    f"packed matrix: {name} is {tensor.dtype} {list(tensor.shape)}, its scheme needs"
                    f" {expected[name].dtype} {list(expected[name].shape)}"
                )
            setattr(linear, name, nn.Parameter(tensor, requires_grad=False))
        return linear

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_traced = torch.compiler.is_compiling() or type(x) is not torch.Tensor or _has_no_data(x)
        if not is_traced and not (x.requires_grad and torch.is_grad_enabled()):
            return together.multiply(self, x)
        return ops.packed_linear(
            x,
            words=self.words,
            scales=self.scales,
            zeros=self.zeros,
            bias=self.bias,
            order=self.order,
            scale_base=self.scale_base,
            shape=self.shape,
            scheme=self.scheme,
        )

    def operands(self) -> Operands:
        """The parameters as kernels take them. Never kept: offloading takes them away again after each call."""
        held = self._parameters
        if "words" not in held:  # a replica of torch's DataParallel holds them as plain attributes
            held = {**held, **vars(self)}
        return Operands(
            words=cast(torch.Tensor, held["words"]),
            scales=cast(torch.Tensor, held["scales"]),
            zeros=held["zeros"],
            order=held["order"],
            scale_base=held["scale_base"],
            bias=held["bias"],
            runs=self.scheme.widths(self.shape),
            group_size=self.scheme.group_size,
            shape=self.shape,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out_features, in_features] that the packed tensors stand for."""
        return reference.dequantize(
            self.words,
            self.scales,
            self.zeros,
            order=self.order,
            scale_base=self.scale_base,
            runs=self.scheme.widths(self.shape),
            group_size=self.scheme.group_size,
            shape=self.shape,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        kind = "symmetric" if self.scheme.symmetric else "asymmetric"
        scales = ", 8-bit scales" if self.scheme.scale_dtype == "float8" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" bits={self.scheme.to_json()['bits']}, group_size={self.scheme.group_size}, {kind}{scales}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        stored = [parameter for name in STORED if (parameter := getattr(self, name)) is not None]

        def move_or_cast(tensor: torch.Tensor) -> torch.Tensor:
            changed = fn(tensor)
            if changed.dtype != tensor.dtype and any(tensor is parameter for parameter in stored):
                return tensor.to(changed.device)
            return changed

        return super()._apply(move_or_cast, recurse)


def _has_no_data(x: torch.Tensor) -> bool:
    """Inside `torch.func` transforms and `torch.jit.trace` tensors stand for others: only operators know of which."""
    return torch.jit.is_tracing() or torch._C._functorch.is_functorch_wrapped_tensor(x)


def share_launches(model: nn.Module) -> None:
    """Let q, k and v of a model, and gate and up, share launches on the devices where that is switched on."""
    there = {"cpu": True, "cuda": torch.cuda.is_available()}
    devices = tuple(device for device in ops.together_on() if there[device])
    together.put_together(model, PackedLinear, FUSED_ROLES, devices)
