"""Several processes at one piece of work: each takes a share of the windows, sums over tokens are made over all.

Started by `torchrun` or `accelerate launch`, one process per device. Every process runs the same program; they differ
in their windows alone. What is summed is the same afterwards, bit for bit, on all of them, so that they make the same
candidates and the same codes. The first process alone reads and writes the work folder, solves, and speaks to the
person. `ALONE`, the plain case, is one process, for which nothing here does anything.

A process that fails ends. The others learn of it from the launcher, which ends them, or from a broken connection at
the next sum; what the first process does for all (`from_first`) fails on all of them. Splitting the candidates and not
the windows was rejected: sums of moments would be needed all the same, and shares of linears of different sizes wait
for each other.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from llmmpq.errors import CalibrationError, LlmmpqError, RankError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# The first process hashes, solves and writes while the others wait, on large models for long. That is why this is no
# shorter: a process that ends is noticed at once, this is for a machine that vanished.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
# How long a process that failed leaves the word to the first one, which mostly fails in the same way, and then waits
# for all others to have failed too: launchers kill the others as soon as one has ended.
LEAVE_WORD_S, LEAVE_S = 5.0, 10.0
POLL_S = 0.05
# Of this process among all, and among those on its machine: set by torchrun and accelerate, Open MPI, MPICH.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that work together."""

    rank: int = 0
    num: int = 1
    local_rank: int = 0
    local_num: int = 1
    store: Any = None  # torch.distributed's, when there are others

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, windows: torch.Tensor, what: str) -> torch.Tensor:
        """Every num-th window, so that the first n windows of all lie in the first windows of each share."""
        if len(windows) < self.num:
            raise CalibrationError(
                f"each of {self.num} processes needs a share of the {what}, and there are {len(windows)} of "
                f"{windows.shape[1]} tokens: start at most {len(windows)}, or ask for more tokens or a shorter --window"
            )
        return windows if self.num == 1 else windows[self.rank :: self.num]

    def num_shared(self, total: int) -> int:
        """How many of the first `total` windows are in this process's share."""
        return len(range(self.rank, total, self.num))

    def sum_(self, *tensors: torch.Tensor) -> None:
        """Each tensor becomes its sum over all processes."""
        if self.num > 1:
            import torch.distributed as dist

            with _collective():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def sum_numbers(self, *numbers: float) -> list[float]:
        if self.num == 1:
            return list(numbers)
        import torch

        summed = torch.tensor(numbers, dtype=torch.float64)
        self.sum_(summed)
        return summed.tolist()

    def take_first_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Each tensor becomes the first process's."""
        if self.num > 1:
            import torch
            import torch.distributed as dist

            with _collective():
                for tensor in tensors.values():
                    same = tensor.contiguous().view(torch.uint8)
                    dist.broadcast(same, src=0)
                    if not tensor.is_contiguous():
                        tensor.copy_(same.view(tensor.dtype))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, on all of them."""
        if self.num == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.num
        with _collective():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, where alone it is called; where it fails there, it fails here."""
        if self.num == 1:
            return make()
        import torch
        import torch.distributed as dist

        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = make()
            except (LlmmpqError, OSError) as error:
                outcome[1] = error
        with _collective():
            dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        made: T = outcome[0]
        return made

    def may_report(self) -> bool:
        """Whether it is for this process to tell the person of its failure: for one of those that fail."""
        if self.num == 1:
            return True
        with suppress(RuntimeError):
            if not self.is_first:
                _wait_until(lambda: self.store.add("reported", 0) > 0, LEAVE_WORD_S)
            return bool(self.store.add("reported", 1) == 1)
        return True  # the process that kept the store died without a word

    def leave(self, code: int) -> None:
        """After the last word: with others at work a process that failed ends here, with its exit code."""
        if self.num == 1:
            return
        import torch.distributed as dist

        if code == 0:
            dist.destroy_process_group()
            return
        with suppress(RuntimeError):
            self.store.add("failed", 1)
            _wait_until(lambda: self.store.add("failed", 0) >= self.num, LEAVE_S)
        with suppress(ValueError):  # elsewhere than in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, for the others: their exit code counts too
        # Destroying the group may wait for a process that is gone, and python's own end, with the group's threads still
        # waiting for it, is sometimes an abort ("terminate called") in place of the exit code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


ALONE = Ranks()


def launched() -> Ranks:
    """What the launcher says of this process; it has not met the others yet."""
    for rank, num, local_rank, local_num in LAUNCHERS:
        if (position := _number(rank)) is not None and (total := _number(num)) is not None:
            here, all_here = _number(local_rank), _number(local_num)
            return Ranks(
                rank=position,
                num=total,
                local_rank=position if here is None else here,
                local_num=total if all_here is None else all_here,
            )
    return ALONE


def join() -> Ranks:
    """Meet the other processes, if the launcher started any."""
    ranks = launched()
    if ranks.num == 1:
        return ALONE
    import torch
    import torch.distributed as dist

    try:
        if not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                init_method="env://",
                rank=ranks.rank,
                world_size=ranks.num,
                timeout=COLLECTIVE_TIMEOUT,
            )
        store = dist.PrefixStore("llmmpq", dist.distributed_c10d._get_default_store())
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"process {ranks.rank} of {ranks.num} cannot meet the others ({_first_line(error)}): start llmmpq with "
            "torchrun or accelerate launch, or unset RANK and WORLD_SIZE for a single process"
        ) from None
    return Ranks(rank=ranks.rank, num=ranks.num, local_rank=ranks.local_rank, local_num=ranks.local_num, store=store)


@contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's word for a lost connection and for a timeout
        raise RankError(
            "another process of this run ended or cannot be reached; run the same command again to continue"
        ) from error


def _wait_until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
