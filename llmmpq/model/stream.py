"""Decoder blocks one by one: load, hand out, let the caller change weights, run, free.

The calibration batches are embedded once by the model itself: its blocks are silenced for that pass, so that only the
embedding side runs and every block's own arguments (masks, rotary tables, layer kinds) are seen exactly as the model
passes them. After that the states travel block by block. Memory: one block's weights and the states.

    for block in BlockStream(...):            # block.run() uses the weights as they are now
        ...                                    # leaving the loop body runs the block once more for the next one
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmmpq.errors import UnsupportedModelError
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.skeleton import Skeleton
from llmmpq.records import LinearSpec

InputHook = Callable[[LinearSpec, torch.Tensor], None]


class _EnoughSeen(Exception):
    """Raised inside the model's forward to end it where the blocks begin or end."""


@dataclass(kw_only=True)
class Block:
    """One loaded decoder block and the states that enter it.

    `states` come from the blocks before as the caller left them. `original_states` and `original_weights` are those
    of the unchanged model, when the stream was asked to follow it too.
    """

    index: int
    name: str
    module: nn.Module
    linears: list[LinearSpec]
    states: list[torch.Tensor]
    original_states: list[torch.Tensor] | None
    original_weights: dict[str, torch.Tensor]
    device: torch.device
    call: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)

    def linear(self, spec: LinearSpec) -> nn.Linear:
        found = self.module.get_submodule(spec.name.removeprefix(self.name + "."))
        assert isinstance(found, nn.Linear)
        return found

    @torch.no_grad()
    def run(self, states: list[torch.Tensor] | None = None) -> Iterator[torch.Tensor]:
        """Outputs for each batch of states, on the block's device, with the weights as they are now."""
        for state in self.states if states is None else states:
            yield self.call(state.to(self.device))

    def run_with_inputs(self, hook: InputHook, specs: list[LinearSpec]) -> Iterator[torch.Tensor]:
        """Like `run`, showing `hook` the input of each linear in `specs` on the way."""
        handles = [
            self.linear(spec).register_forward_pre_hook(lambda _module, args, spec=spec: hook(spec, args[0]))
            for spec in specs
        ]
        try:
            yield from self.run()
        finally:
            for handle in handles:
                handle.remove()

    def inputs_of(self, spec: LinearSpec) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The input of one linear for each batch; the rest of the block is not run.

        Beside it the input that the unchanged model has there, when the stream follows it.
        """
        seen: list[torch.Tensor] = []

        def keep(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(args[0])
            raise _EnoughSeen

        handle = self.linear(spec).register_forward_pre_hook(keep)
        try:
            for position, state in enumerate(self.states):
                original = None
                if self.original_states is not None:
                    with torch.no_grad(), self.with_original_weights(), suppress(_EnoughSeen):
                        self.call(self.original_states[position].to(self.device))
                    original = seen.pop() if seen else None
                with torch.no_grad(), suppress(_EnoughSeen):
                    self.call(state.to(self.device))
                # A batch need not reach every linear. Without the original's input the cross moment is not known.
                if seen and (original is not None or self.original_states is None):
                    yield seen.pop(), original
                seen.clear()
        finally:
            handle.remove()

    @contextmanager
    def with_original_weights(self) -> Iterator[None]:
        current = {spec.name: self.linear(spec).weight.data for spec in self.linears}
        try:
            for spec in self.linears:
                self.linear(spec).weight.data = self.original_weights[spec.name]
            yield
        finally:
            for spec in self.linears:
                self.linear(spec).weight.data = current[spec.name]

    def input_groups(self) -> list[list[LinearSpec]]:
        """The linears by shared input, in the order in which the block runs them.

        Linears that no batch reaches are absent. One whose weight is read without calling it is refused: it could
        not be run from packed codes.
        """
        group_of: dict[str, list[LinearSpec]] = {}
        groups: list[list[LinearSpec]] = []
        inputs: list[tuple[torch.Tensor, LinearSpec]] = []

        def note(spec: LinearSpec, tensor: torch.Tensor) -> None:
            shared = next((known for other, known in inputs if other is tensor), None)
            inputs.append((tensor, spec))
            if spec.name in group_of:
                return
            if shared is None:
                groups.append([])
            group = groups[-1] if shared is None else group_of[shared.name]
            group.append(spec)
            group_of[spec.name] = group

        # Usually the first batch reaches everything; only otherwise are the others looked at.
        for _ in self.run_with_inputs(note, self.linears):
            inputs.clear()
            if len(group_of) == len(self.linears):
                break
        for spec in self.linears:
            if spec.name not in group_of and self._reads_weight_of(spec):
                raise UnsupportedModelError(
                    f"{spec.name} is used without being called as a layer (its weight is read directly): not "
                    f"supported. Leave it unquantized with --keep '*.{spec.role}'."
                )
        return groups

    def _reads_weight_of(self, spec: LinearSpec) -> bool:
        """Whether the block's output depends on a weight: with NaN in it, the output shows it."""
        linear = self.linear(spec)
        weight = linear.weight.data
        try:
            linear.weight.data = torch.full_like(weight, torch.nan)
            return any(not bool(torch.isfinite(output).all()) for output in self.run(self.states[:1]))
        finally:
            linear.weight.data = weight


class BlockStream:
    """The blocks of one model over one set of calibration windows."""

    def __init__(
        self,
        skeleton: Skeleton,
        checkpoint: Checkpoint,
        windows: torch.Tensor,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch: int = 1,
        states_on_host: bool = False,
        follow_original: bool = False,
    ) -> None:
        self.skeleton = skeleton
        self.checkpoint = checkpoint
        self.windows = windows
        self.device = device
        self.dtype = dtype
        self.batch = batch
        self.follow_original = follow_original
        self.states_device = torch.device("cpu") if states_on_host else device

    def __iter__(self) -> Iterator[Block]:
        skeleton = self.skeleton
        states, arguments = self._embed()
        original_states = list(states) if self.follow_original else None
        for index, name in enumerate(skeleton.block_names):
            module = skeleton.block(index)
            self._load(module, skeleton.block_tensors(index), prefix=name + ".")
            block = Block(
                index=index,
                name=name,
                module=module,
                linears=skeleton.block_linears(index),
                states=states,
                original_states=original_states,
                original_weights={},
                device=self.device,
                call=_Caller(module, arguments[index], name),
            )
            block.original_weights = {spec.name: block.linear(spec).weight.data for spec in block.linears}
            try:
                yield block
                if index + 1 < len(skeleton.block_names):
                    self._advance(block, states)
                    if original_states is not None:
                        with block.with_original_weights():
                            self._advance(block, original_states)
                block.original_weights.clear()
            finally:
                for tensor_name in skeleton.block_tensors(index):
                    _free_tensor(module, tensor_name.removeprefix(name + "."))
                _give_back_freed_memory()

    def _advance(self, block: Block, states: list[torch.Tensor]) -> None:
        # In place, batch by batch: the states before and after a block never exist side by side.
        for position, output in enumerate(block.run(states)):
            states[position] = output.to(self.states_device)

    def _load(self, module: nn.Module, names: list[str], *, prefix: str) -> None:
        stored = self.skeleton.stored_names
        tensors = self.checkpoint.read((stored[name] for name in names), device=self.device, dtype=self.dtype)
        for name in names:
            _set_tensor(module, name.removeprefix(prefix), tensors[stored[name]])
        for child in module.modules():
            for key, buffer in child._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    child._buffers[key] = buffer.to(self.device)

    @torch.no_grad()
    def _embed(self) -> tuple[list[torch.Tensor], list[dict[int, _Arguments]]]:
        """States entering block 0 for every batch, and per block the other arguments by batch size."""
        recorder = _Recorder(self.skeleton, self._load_outside_blocks)
        states = []
        with recorder:
            for start in range(0, len(self.windows), self.batch):
                ids = self.windows[start : start + self.batch].to(self.device)
                states.append(recorder.embed(ids).to(device=self.states_device, dtype=self.dtype))
        return states, recorder.arguments

    def _load_outside_blocks(self, module: nn.Module, name: str) -> None:
        prefix = name + "."
        wanted = [f"{prefix}{key}" for key in module._parameters | module._buffers]
        self._load(module, [key for key in wanted if key in self.skeleton.stored_names], prefix=prefix)


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    """What the model passes a block besides the hidden states."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class _Caller:
    """Calls a block's module with the recorded arguments that fit the batch."""

    def __init__(self, module: nn.Module, arguments: dict[int, _Arguments], name: str) -> None:
        self.module, self.arguments, self.name = module, arguments, name

    def __call__(self, state: torch.Tensor) -> torch.Tensor:
        rest = self.arguments[state.shape[0]]
        output = self.module(state, *rest.positional, **rest.named)
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape != state.shape:
            raise UnsupportedModelError(
                f"{self.name} turned states of shape {list(state.shape)} into {list(hidden.shape)}: "
                "blocks must keep the shape"
            )
        return hidden


class _Recorder:
    """Silences the blocks of a skeleton and records what the model passes them."""

    def __init__(self, skeleton: Skeleton, load: Callable[[nn.Module, str], None]) -> None:
        self.skeleton = skeleton
        self.blocks = [skeleton.block(index) for index in range(len(skeleton.block_names))]
        self.arguments: list[dict[int, _Arguments]] = [{} for _ in self.blocks]
        self._load = load
        self._loaded: dict[str, nn.Module] = {}
        self._handles: list[Any] = []
        self._state: torch.Tensor | None = None
        self._returns_tuple = False
        self._wrong_return = False

    def __enter__(self) -> _Recorder:
        model = self.skeleton.model
        for index, block in enumerate(self.blocks):
            block.forward = lambda *args, _index=index, **kwargs: self._seen(_index, args, kwargs)
        inside = {id(module) for block in self.blocks for module in block.modules()}
        for name, module in model.named_modules():
            if id(module) not in inside and (module._parameters or module._buffers):
                handle = module.register_forward_pre_hook(lambda mod, _args, name=name: self._on_call(mod, name))
                self._handles.append(handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for block in self.blocks:
            del block.forward
        for handle in self._handles:
            handle.remove()
        for name, module in self._loaded.items():
            for key in module._parameters | module._buffers:
                if f"{name}.{key}" in self.skeleton.stored_names:
                    _free_tensor(module, key)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        self._state = None
        for self._returns_tuple in (False, True):
            self._wrong_return = False
            try:
                self.skeleton.model(input_ids=ids, use_cache=False)
            except _EnoughSeen:
                pass
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
                # A block that must return a tuple breaks the model when it returns a tensor: try the other way.
                if self._returns_tuple:
                    raise UnsupportedModelError(
                        f"{type(self.skeleton.model).__name__} cannot be run up to its blocks: {error}"
                    ) from error
                self._wrong_return = True
            if not self._wrong_return:
                break
        if self._state is None:
            raise UnsupportedModelError(f"{type(self.skeleton.model).__name__} never called its decoder blocks")
        if self._wrong_return:
            raise UnsupportedModelError(
                f"{type(self.skeleton.model).__name__} changes the hidden states between its blocks: such models "
                "cannot be streamed yet"
            )
        return self._state

    def _on_call(self, module: nn.Module, name: str) -> None:
        if name not in self._loaded:
            self._load(module, name)
            self._loaded[name] = module

    def _seen(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        rest = _Arguments(positional=args[1:], named={k: v for k, v in kwargs.items() if k != "hidden_states"})
        if index == 0:
            self._state = hidden
        assert self._state is not None
        if hidden is not self._state and not (hidden.shape == self._state.shape and torch.equal(hidden, self._state)):
            self._wrong_return = True
            raise _EnoughSeen
        known = self.arguments[index].setdefault(len(hidden), rest)
        if not _same(known.named, rest.named) or not _same(known.positional, rest.positional):
            raise UnsupportedModelError(
                f"{self.skeleton.block_names[index]} takes an argument that depends on the tokens besides the hidden "
                "states: such blocks cannot be streamed yet"
            )
        if index == len(self.blocks) - 1:
            raise _EnoughSeen
        return (hidden, None) if self._returns_tuple else hidden


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, tuple | list):
        return type(first) is type(second) and len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and first.keys() == second.keys()
            and all(_same(first[k], second[k]) for k in first)
        )
    return type(first) is type(second)


def _give_back_freed_memory() -> None:
    """glibc keeps freed tensors of some megabytes in its heap, which fragments a little more with every block."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library has no malloc_trim, and less need of it
            ctypes.CDLL(None).malloc_trim(0)


def _set_tensor(module: nn.Module, path: str, value: torch.Tensor) -> None:
    parent_path, _, key = path.rpartition(".")
    parent = module.get_submodule(parent_path)
    if key in parent._parameters:
        parent._parameters[key] = nn.Parameter(value, requires_grad=False)
    else:
        parent._buffers[key] = value


def _free_tensor(module: nn.Module, path: str) -> None:
    parent_path, _, key = path.rpartition(".")
    parent = module.get_submodule(parent_path)
    held = (parent._parameters if key in parent._parameters else parent._buffers)[key]
    assert held is not None
    _set_tensor(module, path, held.data.to("meta"))
