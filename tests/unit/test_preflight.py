"""What `check` foresees: time, disks, an output folder that is taken."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from llmmpq import preflight
from llmmpq.errors import CheckpointError
from llmmpq.pipeline import check
from llmmpq.preflight import check_disks
from llmmpq.quantize import rotation
from llmmpq.recipe import Recipe
from llmmpq.rotating import learning_nbytes
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
    """Without shaped errors, which cost at several places, unless a test asks for them."""
    recipe = Recipe().override({"model": str(model), "budget.avg_bits": 5.0, "quantizer.group_size": 28})
    recipe = recipe.override({"quantizer.shape_errors": False})
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


def test_the_output_metric_is_counted_where_it_is_measured(model, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "_multiplications_per_second", lambda device: 1e6)
    cases = [
        {"tune": 1, "tune_metric": "plain"},
        {"tune": 1},
        {},
        {"shape_errors": True},
        {"shape_errors": True, "algorithm": "rtn"},
    ]
    plain, tuned, neither, shaped, rounded = (
        check(recipe_for(model, **{f"quantizer__{key}": value for key, value in case.items()}), out=tmp_path / "out")
        for case in cases
    )
    blocks = open_session(recipe_for(model)).skeleton.linears_by_block
    nbytes = 4 * sum(tiny.HIDDEN**2 + sum(spec.shape[0] ** 2 for spec in specs) for specs in blocks)
    assert tuned["disk_nbytes"] - plain["disk_nbytes"] == nbytes
    assert neither["disk_nbytes"] == plain["disk_nbytes"]
    assert tuned["ram_nbytes"] >= plain["ram_nbytes"]
    assert tuned["seconds"] > plain["seconds"] > neither["seconds"]
    assert shaped["disk_nbytes"] - neither["disk_nbytes"] == nbytes
    assert rounded["disk_nbytes"] == neither["disk_nbytes"]
    assert shaped["seconds"] > neither["seconds"]
    assert shaped["ram_nbytes"] > neither["ram_nbytes"]


# Time


def test_the_time_is_the_multiplications_over_the_rate(model, monkeypatch):
    seconds = []
    for rate in (1e9, 2e9):
        monkeypatch.setattr(preflight, "_multiplications_per_second", lambda device, rate=rate: rate)
        seconds.append(check(recipe_for(model, calibration__tokens=2**20))["seconds"])
    assert seconds[0] - 5 == pytest.approx(2 * (seconds[1] - 5), abs=1)


def test_sweeps_and_options_of_two_widths_take_time(model, monkeypatch):
    """A sweep counts as one and a half GPTQs, two widths as one each, beside the option's own."""
    monkeypatch.setattr(preflight, "_multiplications_per_second", lambda device: 1.0)

    def products(**changes):
        return (check(recipe_for(model, measurement__tokens=64, **changes))["seconds"] - 5) / 2

    blocks = open_session(recipe_for(model)).skeleton.linears_by_block
    weights = [sum(spec.num_weights for spec in specs) for specs in blocks]
    gptq = [sum(spec.num_weights * spec.shape[1] for spec in specs) for specs in blocks]
    swept, plain = (products(budget__bits=3, quantizer__sweeps=num) for num in (2, 0))
    assert swept - plain == 3 * sum(gptq)
    local = {"allocation__method": "local", "allocation__profiles": [2.5], "quantizer__sweeps": 0}
    mixed, plain = (products(**local, allocation__layer_only=only) for only in (False, True))
    candidates = 64 * sum(len(specs) * num for specs, num in zip(blocks, weights, strict=True))
    assert mixed - plain == (1 + 2) * sum(gptq) + candidates


def test_every_option_needs_memory(model):
    sessions = [
        open_session(recipe_for(model, allocation__layer_only=only, allocation__refine=1)) for only in (True, False)
    ]
    options = [[(spec, one) for spec in s.skeleton.linears for one in s.options()[spec.name]] for s in sessions]
    assert len(options[1]) > 1.4 * len(options[0])  # two profiles beside four widths
    waiting = [preflight._waiting_nbytes(session) for session in sessions]
    assert waiting == [len(own) * 4096 * tiny.HIDDEN * 4 for own in options]
    packed = [sum(one.nbytes(spec.shape) for spec, one in own if spec.block == 0) for own in options]
    assert [preflight._options_nbytes(session) for session in sessions] == packed


def test_sweeps_need_memory(model):
    swept, plain = (open_session(recipe_for(model, quantizer__sweeps=num)) for num in (1, 0))
    largest = max(spec.num_weights for spec in swept.skeleton.linears)
    assert preflight._work_nbytes(swept) - preflight._work_nbytes(plain) == 8 * largest


def test_a_rotation_takes_disk_memory_and_time_and_its_exactness_is_not_foretold(model, monkeypatch):
    monkeypatch.setattr(preflight, "_multiplications_per_second", lambda device: 1e6)
    turned, plain = (check(recipe_for(model, budget__bits=3, quantizer__rotate=rotate)) for rotate in (True, False))
    assert turned["disk_nbytes"] - plain["disk_nbytes"] == 4 * tiny.HIDDEN**2
    assert turned["ram_nbytes"] >= plain["ram_nbytes"] + 4 * tiny.HIDDEN**2
    session = open_session(recipe_for(model, quantizer__rotate=True))
    every = sum(spec.num_weights for spec in session.skeleton.linears if tiny.HIDDEN in spec.shape)
    steps, reads = rotation.STEPS, 2
    blocks = len(session.skeleton.block_names)
    products = 2 * tiny.HIDDEN * every * steps / blocks + 4 * tiny.HIDDEN**3 * steps + reads * tiny.HIDDEN * every
    assert turned["seconds"] - plain["seconds"] == pytest.approx(2 * products / 1e6, abs=1)
    assert any("rotated" in note for note in turned["notes"])
    assert not any("rotated" in note for note in plain["notes"])


def test_rows_that_may_not_wait_in_memory_need_less_of_it(model):
    small, large = (
        learning_nbytes(open_session(recipe_for(model, quantizer__rotate=True, measurement__memory=size)))
        for size in ("1kB", "8GB")
    )
    assert small < large
    assert learning_nbytes(open_session(recipe_for(model))) == 0


def test_what_stays_at_16_bits_is_learned_from_too(model):
    every, some = (
        learning_nbytes(open_session(recipe_for(model, quantizer__rotate=True, output__keep=keep)))
        for keep in ([], ["self_attn.*", "gate_proj"])
    )
    assert every == some


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
    return dataclasses.replace(session, device=torch.device(device))


@pytest.mark.gpu
def test_the_time_on_a_gpu(model):
    seconds = check(recipe_for(model, run__device="cuda"))["seconds"]
    assert 5 < seconds < 600
