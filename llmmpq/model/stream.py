"""Decoder blocks one by one: load, hand out, let the caller change weights, run, free.

The calibration batches are embedded once by the model itself: its blocks are silenced for that pass, so that only the
embedding side runs and every block's own arguments (masks, rotary tables, layer kinds) are seen exactly as the model
passes them. After that the states travel block by block. Memory: one block's weights and the states.

    for block in BlockStream(...):            # block.run() uses the weights as they are now
        ...                                    # leaving the loop body runs the block once more for the next one

Where the output head is to be quantized it comes as a last block, whose outputs are logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from llmmpq.errors import UnsupportedModelError
from llmmpq.model.around import Arguments, Around, EnoughSeenError, free_tensor, set_tensor
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.heap import give_back_freed_memory, keep_large_tensors_out_of_the_heap
from llmmpq.model.skeleton import Skeleton
from llmmpq.ranks import ALONE, Ranks
from llmmpq.records import LinearSpec

InputHook = Callable[[LinearSpec, torch.Tensor], None]
OutputHook = Callable[[str, torch.Tensor], None]


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
    call: Callable[..., torch.Tensor] = field(repr=False)
    broadcasts: bool = False  # one call does for any number of sequences
    ranks: Ranks = ALONE  # with whom the windows are shared
    is_head: bool = False  # final norm and output head: its outputs are logits, and no states leave it

    def linear(self, spec: LinearSpec) -> nn.Linear:
        found = self.module.get_submodule(spec.name.removeprefix(self.name + "."))
        assert isinstance(found, nn.Linear)
        return found

    @torch.no_grad()
    def run(self, states: list[torch.Tensor] | None = None) -> Iterator[torch.Tensor]:
        """Outputs for each batch of states, on the block's device, with the weights as they are now."""
        for state in self.states if states is None else states:
            yield self.call(state.to(self.device))

    @torch.no_grad()
    def run_many(self, states: torch.Tensor) -> torch.Tensor:
        """One forward for any number of sequences, where the block's arguments allow it; else one by one."""
        states = states.to(self.device)
        if self.broadcasts:
            return self.call(states)
        return torch.cat([self.call(state[None]) for state in states])

    @torch.no_grad()
    def run_rounded(self, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Like `run_many`, one sequence at a time, with weights and arithmetic in another dtype."""
        exact = {name: parameter.data for name, parameter in self.module.named_parameters()}
        try:
            for parameter in self.module.parameters():
                parameter.data = parameter.data.to(dtype)
            return torch.cat([self.call(state[None].to(self.device, dtype), dtype=dtype) for state in states])
        finally:
            for name, parameter in self.module.named_parameters():
                parameter.data = exact[name]

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

    @contextmanager
    def with_outputs(self, hook: OutputHook) -> Iterator[None]:
        """Shows `hook` what each linear gives, as it is called; the block goes on with a copy, which it may change."""

        def show(name: str, output: torch.Tensor) -> torch.Tensor:
            hook(name, output)
            return output.clone()

        handles = [
            self.linear(spec).register_forward_hook(lambda _module, _args, output, name=spec.name: show(name, output))
            for spec in self.linears
        ]
        try:
            yield
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
            raise EnoughSeenError

        handle = self.linear(spec).register_forward_pre_hook(keep)
        try:
            for position, state in enumerate(self.states):
                original = None
                if self.original_states is not None:
                    with torch.no_grad(), self.with_original_weights(), suppress(EnoughSeenError):
                        self.call(self.original_states[position].to(self.device))
                    original = seen.pop() if seen else None
                with torch.no_grad(), suppress(EnoughSeenError):
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

    @contextmanager
    def with_weights(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Other weights in some linears, by name; a gradient passes through them, as through no parameter's data."""
        held = [self.linear(spec)._parameters for spec in self.linears if spec.name in weights]
        current = [parameters["weight"] for parameters in held]
        try:
            for parameters, spec in zip(held, (s for s in self.linears if s.name in weights), strict=True):
                parameters["weight"] = cast(nn.Parameter, weights[spec.name])  # any tensor does
            yield
        finally:
            for parameters, weight in zip(held, current, strict=True):
                parameters["weight"] = weight

    def input_groups(self) -> list[list[LinearSpec]]:
        """The linears by shared input, in the order in which the block runs them.

        Linears that no batch reaches are absent. One whose weight is read without calling it is refused: it could
        not be run from packed codes. Where several processes share the windows, a linear counts as reached when one of
        them reaches it.
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
        self._agree_on(groups, group_of)
        for spec in self.linears:
            if spec.name not in group_of and self._reads_weight_of(spec):
                raise UnsupportedModelError(
                    f"{spec.name} is used without being called as a layer (its weight is read directly): not "
                    f"supported. Leave it unquantized with --keep '*.{spec.role}'."
                )
        return groups

    def _agree_on(self, groups: list[list[LinearSpec]], group_of: dict[str, list[LinearSpec]]) -> None:
        """The same groups in the same order in all processes, though their windows may reach other linears."""
        known = self.ranks.gather([[spec.name for spec in group] for group in groups])
        if all(names == known[0] for names in known):
            return
        specs = {spec.name: spec for spec in self.linears}
        groups.clear()
        group_of.clear()
        for names in (names for of_rank in known for names in of_rank):
            added = [specs[name] for name in names if name not in group_of]
            if added:
                groups.append(added)
                group_of |= {spec.name: added for spec in added}

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
    """The blocks of one model over one set of calibration windows, or over this process's share of them."""

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
        many: bool = False,
        keep_loaded: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.skeleton = skeleton
        self.checkpoint = checkpoint
        self.windows = ranks.share(windows, "calibration windows")
        self.ranks = ranks
        self.device = device
        self.dtype = dtype
        self.batch = batch
        self.follow_original = follow_original
        self.many = many  # the caller will use `Block.run_many`
        self.keep_loaded = keep_loaded  # blocks stay usable (but for their `states`) until `release`
        self.states_device = torch.device("cpu") if states_on_host else device

    def __iter__(self) -> Iterator[Block]:
        keep_large_tensors_out_of_the_heap()
        skeleton = self.skeleton
        states, arguments, broadcasts = self._embed()
        original_states = list(states) if self.follow_original else None
        for index in range(len(skeleton.block_names)):
            block = self._open(index, states, arguments[index], broadcasts=broadcasts)
            block.original_states = original_states
            try:
                yield block
                if index + 1 < len(skeleton.block_names) or skeleton.head is not None:
                    self._advance(block, states)
                    if original_states is not None:
                        with block.with_original_weights():
                            self._advance(block, original_states)
                block.original_weights.clear()
            finally:
                if not self.keep_loaded:
                    self._free(index)
                    give_back_freed_memory()
        if skeleton.head is not None:
            yield from self._head(skeleton.head, states, original_states)

    def backwards(self, entering: Callable[[int], list[torch.Tensor]]) -> Iterator[Block]:
        """The original blocks from the last to the first; `entering` knows the states that enter all but block 0."""
        keep_large_tensors_out_of_the_heap()
        embedded, arguments, broadcasts = self._embed()
        for index in reversed(range(len(self.skeleton.block_names))):
            states = entering(index) if index else embedded
            block = self._open(index, states, arguments[index], broadcasts=broadcasts)
            try:
                yield block
                block.original_weights.clear()
            finally:
                self._free(index)
                give_back_freed_memory()

    def _open(
        self, index: int, states: list[torch.Tensor], arguments: dict[int, Arguments], *, broadcasts: bool
    ) -> Block:
        name, module = self.skeleton.block_names[index], self.skeleton.block(index)
        self._load(module, self.skeleton.block_tensors(index), prefix=name + ".")
        block = Block(
            index=index,
            name=name,
            module=module,
            linears=self.skeleton.block_linears(index),
            states=states,
            original_states=None,
            original_weights={},
            device=self.device,
            call=_Caller(module, arguments, name, broadcasts=broadcasts),
            broadcasts=broadcasts,
            ranks=self.ranks,
        )
        block.original_weights = {spec.name: block.linear(spec).weight.data for spec in block.linears}
        return block

    def _head(
        self, head: LinearSpec, states: list[torch.Tensor], original_states: list[torch.Tensor] | None
    ) -> Iterator[Block]:
        with self.around() as around, torch.no_grad():
            around.embed(self.windows[:1].to(self.device))
            around.logits(states[0][:1, :1].to(self.device))  # reads the weights of norm and head
            block = Block(
                index=head.block,
                name="",
                module=self.skeleton.model,
                linears=[head],
                states=states,
                original_states=original_states,
                original_weights={},
                device=self.device,
                call=around.logits,
                broadcasts=True,
                ranks=self.ranks,
                is_head=True,
            )
            block.original_weights[head.name] = block.linear(head).weight.data
            yield block
            block.original_weights.clear()
        give_back_freed_memory()

    def release(self) -> None:
        """Give up what `keep_loaded` kept."""
        for index in range(len(self.skeleton.block_names)):
            self._free(index)
        give_back_freed_memory()

    def _free(self, index: int) -> None:
        prefix = self.skeleton.block_names[index] + "."
        for name in self.skeleton.block_tensors(index):
            free_tensor(self.skeleton.block(index), name.removeprefix(prefix))

    def _advance(self, block: Block, states: list[torch.Tensor]) -> None:
        # In place, batch by batch: the states before and after a block never exist side by side.
        for position, output in enumerate(block.run(states)):
            states[position] = output.to(self.states_device)

    def _load(self, module: nn.Module, names: list[str], *, prefix: str) -> None:
        stored = self.skeleton.readable_names
        tensors = self.checkpoint.read((stored[name] for name in names), device=self.device, dtype=self.dtype)
        for name in names:
            set_tensor(module, name.removeprefix(prefix), tensors[stored[name]])
        for child in module.modules():
            for key, buffer in child._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    child._buffers[key] = buffer.to(self.device)

    @torch.no_grad()
    def _embed(self) -> tuple[list[torch.Tensor], list[dict[int, Arguments]], bool]:
        """States entering block 0, per block the other arguments by batch size, and whether those of one do for all."""
        states, broadcasts = [], False
        with self.around() as around:
            for start in range(0, len(self.windows), self.batch):
                ids = self.windows[start : start + self.batch].to(self.device)
                states.append(around.embed(ids).to(device=self.states_device, dtype=self.dtype))
            if self.many:
                one = self.windows[:1].to(self.device)
                around.embed(one)
                around.embed(one.expand(2, -1))
                broadcasts = all(known[1].broadcast_to(known[2]) for known in around.arguments)
        return states, around.arguments, broadcasts

    def around(self) -> Around:
        """The model with its blocks silenced, as a context: embedding side and head side."""
        return Around(self.skeleton, lambda module, names, prefix: self._load(module, names, prefix=prefix))


class _Caller:
    """Calls a block's module with the recorded arguments that fit the batch."""

    def __init__(self, module: nn.Module, arguments: dict[int, Arguments], name: str, *, broadcasts: bool) -> None:
        self.module, self.arguments, self.name, self.broadcasts = module, arguments, name, broadcasts

    def __call__(self, state: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        known = self.arguments
        rest = known[1] if self.broadcasts and len(state) not in known else known[len(state)]
        rest = rest if dtype is None else rest.cast(dtype)
        output = self.module(state, *rest.positional, **rest.named)
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape != state.shape:
            raise UnsupportedModelError(
                f"{self.name} turned states of shape {list(state.shape)} into {list(hidden.shape)}: "
                "blocks must keep the shape"
            )
        return hidden
