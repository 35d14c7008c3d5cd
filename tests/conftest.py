"""Fixes threads, network use and Triton's interpreter before anything imports their libraries.

Skips `gpu` tests without a GPU.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell starts its background jobs with SIGINT ignored, and the processes that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable, Iterator
from pathlib import Path

if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by whichever test that is

import pytest

from tests import browser


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def chromium() -> Iterator[browser.Browser]:
    """A browser, started once for all tests of a process."""
    program = browser.find_chromium()
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(browser.NAMES)} is installed")
    with browser.running(program) as running:
        yield running


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family, to read: saved once for all tests of a process."""
    from tests import tiny

    saved: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in saved:
            saved[name] = tiny.save(name, tmp_path_factory.mktemp(name))
        return saved[name]

    return folder
