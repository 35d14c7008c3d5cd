"""The calibration text that all tiny models use; recipes may set torch's threads, which other tests must not see.

In `tests/e2e/forked.py` the processes that a test starts share what is set here.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from llmmpq.quantize import shape

SENTENCE = "The quick brown fox {n} jumps over the lazy dog; (pack my box) with five dozen liquor jugs!\n"


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "text.txt"
    path.write_text("".join(SENTENCE.format(n=n) for n in range(60)), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _few_parts() -> Iterator[None]:
    """Each part of the rows costs as much time as a tiny matrix: two have all that sixteen have but the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape, "NUM_PARTS", 2)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_bars_of_transformers() -> None:
    transformers.utils.logging.disable_progress_bar()
