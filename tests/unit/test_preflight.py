"""What `check` foresees: time, disks, an output folder that is taken."""

from types import SimpleNamespace

import pytest
import torch

from llmmpq import preflight
from llmmpq.errors import CheckpointError
from llmmpq.pipeline import check
from llmmpq.preflight import check_disks
from llmmpq.recipe import Recipe
from llmmpq.session import open_session
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama") / "model", dtype=torch.bfloat16)


def recipe_for(model, **changes):
    recipe = Recipe().override({"model": str(model), "budget.avg_bits": 5.0, "quantizer.group_size": 28})
    return recipe.override({key.replace("__", "."): value for key, value in changes.items()})


# Disks


@pytest.fixture
def disks(tmp_path, monkeypatch):
    """Two file systems by their folders, with as many free bytes as a test says."""
    free = {}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()

    def name_of(folder):
        return folder.resolve().relative_to(tmp_path).parts[0]

    monkeypatch.setattr(preflight, "_file_system", name_of)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[name_of(folder)]))
    return free


@pytest.mark.parametrize(
    ("first", "second", "work", "says"),
    [
        (150, 0, "first/work", None),
        (149, 10**9, "first/work", "150 bytes are needed for the quantized model and the journal .* 149 are free"),
        (100, 50, "second/deep/work", None),
        (99, 50, "second/work", "100 bytes are needed for the quantized model, 99 are free.*another --out"),
        (100, 49, "second/work", "second/work: 50 bytes are needed for the journal.* 49 are free.*another --work-dir"),
    ],
)
def test_each_disk_must_hold_what_is_written_to_it(first, second, work, says, disks, tmp_path):
    disks |= {"first": first, "second": second}

    def look():
        check_disks(tmp_path / "first" / "out", tmp_path / work, output_nbytes=100, journal_nbytes=50)

    if says is None:
        look()
    else:
        with pytest.raises(CheckpointError, match=says):
            look()


def test_check_looks_at_both_disks(model, disks, tmp_path):
    disks |= {"first": 10**9, "second": 1000}
    found = check(recipe_for(model), out=tmp_path / "first" / "out", work_dir=tmp_path / "second" / "work")
    assert found["disk_nbytes"] == found["output_nbytes"]
    assert found["work_disk_nbytes"] == found["quantized_nbytes"]
    assert (found["disk_free_nbytes"], found["work_disk_free_nbytes"]) == (10**9, 1000)
    (problem,) = found["problems"]
    assert "for the journal of finished blocks, 1,000 are free" in problem


def test_check_adds_what_one_disk_must_hold(model, disks, tmp_path):
    disks |= {"first": 10**9}
    found = check(recipe_for(model), out=tmp_path / "first" / "out")
    assert found["disk_nbytes"] == found["output_nbytes"] + found["quantized_nbytes"]
    assert found["work_disk_nbytes"] is None
    assert found["problems"] == []


# Time


def test_the_time_is_the_multiplications_over_the_rate(model, monkeypatch):
    seconds = []
    for rate in (1e9, 2e9):
        monkeypatch.setattr(preflight, "_multiplications_per_second", lambda device, rate=rate: rate)
        seconds.append(check(recipe_for(model, calibration__tokens=2**20))["seconds"])
    assert seconds[0] - 5 == pytest.approx(2 * (seconds[1] - 5), abs=1)


@pytest.fixture
def events(monkeypatch):
    """A GPU in name only: what is computed, waited for and timed is written down."""
    seen = []

    class Matrix:
        def __matmul__(self, other):
            seen.append("product")

    def clock():
        seen.append("clock")
        return float(len(seen))

    monkeypatch.setattr(preflight.torch, "ones", lambda *shape, device: Matrix())
    monkeypatch.setattr(preflight.torch.cuda, "synchronize", lambda device: seen.append("wait"))
    monkeypatch.setattr(preflight.time, "perf_counter", clock)
    return seen


def test_the_rate_of_a_gpu_is_timed_around_finished_work(events):
    preflight._multiplications_per_second(torch.device("cuda", 0))
    assert events == ["product", "wait", "clock", *["product"] * 4, "wait", "clock"]


def test_a_cpu_is_not_waited_for(events):
    preflight._multiplications_per_second(CPU)
    assert "wait" not in events


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_time_is_estimated_on_every_device(device, model, monkeypatch):
    session = session_on(device, model)
    monkeypatch.setattr(preflight, "_multiplications_per_second", lambda device: 1e9)
    assert preflight._estimate_seconds(session) > 5


def test_a_gpu_without_room_for_the_probe_gives_no_time(model, monkeypatch):
    def full(device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(preflight, "_multiplications_per_second", full)
    assert preflight._estimate_seconds(session_on("cuda:0", model)) is None


def session_on(device, model):
    """What a session on this device would be, without the device."""
    session = open_session(recipe_for(model))
    return SimpleNamespace(device=torch.device(device), recipe=session.recipe, skeleton=session.skeleton)


@pytest.mark.gpu
def test_the_time_on_a_gpu(model):
    seconds = check(recipe_for(model, run__device="cuda"))["seconds"]
    assert 5 < seconds < 600
