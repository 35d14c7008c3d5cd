"""`llmmpq` in processes of their own that need not import torch again: copies of one that has.

`python -m llmmpq` takes five seconds of a core before it does anything; what is tested here is not how it starts.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmmpq.cli import main
from llmmpq.quantize import shape

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["llmmpq.pipeline", "transformers.models.llama.modeling_llama", __name__])


class Process:
    """The part of `subprocess.Popen` that tests use, stdout and stderr being caught."""

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        environment: Mapping[str, str] | None = None,
        largest_file: int | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._said = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        said = list(map(str, self._said))
        given = (list(map(str, arguments)), dict(environment or {}), largest_file, said, shape.NUM_PARTS)
        self._process = _CONTEXT.Process(target=_run, args=given, daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit code, or the signal that ended it, negative."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, str]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self._read()}")
        return self._read()

    def _read(self) -> tuple[str, str]:
        stdout, stderr = (path.read_text(encoding="utf-8") if path.exists() else "" for path in self._said)
        return stdout, stderr


def wait_for(folder: Path, pattern: str, process: Process, timeout: float) -> None:
    """Until a file of that name is there."""
    deadline = time.monotonic() + timeout
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate(timeout)
        assert time.monotonic() < deadline
        time.sleep(0.002)


def _run(
    arguments: list[str], environment: dict[str, str], largest_file: int | None, said: list[str], num_parts: int
) -> None:
    os.environ.update(environment)
    shape.NUM_PARTS = num_parts  # what the tests of this process have, for the same bytes
    for number, path in enumerate(said, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(main(arguments))
