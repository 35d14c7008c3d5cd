"""Which kernel a number of rows takes, and how it is cut: read from `launch/*.json`, by device and class of shape.

A file is named after a device as torch names it, in lower case with dashes (`nvidia-h200.json`); others take
`default.json`, which was reasoned out from registers and occupancy and measured nowhere. In a file the first entry
that fits counts: at least as many rows, and all of the matrix's widths. Splits along K are not stored but computed:
as many as give every core `programs_per_core` programs, and no more than there are blocks of chunks.

Rejected: `triton.autotune`. It measures in the middle of a model's first answer, fails without a GPU, and two runs
may choose, and round, differently.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch

from . import gemm, gemv, together
from .operands import Operands
from .runs import Runs

BACKENDS = ("gemv", "gemm", "dequantized")
# More splits than this write and read more partial sums than the words they share out.
MOST_SPLITS = 16


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What one file says; `measured_on` is the device, or None for figures that nobody measured."""

    measured_on: str | None
    gemv_most_rows: int
    gemm_most_rows: int
    gemv: tuple[dict[str, Any], ...]
    gemm: tuple[dict[str, Any], ...]


def file_name(device_name: str) -> str:
    return "-".join(device_name.lower().split()) + ".json"


@functools.lru_cache(maxsize=16)
def load_launch(device_name: str) -> Launch:
    """The figures for a device, by its name in torch."""
    folder = files(__package__) / "launch"
    file = folder / file_name(device_name)
    data = json.loads((file if file.is_file() else folder / "default.json").read_text(encoding="utf-8"))
    return Launch(**{**data, "gemv": tuple(data["gemv"]), "gemm": tuple(data["gemm"])})


@functools.lru_cache(maxsize=64)
def launch_on(device: torch.device) -> Launch:
    return load_launch(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


def backend_for(num_rows: int, launch: Launch) -> str:
    """The kernel that so many rows take."""
    if num_rows <= launch.gemv_most_rows:
        return "gemv"
    return "gemm" if num_rows <= launch.gemm_most_rows else "dequantized"


def takes(backend: str, num_rows: int) -> bool:
    """Whether a kernel can do it at all, fast or not."""
    return backend != "gemv" or num_rows <= gemv.MOST_ROWS


def multiply(backend: str, x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    """`x @ weight.T + bias` by the kernel named, with the launch figures of its device."""
    if backend == "dequantized":
        return gemm.multiply_dequantized(x_MK, operands)
    shape, runs, chunks = operands.shape, operands.runs, operands.chunks
    # Every count of rows in a bucket is launched alike, so a bucket is compiled once.
    bucket = 1 << (x_MK.shape[0] - 1).bit_length()
    if backend == "gemv":
        return gemv.multiply(x_MK, operands, gemv_config(x_MK.device, bucket, shape, runs, chunks))
    return gemm.multiply(x_MK, operands, gemm_config(x_MK.device, bucket, shape, runs, chunks))


def multiply_together(x_MK: torch.Tensor, members: Sequence[Operands]) -> list[torch.Tensor]:
    """What `multiply` gives for each matrix by the kernel for few rows, in one launch."""
    bucket = 1 << (x_MK.shape[0] - 1).bit_length()
    configs = [gemv_config(x_MK.device, bucket, each.shape, each.runs, each.chunks) for each in members]
    return together.multiply(x_MK, members, configs)


def refusal_of_warps(
    device: torch.device, num_rows: int, members: Sequence[tuple[tuple[int, int], Runs, int]]
) -> str | None:
    """Why the figures of this device let matrices of these shapes, runs and group sizes share no launch."""
    entries = [_first_fitting(launch_on(device).gemv, num_rows, runs) for _, runs, _ in members]
    warps = sorted({entry["num_warps"] for entry in entries})
    return (
        None
        if len(warps) == 1
        else f"their programs have {' and '.join(map(str, warps))} warps, a launch has one number"
    )


@functools.lru_cache(maxsize=4096)
def gemv_config(
    device: torch.device, num_rows: int, shape: tuple[int, int], runs: Runs, chunks: tuple[int, ...]
) -> gemv.GemvConfig:
    entry = _first_fitting(launch_on(device).gemv, num_rows, runs)
    programs = -(-shape[0] // entry["block_n"])
    return gemv.GemvConfig(
        block_n=entry["block_n"],
        block_c=entry["block_c"],
        split=_splits(device, entry, programs, chunks),
        num_warps=entry["num_warps"],
    )


@functools.lru_cache(maxsize=4096)
def gemm_config(
    device: torch.device, num_rows: int, shape: tuple[int, int], runs: Runs, chunks: tuple[int, ...]
) -> gemm.GemmConfig:
    entry = _first_fitting(launch_on(device).gemm, num_rows, runs)
    programs = -(-shape[0] // entry["block_n"]) * -(-num_rows // entry["block_m"])
    return gemm.GemmConfig(
        block_m=entry["block_m"],
        block_n=entry["block_n"],
        block_c=entry["block_c"],
        split=_splits(device, entry, programs, chunks),
        num_warps=entry["num_warps"],
        num_stages=entry["num_stages"],
    )


def _first_fitting(entries: tuple[dict[str, Any], ...], num_rows: int, runs: Runs) -> dict[str, Any]:
    widths = {bits for bits, _ in runs}
    for entry in entries:
        if (entry["most_rows"] is None or num_rows <= entry["most_rows"]) and widths <= set(entry["widths"]):
            return entry
    raise ValueError(f"no launch figures for {num_rows} rows and widths {sorted(widths)}")


def _splits(device: torch.device, entry: dict[str, Any], programs: int, chunks: tuple[int, ...]) -> int:
    wanted = entry["programs_per_core"] * _num_cores(device)
    num_blocks = sum(-(-count // entry["block_c"]) for count in chunks)
    return max(1, min(-(-wanted // programs), num_blocks, MOST_SPLITS))


@functools.lru_cache(maxsize=64)
def _num_cores(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
