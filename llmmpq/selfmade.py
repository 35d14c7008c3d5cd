"""`--calib self`: calibration windows that the model writes, kept in the work folder batch by batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rich.filesize import decimal

from llmmpq.errors import CalibrationError
from llmmpq.model.sampling import WINDOWS_PER_BATCH, sample_windows
from llmmpq.model.tokens import SELF_SOURCE, TokenWindows, digest_of_ids
from llmmpq.progress import Progress
from llmmpq.reading import WEIGHTS_SHARE, Reader, free_nbytes
from llmmpq.session import Session
from llmmpq.workdir import WorkDir


def write_windows(
    session: Session, work: WorkDir, model_digests: Mapping[str, str], progress: Progress
) -> TokenWindows:
    """As many windows as calibration and probe ask for; by the first process, for all."""
    recipe, longest = session.recipe, session.max_window()
    window = recipe.calibration.window if longest is None else min(recipe.calibration.window, longest)
    num_windows = sum(max(1, num // window) for num in (recipe.calibration.tokens, recipe.measurement.tokens))
    inputs = {
        "model": dict(model_digests),
        "window": window,
        "seed": recipe.calibration.seed,
        "numerics": {**session.numerics(), "batch": None},
    }
    stage = work.stage("sample", inputs)

    def sample() -> torch.Tensor:
        known = {index: read for index in _batches(num_windows) if (read := stage.read(f"windows-{index:04d}"))}
        missing = [index for index in _batches(num_windows) if index not in known]
        parts = {index: tensors["ids"] for index, (_, tensors) in known.items()}
        if missing:
            model = _open(session).load()
            assert model is not None
            with progress.task(
                "write calibration text", len(missing) * WINDOWS_PER_BATCH * window, "tokens"
            ) as advance:
                for index in missing:
                    parts[index] = sample_windows(
                        model,
                        num_windows=WINDOWS_PER_BATCH,
                        window=window,
                        seed=recipe.calibration.seed,
                        batch_index=index,
                        on_tokens=advance,
                    )
                    stage.write(f"windows-{index:04d}", {}, {"ids": parts[index]})
        return torch.cat([parts[index] for index in sorted(parts)])[:num_windows]

    ids = session.ranks.from_first(sample)
    asked, notes = recipe.calibration.window, []
    if window < asked:
        notes.append(f"The calibration window was lowered from {asked} to {window}, the most the model reads.")
    return TokenWindows(ids=ids, source=SELF_SOURCE, digest=digest_of_ids(ids), notes=tuple(notes))


def check_self_calibration(session: Session) -> None:
    """An error where the model does not fit: it cannot be streamed once for every token that it writes."""
    if session.recipe.calibration.source == SELF_SOURCE:
        _open(session)


def _batches(num_windows: int) -> range:
    return range(-(-num_windows // WINDOWS_PER_BATCH))


def _open(session: Session) -> Reader:
    reader = Reader(str(session.folder), device=str(session.device), dtype=session.recipe.run.dtype)
    if not reader.is_held:
        free = free_nbytes(session.device)
        raise CalibrationError(
            f"calibration.source is self, and the model is too large to write text here: its weights need "
            f"{decimal(reader.needed_nbytes())}, {decimal(free)} of memory are free, of which {WEIGHTS_SHARE:.0%} "
            "may be used. Use --calib builtin, or a text of your own"
        )
    return reader
