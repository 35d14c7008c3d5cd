"""What several test files open in the same way."""

import pytest

from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.skeleton import build_skeleton
from tests import tiny


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Skeleton and checkpoint of a tiny model by name, saved and opened once for each file of tests."""
    known = {}

    def open_(name: str = "llama"):
        if name not in known:
            folder = tiny.save(name, tmp_path_factory.mktemp(name))
            checkpoint = Checkpoint.open(folder)
            known[name] = build_skeleton(folder, checkpoint), checkpoint
        return known[name]

    return open_
