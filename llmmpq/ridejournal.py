"""Where the cross-layer pass stands, saved now and then between blocks, so that an interrupted one goes on from there.

A snapshot is one file per probe window and a marker that is written last. It is taken when a minute has passed since
the last, and never so often that writing takes more than a twentieth of the time: what an interruption costs is that
minute. The states of all candidates are large; without room on the disk for them the pass goes on and none is taken.
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

    def __init__(self, stage: Stage, ride: Ride, *, num_windows: int) -> None:
        self.stage, self.ride, self.num_windows = stage, ride, num_windows
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
        windows = []
        for window in range(self.num_windows):
            loaded = self.stage.load(_name(marker["block"], window))
            if loaded is None:
                return []
            windows.append(loaded[1])
        for window, held in enumerate(windows):
            self.ride.restore(window, held)
        self.ride.num_rows, self.ride.num_forwards = len(marker["rows"]), marker["num_forwards"]
        self.last_block = marker["block"]
        warnings += marker["warnings"]
        return [(name, Scheme.from_json(scheme)) for name, scheme in marker["rows"]]

    def save(self, block: int, rows: list[tuple[str, Scheme]], *, warnings: list[str]) -> None:
        started = time.monotonic()
        if started - self._saved_at < self._wait_s or not self._has_room():
            return
        try:
            for window in range(self.num_windows):
                self.stage.save(_name(block, window), {}, self.ride.window_state(window))
        except CheckpointError:  # somebody else filled the disk meanwhile
            self.stage.forget(_name(block, "*") + ".safetensors")
            return
        listed = [[name, scheme.to_json()] for name, scheme in rows]
        marker = {"block": block, "rows": listed, "warnings": warnings, "num_forwards": self.ride.num_forwards}
        self.stage.save_result(marker)
        if self.last_block >= 0:
            self.stage.forget(_name(self.last_block, "*") + ".safetensors")
        self.last_block = block
        self._saved_at = time.monotonic()
        self._wait_s = max(SNAPSHOT_EVERY_S, (self._saved_at - started) / LARGEST_SHARE)

    def close(self) -> None:
        """The measurement is complete: its snapshots have no more use."""
        self.stage.forget(_name("*", "*") + ".safetensors")

    def _has_room(self) -> bool:
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in self.ride.window_state(0).values())
        return shutil.disk_usage(self.stage.folder).free > 2 * self.num_windows * nbytes


def _name(block: int | str, window: int | str) -> str:
    return f"ride-{_padded(block)}-{_padded(window)}"


def _padded(number: int | str) -> str:
    return f"{number:04d}" if isinstance(number, int) else number
