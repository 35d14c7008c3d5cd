"""`--rotate`: the rotation of a session's residual stream, learned once for its weights and kept in the work folder.

Two passes over the blocks. The first, over the original, finds which weights a rotation changes and notes the states
between the blocks; the second, when the rotation is learned, goes through the rotated model and compares: where its
states are not the original's, turned, or its predictions others, the model is refused before anything is measured. All
later stages read rotated weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, reduce
from operator import or_
from typing import Any

import torch

from llmmpq.errors import UnsupportedModelError
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.residual import Residual, residual_around, residual_of
from llmmpq.model.rotated import RotatedCheckpoint
from llmmpq.model.skeleton import build_skeleton
from llmmpq.model.stream import BlockStream
from llmmpq.progress import Progress
from llmmpq.quantize.rotation import STEPS, fourth_power, learn_rotation, random_rotation
from llmmpq.session import Session
from llmmpq.workdir import WorkDir

TOKENS = 64  # of one window, on which both models are compared
COPIES_IN_A_STEP = 3  # of a block's rows: turned, their third power, and one more on the way
COPIES_OF_ROTATION = 8
SAME = 1e-4  # of the largest number compared: float32 and its sums take up to a tenth of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """A session that reads rotated weights, and what there is to tell of the rotation."""

    session: Session
    digest: str
    summary: Mapping[str, Any]


def rotate(
    session: Session, work: WorkDir, model_digests: Mapping[str, str], ids: torch.Tensor, progress: Progress
) -> Rotation:
    """With several processes the first one learns, for all."""
    inputs = {
        "model": dict(model_digests),
        "seed": session.recipe.calibration.seed,
        "numerics": {**session.numerics(), "batch": None, "dtype": None},
    }
    stage = work.stage("rotation", inputs)

    def learned() -> tuple[dict[str, Any], torch.Tensor]:
        known = stage.read("rotation")
        if known is not None:
            return known[0], known[1]["rotation"]
        notes, rotation_DD = _learn(session, ids[:1, :TOKENS], progress)
        stage.write("rotation", notes, {"rotation": rotation_DD})
        return notes, rotation_DD

    notes, rotation_DD = session.ranks.from_first(learned)
    skeleton = session.skeleton
    kept = [skeleton.stored_names[tensor.name] for tensor in skeleton.kept]
    checkpoint = RotatedCheckpoint(
        session.checkpoint,
        Residual.from_json(notes["residual"]).renamed(skeleton.stored_names),
        rotation_DD,
        device=session.device,
        rounded=kept,
    )
    checkpoint.check_finite(kept)  # they are read last, by the writer: what their dtype cannot hold is found now
    return Rotation(
        session=dataclasses.replace(session, checkpoint=checkpoint),
        digest=hashlib.sha256(rotation_DD.numpy().tobytes()).hexdigest(),
        summary=notes["summary"],
    )


def _learn(session: Session, ids: torch.Tensor, progress: Progress) -> tuple[dict[str, Any], torch.Tensor]:
    # Linears that stay at 16 bits meet the stream too: in this skeleton none is kept.
    skeleton = build_skeleton(session.folder, session.checkpoint, untie=True)
    original = BlockStream(skeleton, session.checkpoint, ids, device=session.device, dtype=torch.float32)
    num_blocks, seed = len(skeleton.block_names), session.recipe.calibration.seed
    residuals: list[Residual] = []
    states: list[torch.Tensor] = []
    with progress.task("find the residual stream", num_blocks, "blocks") as advance:
        for block in original:
            states.append(block.states[0].clone())
            residuals.append(residual_of(block))
            if block.index + 1 == num_blocks:
                states += block.run()
            advance(1)
    with original.around() as around, torch.no_grad():
        around.embed(ids.to(session.device))
        logits = around.logits(states[-1])
        residual_outside = residual_around(around, states[-1])
    stored = [residual.renamed(skeleton.stored_names) for residual in residuals]
    residual = reduce(or_, [*residuals, residual_outside])

    def rows_of(index: int) -> torch.Tensor:
        return torch.cat(list(_rows(session.checkpoint, stored[index], session.device)))

    size = states[0].shape[-1]
    some_rows = cache(rows_of) if _rows_may_wait(session) else rows_of
    with progress.task("learn the rotation", STEPS, "steps") as advance:
        rotation_DD = learn_rotation(
            some_rows, num_blocks, size, seed=seed, device=session.device, on_step=lambda: advance(1)
        )
    start_DD = random_rotation(size, seed=seed)
    summary = {
        what: statistics.mean(fourth_power(some_rows(index), matrix_DD) for index in range(num_blocks))
        for what, matrix_DD in (("fourth_power_at_random", start_DD), ("fourth_power", rotation_DD))
    }
    del some_rows  # what it kept in memory
    renamed = residual.renamed(skeleton.stored_names)
    turned = RotatedCheckpoint(session.checkpoint, renamed, rotation_DD, device=session.device)
    rotated = BlockStream(skeleton, turned, ids, device=session.device, dtype=torch.float32)
    with progress.task("compare the rotated model", num_blocks, "blocks") as advance:
        _compare(rotated, rotation_DD.to(session.device), states, logits, on_block=lambda: advance(1))
    return {"residual": residual.to_json(), "summary": summary}, rotation_DD


def rotation_nbytes(session: Session) -> int:
    """What the rotation takes in the work folder, and of memory wherever weights are read."""
    return 4 * session.hidden_size**2 if session.recipe.quantizer.rotate else 0


def learning_nbytes(session: Session) -> int:
    """Of memory, while the rotation is learned: weights in float32, and what a step makes of them."""
    if not session.recipe.quantizer.rotate:
        return 0
    blocks = _weights_by_block(session)
    waiting = sum(blocks) if _rows_may_wait(session) else max(blocks)
    return 4 * (waiting + COPIES_IN_A_STEP * max(blocks)) + COPIES_OF_ROTATION * rotation_nbytes(session)


def rotation_multiplications(session: Session, *, num_reads: int) -> float:
    """To learn it, and to turn all weights at each of so many reads."""
    if not session.recipe.quantizer.rotate:
        return 0.0
    blocks, size = _weights_by_block(session), session.hidden_size
    steps = [blocks[step % len(blocks)] for step in range(STEPS)]
    return float(2 * size * sum(steps) + 4 * size**3 * STEPS + num_reads * size * sum(blocks))


def _rows_may_wait(session: Session) -> bool:
    """Whether they are read once, for all steps; else again at every step."""
    return 4 * sum(_weights_by_block(session)) <= session.recipe.measurement.memory_nbytes


def _weights_by_block(session: Session) -> list[int]:
    """Of the matrices that may meet the stream, those that stay at 16 bits among them."""
    skeleton, size = session.skeleton, session.hidden_size
    entries = session.checkpoint.entries
    shapes = [
        [entries[skeleton.stored_names[name]].shape for name in skeleton.block_tensors(index)]
        for index in range(len(skeleton.block_names))
    ]
    return [sum(math.prod(shape) for shape in own if len(shape) == 2 and size in shape) for own in shapes]


def _rows(checkpoint: Checkpoint, residual: Residual, device: torch.device) -> Iterator[torch.Tensor]:
    """Of each matrix of a block that meets the stream, its vectors along the stream's channels."""
    for name, norm in residual.readers.items():
        read = checkpoint.read([name, norm], device=device, dtype=torch.float32)
        yield _at_mean_square_one(read[name] * (read[norm] + (1 - residual.norms[norm])))
    for name in residual.writers:
        if len(checkpoint.entries[name].shape) == 2:
            yield _at_mean_square_one(checkpoint.read([name], device=device, dtype=torch.float32)[name].t())


def _at_mean_square_one(rows_ND: torch.Tensor) -> torch.Tensor:
    return rows_ND / rows_ND.square().mean().sqrt().clamp_min(1e-30)


@torch.no_grad()
def _compare(
    rotated: BlockStream,
    rotation_DD: torch.Tensor,
    states: Sequence[torch.Tensor],
    logits: torch.Tensor,
    *,
    on_block: Callable[[], None],
) -> None:
    """An error where the rotated model is another one than that of these states and logits."""
    for block in rotated:
        _same(block.states[0] @ rotation_DD.t(), states[block.index], f"what enters {block.name}")
        if block.index + 1 == len(states) - 1:
            (last,) = block.run()
            _same(last @ rotation_DD.t(), states[-1], f"what leaves {block.name}")
        on_block()
    with rotated.around() as around:
        around.embed(rotated.windows.to(rotated.device))
        found = around.logits(last)
    size = max(1.0, float(logits.abs().max()))
    difference = float((found.log_softmax(dim=-1) - logits.log_softmax(dim=-1)).abs().max())
    if not difference <= SAME * size:
        _refuse("its predictions", difference, size)


def _same(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    size = float(wanted.abs().max())
    difference = float((found - wanted).abs().max())
    if not difference <= SAME * size:
        _refuse(what, difference, size)


def _refuse(what: str, difference: float, size: float) -> None:
    raise UnsupportedModelError(
        f"the model's residual stream cannot be rotated without changing it: {what} would differ by {difference:.2g}, "
        f"where {SAME * size:.2g} may be rounding. Leave out --rotate."
    )
