"""Where the cross-layer pass stands, saved now and then between blocks, so that an interrupted one goes on from there.

A snapshot is one file per probe window and a marker that is written last. It is taken when a minute has passed since
the last, and never so often that writing takes more than a twentieth of the time: what an interruption costs is that
minute. The states of all candidates are large; without room on the disk for them the pass goes on and none is taken.

Where several processes share the windows, each writes and reads its own; all take a snapshot, or none.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

from llmmpq.errors import CheckpointError
from llmmpq.measure.perturb import Ride
from llmmpq.records import Scheme
from llmmpq.workdir import Stage

SNAPSHOT_EVERY_S = 60.0
LARGEST_SHARE = 0.05  # of the time, for writing


class RideJournal:
    """Snapshots of one ride in its stage's folder."""

    def __init__(self, stage: Stage, ride: Ride) -> None:
        self.stage, self.ride, self.ranks = stage, ride, stage.ranks
        self.last_block = -1  # through which the ride has gone
        self._saved_at = time.monotonic()
        self._wait_s = SNAPSHOT_EVERY_S

    def resume(
        self, *, warnings: list[str], needs: Callable[[int], bool] = lambda index: True
    ) -> list[tuple[str, Scheme]]:
        """Put the ride where the last snapshot left it and return its rows; without one, or a damaged one, nothing.

        `needs` says whether what else going on takes is there for a block.
        """
        marker = self.stage.load_result()
        if marker is None or not all(needs(index) for index in range(int(marker["block"]) + 1)):
            return []
        windows = [self.stage.read(name) for name in self._names(marker["block"])]
        if not all(self.ranks.gather(None not in windows)):
            return []
        for window, loaded in enumerate(windows):
            assert loaded is not None
            self.ride.restore(window, loaded[1])
        self.ride.num_rows, self.ride.num_forwards = len(marker["rows"]), marker["num_forwards"]
        self.last_block = marker["block"]
        warnings += marker["warnings"]
        return [(name, Scheme.from_json(scheme)) for name, scheme in marker["rows"]]

    def save(self, block: int, rows: list[tuple[str, Scheme]], *, warnings: list[str]) -> None:
        started = time.monotonic()
        due = self.ranks.from_first(lambda: started - self._saved_at >= self._wait_s)
        if not due or not all(self.ranks.gather(self._has_room())):
            return
        if not all(self.ranks.gather(self._write_windows(block))):  # somebody else filled the disk meanwhile
            self._forget(block)
            return
        listed = [[name, scheme.to_json()] for name, scheme in rows]
        marker = {"block": block, "rows": listed, "warnings": warnings, "num_forwards": self.ride.num_forwards}
        self.ranks.from_first(lambda: self.stage.save_result(marker))
        if self.last_block >= 0:
            self._forget(self.last_block)
        self.last_block = block
        self._saved_at = time.monotonic()
        self._wait_s = max(SNAPSHOT_EVERY_S, (self._saved_at - started) / LARGEST_SHARE)

    def close(self) -> None:
        """The measurement is complete: its snapshots have no more use."""
        self.stage.forget("ride-*.safetensors")

    def _write_windows(self, block: int) -> bool:
        try:
            for window, name in enumerate(self._names(block)):
                self.stage.write(name, {}, self.ride.window_state(window))
        except CheckpointError:
            return False
        return True

    def _forget(self, block: int) -> None:
        for name in self._names(block):
            self.stage.forget(f"{name}.safetensors")

    def _names(self, block: int) -> list[str]:
        """By each window's place among all windows, so that no two processes write the same file."""
        shared = range(self.ride.num_windows)
        return [f"ride-{block:04d}-{self.ranks.rank + self.ranks.num * window:04d}" for window in shared]

    def _has_room(self) -> bool:
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in self.ride.window_state(0).values())
        self.stage.folder.mkdir(parents=True, exist_ok=True)  # another machine's disk may not have it yet
        here = self.ride.num_windows * self.ranks.local_num  # on one disk, as far as anybody knows
        return shutil.disk_usage(self.stage.folder).free > 2 * here * nbytes
