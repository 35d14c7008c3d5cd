"""Which backend multiplies with a packed matrix, and why the others do not.

A backend that fails although it was accepted is out for matrices of that kind from then on: a warning names it once,
and `explain` goes on saying why.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import NamedTuple

import torch

from llmmpq.errors import KernelUnavailableError
from llmmpq.scheme import Runs, Scheme
from llmmpq_kernels.operands import refusal

TRITON, CPU, REFERENCE = ("gemv", "gemm", "dequantized"), "cpu", "reference"
SIXTEEN_BIT = (torch.float16, torch.bfloat16)
# Asynchronous copies and bfloat16 in tensor cores, both of which the kernels are compiled and tested with.
LEAST_CAPABILITY = (8, 0)


class Candidate(NamedTuple):
    """One backend, whether it can do the job, and why."""

    backend: str
    accepted: bool
    reason: str


class Kind(NamedTuple):
    """What kernels are compiled for: a failure with one matrix of a kind is a failure with all."""

    backend: str
    device_type: str
    widths: tuple[int, ...]
    group_size: int


_failures: dict[Kind, str] = {}


def explain(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], scheme: Scheme, *, num_rows: int = 1
) -> list[Candidate]:
    """Every backend for so many rows of this dtype and a matrix of this shape, best first; the first accepted runs."""
    runs, group_size = scheme.widths(shape), scheme.group_size
    considered = [
        *_consider_triton(device, dtype, runs, group_size, num_rows),
        _consider_cpu(device, dtype, runs, group_size),
    ]
    candidates = [_unless_failed(candidate, device, runs, group_size) for candidate in considered]
    return [*candidates, _consider_reference(dtype)]


def _consider_triton(
    device: torch.device, dtype: torch.dtype, runs: Runs, group_size: int, num_rows: int
) -> list[Candidate]:
    problem = _triton_problem(device, dtype) or refusal(runs, group_size)
    if problem is not None:
        return [Candidate(backend, False, problem) for backend in TRITON]
    from llmmpq_kernels import tuning

    launch = tuning.launch_on(device)
    best = tuning.backend_for(num_rows, launch)
    figures = "launch figures that nobody measured" if launch.measured_on is None else f"as on {launch.measured_on}"
    says = {
        "gemv": f"words unpacked in registers, for at most {launch.gemv_most_rows} rows",
        "gemm": f"tiles dequantized for tensor cores, for at most {launch.gemm_most_rows} rows",
        "dequantized": f"the matrix dequantized for cuBLAS, from {launch.gemm_most_rows + 1} rows on",
    }
    ordered = sorted(TRITON, key=lambda backend: backend != best)
    rows = f"{num_rows} row{'s' if num_rows > 1 else ''}"
    return [
        Candidate(
            backend, backend == best, f"{says[backend]}; {figures}" if backend == best else f"{rows} given: {best}"
        )
        for backend in ordered
    ]


def _triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, this is {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, on which the kernels were never tried"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, at least 8.0 is needed"
    if dtype not in SIXTEEN_BIT:
        return f"activations are {_name(dtype)}, the kernels take float16 and bfloat16"
    return None


def _consider_cpu(device: torch.device, dtype: torch.dtype, runs: Runs, group_size: int) -> Candidate:
    if device.type != "cpu":
        return Candidate(CPU, False, f"runs on a CPU, this is {device.type}")
    if dtype not in (torch.float32, *SIXTEEN_BIT):
        return Candidate(CPU, False, f"activations are {_name(dtype)}, it takes float32, float16 and bfloat16")
    from llmmpq_kernels import native

    problem = refusal(runs, group_size) or native.load().problem
    if problem is not None:
        return Candidate(CPU, False, problem)
    return Candidate(CPU, True, "compiled loops over the words")


def _unless_failed(candidate: Candidate, device: torch.device, runs: Runs, group_size: int) -> Candidate:
    failure = _failures.get(_kind(candidate.backend, device, runs, group_size))
    return candidate if failure is None else Candidate(candidate.backend, False, f"failed earlier: {failure}")


def _consider_reference(dtype: torch.dtype) -> Candidate:
    if not dtype.is_floating_point:
        return Candidate(REFERENCE, False, f"activations are {dtype}, not floating point")
    return Candidate(REFERENCE, True, "plain torch, runs on any device; dequantizes the whole matrix for each call")


@functools.lru_cache(maxsize=4096)
def choose(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], runs: Runs, group_size: int, num_rows: int
) -> str:
    """The first accepted. `num_rows` may be rounded up to a power of two: so are the figures it is compared with."""
    mixed = len(runs) > 1
    scheme = Scheme(bits=None if mixed else runs[0][0], runs=runs if mixed else (), group_size=group_size)
    candidates = explain(device, dtype, shape, scheme, num_rows=num_rows)
    for candidate in candidates:
        if candidate.accepted:
            if candidate.backend == REFERENCE and device.type == "cpu":
                _warn_without_loops(candidates)
            return candidate.backend
    reasons = "; ".join(f"{candidate.backend}: {candidate.reason}" for candidate in candidates)
    bits = scheme.to_json()["bits"]
    raise KernelUnavailableError(f"no backend runs a {bits}-bit matrix of shape {shape} on {device} ({reasons})")


def _warn_without_loops(candidates: list[Candidate]) -> None:
    from llmmpq_kernels import native

    problem = native.load().problem
    if problem is not None and any(each.backend == CPU and each.reason == problem for each in candidates):
        _warn_once(problem)


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(
        f"llmmpq: the compiled loops for CPUs are not to be had, the slow reference runs in their place: {problem}",
        RuntimeWarning,
        stacklevel=3,
    )


def give_up_on(backend: str, device: torch.device, runs: Runs, group_size: int, error: Exception) -> None:
    """Remember a failure, and say so the first time."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    _failures[_kind(backend, device, runs, group_size)] = reason
    choose.cache_clear()
    warnings.warn(
        f"llmmpq: the {backend} kernel failed on {device} for widths {[bits for bits, _ in runs]} in groups of"
        f" {group_size}, the slow reference runs in its place: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def _kind(backend: str, device: torch.device, runs: Runs, group_size: int) -> Kind:
    return Kind(backend, device.type, tuple(bits for bits, _ in runs), group_size)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
