"""Shares and sums of several processes, with the other process played by what it left behind."""

import dataclasses
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from llmmpq import cli, session
from llmmpq.errors import CalibrationError, RecipeError
from llmmpq.measure.block_loss import _num_probe_batches, _relative_error
from llmmpq.measure.moments import Moment
from llmmpq.measure.output_metric import BlockMetric, measure_output_metric
from llmmpq.measure.perturb import _Sums
from llmmpq.measure.states import StateStore
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.skeleton import build_skeleton
from llmmpq.model.stream import Block, BlockStream
from llmmpq.ranks import ALONE, LAUNCHERS, Ranks, launched
from llmmpq.workdir import WorkDir
from tests import tiny

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaving(Ranks):
    """The process that comes first in a test: what it would sum and gather stays behind."""

    num: int = 2
    sums: list[torch.Tensor] = dataclasses.field(default_factory=list, compare=False)
    gathered: list[Any] = dataclasses.field(default_factory=list, compare=False)

    def sum_(self, *tensors: torch.Tensor) -> None:
        self.sums.extend(tensor.clone() for tensor in tensors)

    def gather(self, value: Any) -> list[Any]:
        self.gathered.append(value)
        return [value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joining(Ranks):
    """The process that comes second: it finds what the other left."""

    other: Leaving
    rank: int = 1
    num: int = 2

    def sum_(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            tensor += self.other.sums.pop(0)

    def gather(self, value: Any) -> list[Any]:
        return [self.other.gathered.pop(0), value]


def pair() -> tuple[Leaving, Joining]:
    one = Leaving()
    return one, Joining(other=one)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (name for names in LAUNCHERS for name in names):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_changes_nothing():
    tensor = randn(3, 4)
    before = tensor.clone()
    ALONE.sum_(tensor)
    ALONE.take_first_({"x": tensor})
    assert torch.equal(tensor, before)
    assert ALONE.share(tensor, "rows") is tensor
    assert ALONE.sum_numbers(0.1, 3) == [0.1, 3]
    assert (ALONE.gather(5), ALONE.from_first(lambda: 6), ALONE.is_first, ALONE.may_report()) == ([5], 6, True, True)
    ALONE.leave(2)


@pytest.mark.parametrize("num", [2, 3, 5])
def test_shares_are_disjoint_complete_and_hold_the_first_windows_first(num):
    windows = torch.arange(7)[:, None].expand(7, 4)
    everyone = [Ranks(rank=rank, num=num) for rank in range(num)]
    shares = [ranks.share(windows, "windows")[:, 0].tolist() for ranks in everyone]
    assert sorted(chain(*shares)) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for total in range(8):
        firsts = [share[: ranks.num_shared(total)] for ranks, share in zip(everyone, shares, strict=True)]
        assert sorted(chain(*firsts)) == list(range(total))


def test_too_few_windows_name_the_largest_number_of_processes():
    windows = torch.zeros(3, 64)
    with pytest.raises(CalibrationError, match=r"4 processes .* probe windows.* 3 of 64 tokens: start at most 3,"):
        Ranks(rank=0, num=4).share(windows, "probe windows")
    Ranks(rank=2, num=3).share(windows, "probe windows")


def test_what_launchers_say(no_launcher):
    assert launched() is ALONE
    no_launcher.setenv("RANK", "3")
    assert launched() is ALONE
    no_launcher.setenv("WORLD_SIZE", "4")
    assert launched() == Ranks(rank=3, num=4, local_rank=3, local_num=4)
    no_launcher.setenv("LOCAL_RANK", "1")
    no_launcher.setenv("LOCAL_WORLD_SIZE", "2")
    assert launched() == Ranks(rank=3, num=4, local_rank=1, local_num=2)


def test_what_open_mpi_says(no_launcher):
    for name, value in zip(LAUNCHERS[1], "5812", strict=True):
        no_launcher.setenv(name, value)
    assert launched() == Ranks(rank=5, num=8, local_rank=1, local_num=2)


def test_moments_are_those_of_all_tokens():
    inputs, originals = randn(6, 10, 7), randn(6, 10, 7, seed=1)
    inputs[1, 3, 0] = inputs[4, 0, 0] = float("nan")
    whole = Moment(7, device=CPU, num_errors=7)
    one, two = pair()
    halves = [Moment(7, device=CPU, num_errors=7, ranks=ranks) for ranks in (one, two)]
    for position in range(6):
        for moment in (whole, halves[position % 2]):
            moment.add(inputs[position], originals[position] - inputs[position])
    expected = whole.means("here")
    halves[0].means("here")
    found = halves[1].means("here")
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)
    assert (halves[1].num_rows, halves[1].num_excluded) == (whole.num_rows, whole.num_excluded) == (58, 2)
    assert one.sums == []


def test_sums_of_the_cross_layer_pass_are_those_of_all_tokens():
    logits, base, original = randn(5, 12, 9), randn(12, 9, seed=1), randn(12, 9, seed=2)
    rounded = original + 0.01 * randn(12, 9, seed=3)
    logits[2, 7, 1] = float("inf")
    original[10, 4] = float("nan")
    whole = _Sums(5)
    one, two = pair()
    parts = (_Sums(5), _Sums(5))
    for start in range(0, 12, 4):
        tokens = slice(start, start + 4)
        for sums in (whole, parts[(start // 4) % 2]):
            half = (start // 4) % 2
            sums.add(logits[:, tokens].clone(), base[tokens], original[tokens], rounded[tokens], half=half)
    parts[0].sum_over(one)
    parts[1].sum_over(two)
    expected, found = whole.result(1.0), parts[1].result(1.0)
    size = torch.from_numpy(expected.gram_CC).diagonal().sqrt()
    for left, right in ((found.gram_CC, expected.gram_CC), (found.half_CC, expected.half_CC)):
        assert float((torch.from_numpy(left - right).abs() / torch.outer(size, size)).max()) < 1e-12
    assert found.half_share == expected.half_share == 7 / 11
    for name in ("linear_C", "kl_C"):
        torch.testing.assert_close(*(torch.from_numpy(getattr(it, name)) for it in (found, expected)))
    for name in ("constant", "base_kl", "rounding_kl"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12)
    assert (found.num_tokens, found.num_excluded) == (expected.num_tokens, expected.num_excluded) == (11, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("ranks") / "model")


def first_block(folder: Path, use: Callable[[Block], Any], ranks: Ranks = ALONE) -> Any:
    checkpoint = Checkpoint.open(folder)
    skeleton = build_skeleton(folder, checkpoint)
    stream = BlockStream(skeleton, checkpoint, tiny.token_ids(5, 24), device=CPU, dtype=torch.float32, ranks=ranks)
    blocks = iter(stream)
    result = use(next(blocks))
    blocks.close()
    return result


@pytest.mark.parametrize(("num_probe_tokens", "num_windows"), [(1, 1), (24, 1), (50, 3), (120, 5), (500, 5)])
def test_local_losses_are_those_of_the_same_probe_windows(folder, num_probe_tokens, num_windows):
    def loss(block: Block) -> tuple[int, float]:
        reference = list(block.run(block.states[: _num_probe_batches(block, num_probe_tokens)]))
        linear = block.linear(block.linears[0])
        linear.weight.data = linear.weight.data + 0.01 * randn(*linear.weight.shape)
        return len(reference), _relative_error(block, reference)

    num, expected = first_block(folder, loss)
    one, two = pair()
    num_one, _ = first_block(folder, loss, one)
    num_two, found = first_block(folder, loss, two)
    assert (num, num_one + num_two) == (num_windows, num_windows)
    assert expected > 0
    assert found == pytest.approx(expected, rel=1e-9)


def test_processes_agree_on_what_is_reached(folder):
    def groups(block: Block) -> list[list[str]]:
        return [[spec.role for spec in group] for group in block.input_groups()]

    expected = first_block(folder, groups)
    one, two = pair()
    assert first_block(folder, groups, one) == first_block(folder, groups, two) == expected
    one.gathered.append([[f"model.layers.0.mlp.{role}"] for role in ("up_proj", "down_proj")])
    merged = first_block(folder, groups, two)
    assert merged[:2] == [["up_proj"], ["down_proj"]]
    assert sorted(chain(*merged)) == sorted(chain(*expected))


def test_only_the_first_writes(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Second(Ranks):
        rank: int = 1
        num: int = 2

        def from_first(self, make: Callable[[], Any]) -> Any:
            return None

    with WorkDir(tmp_path / "work", ranks=Second()) as work:
        stage = work.stage("measure", {"x": 1})
        stage.save("sensitivity", {}, {"a": torch.zeros(2)})
        stage.save_block(0, {}, {"a": torch.zeros(2)})
        stage.save_result({})
        stage.discard()
    assert list(tmp_path.iterdir()) == []
    with WorkDir(tmp_path / "work") as work:  # the same inputs lead to the same place
        assert work.stage("measure", {"x": 1}).folder == stage.folder


def test_the_output_metric_is_that_of_all_windows(tmp_path):
    folder = tiny.save("llama", tmp_path)
    checkpoint, windows = Checkpoint.open(folder), tiny.token_ids(5, 12)
    skeleton = build_skeleton(folder, checkpoint)

    def metric(ranks: Ranks) -> dict[int, BlockMetric]:
        stream = BlockStream(skeleton, checkpoint, windows, device=CPU, dtype=torch.float32, ranks=ranks)
        shapes = [(12, tiny.HIDDEN)] * len(stream.windows)
        rows = len(skeleton.block_names)
        store = StateStore(
            num_rows=rows, window_shapes=shapes, dtype=torch.float32, place="host", device=CPU, folder=tmp_path
        )
        found: dict[int, BlockMetric] = {}
        measure_output_metric(stream, store, on_pass=lambda: None, save=found.__setitem__)
        return found

    alone = metric(ALONE)
    one, two = pair()
    metric(one)
    shared = metric(two)
    for index, expected in alone.items():
        assert torch.equal(shared[index].output_DD, expected.output_DD)
        assert list(shared[index].linears) == list(expected.linears)
        for name, pieces in expected.linears.items():
            assert all(map(torch.equal, shared[index].linears[name], pieces))


class TestDevices:
    @pytest.fixture(autouse=True)
    def _two_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    @pytest.mark.parametrize("name", ["auto", "cuda"])
    def test_each_process_has_its_own(self, name):
        ranks = Ranks(rank=3, num=4, local_rank=1, local_num=2)
        assert session.pick_device(name, ranks=ranks) == torch.device("cuda:1")
        assert session.pick_device("cpu", ranks=ranks) == CPU
        assert session.pick_device(name) == torch.device("cuda")

    def test_one_device_cannot_be_shared(self):
        with pytest.raises(RecipeError, match=r"'cuda:1', but 2 processes need one device each"):
            session.pick_device("cuda:1", ranks=Ranks(num=2, local_num=2))

    def test_more_processes_than_devices(self):
        with pytest.raises(RecipeError, match="3 processes on this machine need one CUDA device each, torch sees 2"):
            session.pick_device("auto", ranks=Ranks(num=3, local_num=3))


def test_other_verbs_do_not_share_their_work(no_launcher, capsys):
    no_launcher.setenv("RANK", "0")
    no_launcher.setenv("WORLD_SIZE", "2")
    no_launcher.setattr(cli, "join", lambda: ALONE)
    assert cli.main(["inspect", "somewhere"]) == 2
    assert "only quantize and plan share their work among 2 processes" in capsys.readouterr().err


def test_a_failure_that_another_process_has_told_is_not_told_again(capsys):
    class Told(Ranks):
        def may_report(self) -> bool:
            return False

    assert cli._fail("bad", Told()) == 2
    assert cli._fail("bad", ALONE) == 2
    assert capsys.readouterr().err == "error: bad\n"
