"""Tasks of EleutherAI's lm-eval (0.4.13) on a model folder, called as its own command line calls it.

The model goes through lm-eval's `hf` class by the name of its folder, with lm-eval's defaults for whatever is not
given, so that equal arguments give equal figures either way; transformers must already know the folder's format.
Handing over a loaded model was rejected: lm-eval then names the results CUSTOM and takes another way to the device.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmmpq.errors import CalibrationError, CheckpointError, RecipeError

MISSING = "lm-eval is missing, which --tasks needs: pip install 'llmmpq[eval]'"
MAX_SUGGESTIONS = 5
BATCH_SIZE = r"(auto:)?0*[1-9][0-9]*|auto"


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What lm-eval is asked for; None leaves it to lm-eval."""

    tasks: Sequence[str]
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: str | None = None
    include_path: Path | None = None
    out: Path | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        """lm-eval answers these with tracebacks, or takes them for something else, once the model is loaded."""
        limit, batch_size = self.limit, self.batch_size
        if limit is not None and not (limit > 0 and (limit < 1 or float(limit).is_integer())):
            raise RecipeError(
                f"--limit is {limit:g}; allowed: a whole number of examples of at least 1, or a share between 0 and 1"
            )
        if batch_size is not None and not re.fullmatch(BATCH_SIZE, batch_size):
            raise RecipeError(f"--batch-size is {batch_size!r}; allowed: a whole number of at least 1, auto, or auto:N")


def run_harness(name: str, folder: Path, settings: TaskSettings, *, device: str, dtype: str) -> dict[str, Any]:
    """The figures of each task; `name` is what the model is called in files that are saved."""
    try:
        import lm_eval
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.utils import sanitize_model_name
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("lm_eval", "datasets"):
            raise
        raise RecipeError(MISSING) from None
    model_args = {"pretrained": str(folder), "dtype": dtype}
    with _quieted(quiet=settings.quiet):
        # Loaded twice, here to fail before the model is: a name, a file or a data set that is not there.
        manager = _task_manager(settings, model_args)
        tracker = EvaluationTracker(output_path=None if settings.out is None else str(settings.out))
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args=model_args,
            tasks=list(settings.tasks),
            num_fewshot=settings.num_fewshot,
            batch_size=settings.batch_size,
            device=device,
            limit=settings.limit,
            log_samples=False,
            evaluation_tracker=tracker,
            fewshot_as_multiturn=False,  # the command line's default; the function's own needs a chat template
            task_manager=manager,
        )
    files: list[str] = []
    if settings.out is not None:
        tracker.general_config_tracker.model_name = name
        tracker.general_config_tracker.model_name_sanitized = sanitize_model_name(name)
        files = [str(_save(tracker, results, settings.out))]
    return {
        "model": name,
        "results": {task: dict(_figures(found)) for task, found in results["results"].items()},
        "num_examples": {task: num["effective"] for task, num in results["n-samples"].items()},
        "num_fewshot": {task: num for task, num in results["n-shot"].items() if task in results["n-samples"]},
        "lm_eval": lm_eval.__version__,
        "files": files,
    }


def _figures(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """lm-eval's `acc,none` and `acc_stderr,none` without the name of the filter that does nothing."""
    for key, value in found.items():
        if "," in key and isinstance(value, int | float):
            yield key.removesuffix(",none"), value


def _task_manager(settings: TaskSettings, model_args: Mapping[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    include = settings.include_path
    if include is not None and not include.is_dir():
        raise RecipeError(f"--include-path {include} is not a folder")
    # An index of all of lm-eval's tasks takes seconds: 14 thousand files. Own tasks may do without.
    own = {} if include is None else {"include_path": str(include)}
    manager = TaskManager(**own, include_defaults=False, metadata=dict(model_args)) if own else None
    if manager is None or not set(settings.tasks) <= set(manager.all_subtasks):
        manager = TaskManager(**own, metadata=dict(model_args))
    for task in settings.tasks:
        if task not in manager.all_tasks:
            like = [name for name in manager.all_tasks if task and task.lower() in name.lower()][:MAX_SUGGESTIONS]
            hint = f", such as {', '.join(like)}" if like else ""
            raise RecipeError(
                f"--tasks names {task!r}, which lm-eval does not know; allowed: what `lm-eval ls tasks` lists{hint}, "
                "and the tasks in --include-path"
            )
    try:
        manager.load(list(settings.tasks))
    except Exception as error:  # `datasets` raises what its many back ends raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CalibrationError(
            f"the data of --tasks {','.join(settings.tasks)} cannot be loaded ({type(error).__name__}: {reason}). "
            "Check the network and HF_HUB_OFFLINE, or take tasks with files of their own, as those in eval/tasks"
        ) from error
    return manager


def _save(tracker: Any, results: dict[str, Any], out: Path) -> Path:
    before = set(out.rglob("results_*.json"))
    tracker.save_results_aggregated(results=results, samples=None)  # only warns when it cannot
    written = set(out.rglob("results_*.json")) - before
    if not written:
        raise CheckpointError(f"lm-eval could not write its results into --out {out}: is it a folder with room?")
    return written.pop()


@contextmanager
def _quieted(*, quiet: bool) -> Iterator[None]:
    """lm-eval has bars and warnings of its own; with --quiet nobody wants them."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()) if quiet else nullcontext():
            # lm-eval hands transformers the model's own quantization_config a second time.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            yield
    finally:
        logger.setLevel(level)
