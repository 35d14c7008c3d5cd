"""One piece of work on one model: the opened session, its locked work folder, its tokens, and who is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmmpq import __version__
from llmmpq.digest import cached_digests, digest_of
from llmmpq.errors import CheckpointError
from llmmpq.model.tokens import SELF_SOURCE, TokenWindows
from llmmpq.progress import Progress
from llmmpq.rotating import Rotation, rotate
from llmmpq.selfmade import write_windows
from llmmpq.session import Session, Tokens
from llmmpq.workdir import DEFAULT_WORK_FOLDER, WorkDir


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every stage that does long work needs."""

    session: Session
    work: WorkDir
    model_digests: Mapping[str, str]
    tokens: Tokens
    progress: Progress
    rotation: Rotation | None = None  # the session reads weights rotated by it
    done: set[tuple[str, int]] = field(default_factory=set)  # stages and blocks quantized by this very run

    @property
    def weights_digests(self) -> dict[str, str]:
        """What decides the weights that the session reads."""
        rotated = {} if self.rotation is None else {"rotation": self.rotation.digest}
        return {**self.model_digests, **rotated}

    def provenance(self) -> dict[str, Any]:
        session, calibration, probe = self.session, self.tokens.calibration, self.tokens.probe
        return {
            "llmmpq": __version__,
            "model": session.recipe.model,
            "revision": session.recipe.revision,
            "model_files": dict(sorted(self.model_digests.items())),
            "calibration": {
                "source": calibration.source,
                "num_tokens": calibration.num_tokens,
                "window": calibration.ids.shape[1],
                "digest": calibration.digest,
            },
            "probe": {"num_tokens": probe.num_tokens, "digest": probe.digest},
            **({} if self.rotation is None else {"rotation": self.rotation.digest}),
            "numerics": session.numerics(),
        }


@contextmanager
def open_job(
    session: Session,
    *,
    out: Path,
    work_dir: Path | None,
    progress: Progress,
    is_done: Callable[[Job], bool] = lambda job: False,
) -> Iterator[Job]:
    """Locks the work folder until the context ends. What takes one process is done by the first for all.

    `is_done` is asked before any long work; it may refuse the job, and of one that is done no weights are read.
    """
    root = work_dir or out.resolve().parent / DEFAULT_WORK_FOLDER
    ranks = session.ranks
    model_digests = ranks.from_first(lambda: _model_digests(session, root, progress))
    name = Path(session.recipe.model or "model").name
    with WorkDir(root / f"{name}-{digest_of(model_digests)[:12]}", ranks=ranks) as work:
        written = None
        if session.recipe.calibration.source == SELF_SOURCE:
            written = write_windows(session, work, model_digests, progress)
        tokens = ranks.from_first(lambda: _checked_tokens(session, written))
        for note in tokens.notes:
            progress.note(note)
        recipe = session.recipe.override({"calibration.source": tokens.calibration.source}, source="resolved recipe")
        job = Job(
            session=dataclasses.replace(session, recipe=recipe),
            work=work,
            model_digests=model_digests,
            tokens=tokens,
            progress=progress,
        )
        if not is_done(job) and recipe.quantizer.rotate:
            rotation = rotate(job.session, work, model_digests, tokens.calibration.ids, progress)
            job = dataclasses.replace(job, session=rotation.session, rotation=rotation)
        yield job


def _model_digests(session: Session, root: Path, progress: Progress) -> dict[str, str]:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot use the work folder {root}: {error.strerror}. Give --work-dir.") from None
    files = session.source_files()
    with progress.task("hash the model's files", sum(path.stat().st_size for path in files), "bytes") as advance:
        try:
            return cached_digests(files, root / "file-hashes.json", advance=advance)
        except OSError as error:
            raise CheckpointError(f"cannot write in the work folder {root}: {error.strerror}") from None


def _checked_tokens(session: Session, written: TokenWindows | None) -> Tokens:
    # Tensors outside the blocks are read last, by the writer: damaged ones must be found before the long run.
    session.checkpoint.check_finite(session.skeleton.stored_names[tensor.name] for tensor in session.skeleton.kept)
    return session.tokens(written)
