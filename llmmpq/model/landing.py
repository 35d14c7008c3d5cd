"""Where the output of a linear is added to something that the block carries on: usually the residual stream.

Found by trial, not by name: the linear's output is changed at random, and the last place that moves by just that change
(times one number: some models scale what they add) is where it lands. Places are the inputs of the block's modules and
the output of the block. A linear in front of a norm, of an activation or of a product lands nowhere but in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from llmmpq.model.around import EnoughSeenError
from llmmpq.model.stream import Block
from llmmpq.records import LinearSpec

# Of the change, what may be rounding: bfloat16 keeps 1/256 of a stream that may be some times larger than the change.
# A norm or an activation on the way turns the change by far more.
TOLERANCE = 0.05
# The change is at least this part of the state's size, so that it stands out from rounding where a layer gives little.
SHARE_OF_STATE = 0.5

Places = dict[str | None, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Landing:
    """The module of the block whose input shows the sum, None for the block's output; what the output is scaled by."""

    module: str | None
    factor: float


def landing_of(block: Block, spec: LinearSpec) -> Landing | None:
    """None where the linear's output meets something else first. With several processes, the first one's answer."""
    return block.ranks.from_first(lambda: _find(block, spec))


def errors_where_it_lands(
    block: Block, spec: LinearSpec, landing: Landing
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each batch the linear's input, and what its output would have to add to undo the error where it lands."""
    assert block.original_states is not None
    for state, original in zip(block.states, block.original_states, strict=True):
        with block.with_original_weights():
            wanted, _ = _run_to(block, spec, landing, original)
        found, inputs = _run_to(block, spec, landing, state)
        if inputs is not None and wanted is not None and found is not None:
            yield inputs, (wanted.float() - found.float()) / landing.factor


@torch.no_grad()
def _find(block: Block, spec: LinearSpec) -> Landing | None:
    if block.is_head:
        return None
    outputs: list[torch.Tensor] = []
    for waiting in block.states:
        # A NaN in a window may spread over all of it, also where attention masks it.
        if not outputs and bool(torch.isfinite(waiting).all()):
            state = waiting.to(block.device)
            outputs, before = _places_behind(block, spec, state, change=None)
    if len(outputs) != 1 or outputs[0].numel() != state.numel():
        return None
    size = max(float(outputs[0].float().std()), SHARE_OF_STATE * float(state.float().std()))
    noise = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0))
    change = (size * noise).to(outputs[0].device, outputs[0].dtype)
    _, after = _places_behind(block, spec, state, change=change)
    found = None
    for where in (where for where in before if where in after):
        moved = (after[where].float() - before[where].float()).reshape(change.shape)
        factor = _factor(moved, change.float())
        found = found if factor is None else Landing(module=where, factor=factor)
    return found


def _factor(moved: torch.Tensor, change: torch.Tensor) -> float | None:
    """What the change was multiplied by, None where something else was done to it."""
    moved, change = moved.double().flatten(), change.double().flatten()
    factor = float(moved @ change) / max(float(change @ change), 1e-300)
    rest = float((moved - factor * change).norm())
    # Three digits: what is behind them is rounding, and differs with the window that was looked at.
    return float(f"{factor:.3g}") if rest < TOLERANCE * abs(factor) * float(change.norm()) else None


def _places_behind(
    block: Block, spec: LinearSpec, state: torch.Tensor, *, change: torch.Tensor | None
) -> tuple[list[torch.Tensor], Places]:
    """The linear's outputs, and what then enters the modules of the block in the order of the calls, and leaves it.

    Modules that are called more than once are no places: which of the calls is meant could not be told later.
    """
    outputs: list[torch.Tensor] = []
    seen: Places = {}
    calls: Counter[str | None] = Counter()

    def begin(_module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor | None:
        outputs.append(output.clone())
        return None if change is None else output + change

    def keep(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[name] += 1
        entering = _first_tensor(args, kwargs)
        if outputs and entering is not None and entering.numel() == state.numel():
            seen[name] = entering.clone()

    handles = [block.linear(spec).register_forward_hook(begin)]
    for name, module in block.module.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(partial(keep, name), with_kwargs=True))
    try:
        seen[None] = block.call(state)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, {where: tensor for where, tensor in seen.items() if calls[where] <= 1}


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


@torch.no_grad()
def _run_to(
    block: Block, spec: LinearSpec, landing: Landing, state: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What is carried on after the linear, and the linear's input; None for what the batch does not reach."""
    inputs: list[torch.Tensor] = []
    carried: list[torch.Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering = _first_tensor(args, kwargs)
        if entering is not None:
            carried.append(entering)
        raise EnoughSeenError

    handles = [block.linear(spec).register_forward_pre_hook(lambda _module, args: inputs.append(args[0].clone()))]
    if landing.module is not None:
        handles.append(block.module.get_submodule(landing.module).register_forward_pre_hook(stop, with_kwargs=True))
    try:
        with suppress(EnoughSeenError):
            carried.append(block.call(state.to(block.device)))
    finally:
        for handle in handles:
            handle.remove()
    return (carried[0] if carried else None), (inputs[0] if inputs else None)
