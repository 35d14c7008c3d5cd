"""How much each direction of an output matters to the model's output: of a block's, and of each of its linears'.

In: the unchanged blocks and some calibration windows. Out: for each block G = E[g g'], where g is the gradient, by one
token's output of the block, of sum_t log p(y_t): p are the model's own next-token probabilities at each position t of
the window, y_t is drawn from them. As this is the Fisher information, an error e of that output costs about e'Ge / 2
in KL, as far as the errors of different tokens do not meet. With the text's own tokens in place of draws it would be no
curvature of the KL (Kunstner et al., 2019). The same of the output of every linear, in pieces where it is wide.

One pass forward keeps the states between blocks. Norm and head give the gradients by the last block's output, a few
tokens at a time; then the blocks come again from the last to the first, and each turns the gradients by its output into
those by its input: one forward, and one pass backward for each draw. One block is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from llmmpq.measure.moments import Moment
from llmmpq.measure.perturb import CHUNK_NUM_LOGITS
from llmmpq.measure.states import StateStore
from llmmpq.model.around import Around
from llmmpq.model.stream import Block, BlockStream
from llmmpq.quantize.shape import Piece, share_rows

# Legend: T tokens, D hidden, V vocabulary, S draws.
TOKENS, TOKENS_PER_CHANNEL = 8192, 4  # at least so many, and for so many hidden channels: docs/log.md
NUM_DRAWS = 2  # per token: another costs one more pass backward, another token also the passes forward
COPIES_OF_LOGITS = 8  # in float32: the logits, their probabilities, in float64 their running sum, and gradients
# Of G in what tuning and the sharing of errors minimise. The rest is the plain error: G is known from few tokens, and
# least where it is small.
METRIC_SHARE = 0.9

# A linear of up to so many outputs has one G (4 * outputs^2 bytes), one of up to twice as many two. Of a wider one,
# which is the way into an MLP, little is lost with smaller pieces: docs/log.md.
PIECE, PIECE_OF_WIDE = 4096, 1024


@dataclass(frozen=True, kw_only=True)
class BlockMetric:
    """G of a block's output, and of the outputs of its linears, by name: pieces of consecutive outputs.

    A linear that no gradient reaches is absent.
    """

    output_DD: torch.Tensor | None  # None where no gradient is a number
    linears: Mapping[str, list[torch.Tensor]]


SaveMetric = Callable[[int, BlockMetric], None]


def measure_output_metric(
    stream: BlockStream, store: StateStore, *, on_pass: Callable[[], None], save: SaveMetric
) -> None:
    """`save` is called for each block, the last one first. One window per batch, in `store` a row per block."""
    windows = range(len(stream.windows))
    _keep_outputs(stream, store, on_pass)
    gradients = [gradient.to(stream.states_device) for gradient in _by_last_output(stream, store, on_pass)]
    for block in stream.backwards(lambda index: [store.read(window, _row(index - 1)) for window in windows]):
        output_DD = _second_moment(stream, block.index, gradients)
        linears = _OfLinears(block, stream)
        for window, state in enumerate(block.states):
            found = pull_back(block, state, gradients[window], on_linear=linears.add)
            gradients[window] = found.to(stream.states_device)
            on_pass()
        save(block.index, BlockMetric(output_DD=output_DD, linears=linears.means()))


def num_tokens(hidden_size: int) -> int:
    """Of the calibration text, where it has as many."""
    return max(TOKENS, TOKENS_PER_CHANNEL * hidden_size)


def piece_sizes(num_outputs: int) -> list[int]:
    """Of how many outputs each G of a linear is."""
    size = PIECE if num_outputs <= 2 * PIECE else PIECE_OF_WIDE
    num_pieces = -(-num_outputs // size)
    return [len(outputs) for outputs in torch.arange(num_outputs).tensor_split(num_pieces)]


class _OfLinears:
    """Second moments of the gradients by what the linears of a block give, piece by piece."""

    def __init__(self, block: Block, stream: BlockStream) -> None:
        self.ranks, self.sizes = stream.ranks, {spec.name: piece_sizes(spec.shape[0]) for spec in block.linears}
        self.moments = {
            name: [Moment(size, device=stream.device, ranks=stream.ranks) for size in sizes]
            for name, sizes in self.sizes.items()
        }

    def add(self, name: str, gradient: torch.Tensor) -> None:
        rows = gradient.flatten(0, -2)
        if not bool(torch.isfinite(rows).all()):  # of a token whose gradient is none, no piece has anything
            rows = rows[torch.isfinite(rows).all(dim=1)]
        for moment, piece in zip(self.moments[name], rows.split(self.sizes[name], dim=-1), strict=True):
            moment.add(piece)

    def means(self) -> dict[str, list[torch.Tensor]]:
        """Without the linears of which no process has seen a gradient."""
        found = {}
        for name in list(self.moments):
            moments = self.moments.pop(name)
            num_rows, _ = self.ranks.sum_numbers(moments[0].num_rows, 0)
            if num_rows:
                found[name] = [moment.means(f"the output metric of {name}")[0] for moment in moments]
        return found


def num_passes(num_blocks: int, num_windows: int) -> int:
    """How often `on_pass` is called: forward, head, backward."""
    return (2 * num_blocks + 1) * num_windows


def mixed_metric(metric_DD: torch.Tensor) -> torch.Tensor:
    """What tuning measures errors in: mostly G, scaled so that its mean eigenvalue is that of the identity, 1."""
    identity_DD = torch.eye(len(metric_DD), device=metric_DD.device)
    mean = float(metric_DD.diagonal().double().mean())
    if mean == 0:  # no output depends on the block
        return identity_DD
    return identity_DD.mul_(1 - METRIC_SHARE).add_(metric_DD, alpha=METRIC_SHARE / mean)


def row_pieces(metric: BlockMetric | None, name: str, device: torch.device) -> list[Piece] | None:
    """How the rows of a linear share their errors; None where that is not known."""
    found = None if metric is None else metric.linears.get(name)
    return None if found is None else share_rows([mixed_metric(piece.to(device)) for piece in found])


def pull_back(
    block: Block, state: torch.Tensor, gradients_STD: torch.Tensor, *, on_linear: Callable[[str, torch.Tensor], None]
) -> torch.Tensor:
    """Gradients by the block's input from those by its output, for one sequence; `on_linear` sees those by linears."""
    state = state.detach().to(block.device).requires_grad_()
    outputs: list[tuple[str, torch.Tensor]] = []

    def keep(name: str, output: torch.Tensor) -> None:
        if output.requires_grad:  # not where the block cuts the gradient itself
            outputs.append((name, output))

    with torch.enable_grad(), block.with_outputs(keep):
        result = block.call(state)
    last, by_state = len(gradients_STD) - 1, []
    for draw, gradient_TD in enumerate(gradients_STD):
        first, *others = torch.autograd.grad(
            result,
            [state, *(output for _, output in outputs)],
            gradient_TD[None].to(result),
            retain_graph=draw < last,
            allow_unused=True,
        )
        by_state.append(first)
        for (name, _), gradient in zip(outputs, others, strict=True):
            if gradient is not None:
                on_linear(name, gradient)
        del others
    return torch.cat(by_state)


def draw_tokens(logits_TV: torch.Tensor, uniform_ST: torch.Tensor) -> torch.Tensor:
    """Next tokens [S, T]: where the running sum of the probabilities passes the uniform number."""
    running_TV = logits_TV.double().softmax(-1).cumsum(-1)
    wanted_TS = uniform_ST.t().to(running_TV) * running_TV[:, -1:]
    return torch.searchsorted(running_TV, wanted_TS.contiguous(), right=True).clamp_(max=logits_TV.shape[1] - 1).t()


def _keep_outputs(stream: BlockStream, store: StateStore, on_pass: Callable[[], None]) -> None:
    last = len(stream.skeleton.block_names) - 1
    for block in stream:
        if block.index > 0:
            for window, state in enumerate(block.states):
                store.write(window, _row(block.index - 1), state)
        if block.index == last:
            for window, output in enumerate(block.run()):
                store.write(window, _row(last), output)
        for _ in block.states:
            on_pass()
        if block.index == last:  # a head that is to be quantized would follow as one more block
            break


def _by_last_output(stream: BlockStream, store: StateStore, on_pass: Callable[[], None]) -> Iterator[torch.Tensor]:
    """For each window the gradients [S, T, D] by the output of the last block."""
    row = _row(len(stream.skeleton.block_names) - 1)
    with stream.around() as around:
        with torch.no_grad():
            around.embed(stream.windows[:1].to(stream.device))
        for window, ids in enumerate(stream.windows):
            # A seed for each window by its place among all windows, whoever takes it.
            generator = torch.Generator().manual_seed(stream.ranks.rank + stream.ranks.num * window)
            uniform_ST = torch.rand(NUM_DRAWS, len(ids), generator=generator, dtype=torch.float64)
            step = max(1, CHUNK_NUM_LOGITS // (COPIES_OF_LOGITS * _vocabulary(stream)))
            chunks = (slice(start, start + step) for start in range(0, len(ids), step))
            found = [_through_head(around, store.read(window, row, some), uniform_ST[:, some]) for some in chunks]
            yield torch.cat(found, dim=1)
            on_pass()


def _through_head(around: Around, states_1TD: torch.Tensor, uniform_ST: torch.Tensor) -> torch.Tensor:
    states_1TD = states_1TD.detach().requires_grad_()
    with torch.enable_grad():
        logits_1TV = around.logits(states_1TD)
    logits_TV = logits_1TV[0].detach().float()
    p_TV = logits_TV.softmax(-1)
    found: list[torch.Tensor] = []
    for draw, tokens_T in enumerate(draw_tokens(logits_TV, uniform_ST)):
        # Of log p(y) by the logits: 1 at y, less the probabilities.
        change_TV = (-p_TV).scatter_add_(1, tokens_T[:, None], torch.ones_like(p_TV[:, :1]))
        keep = draw + 1 < len(uniform_ST)
        found += torch.autograd.grad(logits_1TV, states_1TD, change_TV[None].to(logits_1TV), retain_graph=keep)
    return torch.cat(found)


def _second_moment(stream: BlockStream, index: int, gradients: list[torch.Tensor]) -> torch.Tensor | None:
    """E[g g'] over tokens and draws of all processes. Gradients with NaN or inf are left out."""
    moment = Moment(gradients[0].shape[-1], device=stream.device, ranks=stream.ranks)
    for gradient_STD in gradients:
        moment.add(gradient_STD.to(stream.device))
    num_rows, _ = stream.ranks.sum_numbers(moment.num_rows, 0)
    return moment.means(f"the output metric of {stream.skeleton.block_names[index]}")[0] if num_rows else None


def _row(index: int) -> slice:
    return slice(index, index + 1)


def _vocabulary(stream: BlockStream) -> int:
    return int(stream.skeleton.model.config.get_text_config().vocab_size)
