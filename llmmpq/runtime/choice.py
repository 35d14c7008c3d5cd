"""Which backend multiplies with a packed matrix, and why the others do not.

A backend that fails although it was accepted is out for matrices of that kind from then on: a warning names it once,
and `explain` goes on saying why. Matrices that share one input may share one launch: `explain_together`. The
environment variable LLMMPQ_TOGETHER says whether they do: 1 on GPUs and CPUs; 0, or without it, nowhere.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch

from llmmpq.errors import KernelUnavailableError, RecipeError
from llmmpq.scheme import Runs, Scheme
from llmmpq_kernels.operands import refusal, refusal_together

TRITON, CPU, REFERENCE = ("gemv", "gemm", "dequantized"), "cpu", "reference"
SEPARATE = "separate"
TOGETHER_VARIABLE = "LLMMPQ_TOGETHER"
# On a CPU a step of decoding took as long with shared calls as without (docs/log.md). On a GPU nobody has measured, and
# each set of forms is a kernel of its own to compile: it is tried by whoever asks for it.
TOGETHER_DEVICES = {"": (), "0": (), "1": ("cuda", "cpu")}
TOGETHER_OFF = f"off: no gain on a CPU, never measured on a GPU; {TOGETHER_VARIABLE}=1 switches it on"
TOGETHER_REASONS = {
    "gemv": "one launch for all of them, which nobody measured",
    CPU: "one call of the compiled loops for all of them",
}
FAILED = "failed earlier: "
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


Member = tuple[tuple[int, int], Runs, int]  # shape, runs and group size of one matrix of several

_failures: dict[Kind, str] = {}
_failures_together: dict[tuple[str, tuple[Kind, ...]], str] = {}


def explain(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], scheme: Scheme, *, num_rows: int = 1
) -> list[Candidate]:
    """Every backend for so many rows of this dtype and a matrix of this shape, best first; the first accepted runs."""
    return _explain(device, dtype, scheme.widths(shape), scheme.group_size, num_rows)


def _explain(device: torch.device, dtype: torch.dtype, runs: Runs, group_size: int, num_rows: int) -> list[Candidate]:
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
    return candidate if failure is None else Candidate(candidate.backend, False, f"{FAILED}{failure}")


def _consider_reference(dtype: torch.dtype) -> Candidate:
    if not dtype.is_floating_point:
        return Candidate(REFERENCE, False, f"activations are {dtype}, not floating point")
    return Candidate(REFERENCE, True, "plain torch, runs on any device; dequantizes the whole matrix for each call")


@functools.lru_cache(maxsize=4096)
def choose(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], runs: Runs, group_size: int, num_rows: int
) -> str:
    """The first accepted. `num_rows` may be rounded up to a power of two: so are the figures it is compared with."""
    candidates = _explain(device, dtype, runs, group_size, num_rows)
    for candidate in candidates:
        if candidate.accepted:
            if candidate.backend == REFERENCE:
                _warn_of_reference(device, candidates)
            return candidate.backend
    reasons = "; ".join(f"{candidate.backend}: {candidate.reason}" for candidate in candidates)
    bits = runs[0][0] if len(runs) == 1 else dict(runs)
    raise KernelUnavailableError(f"no backend runs a {bits}-bit matrix of shape {shape} on {device} ({reasons})")


def _warn_of_reference(device: torch.device, candidates: list[Candidate]) -> None:
    """Where kernels exist for the device. A kernel that failed was named when it did."""
    kernels = {"cpu": (CPU, "compiled loops for CPUs"), "cuda": (TRITON[0], "Triton kernels")}
    backend, named = kernels.get(device.type, ("", ""))
    for candidate in candidates:
        if candidate.backend == backend and not candidate.reason.startswith(FAILED):
            _warn_once(named, candidate.reason)


@functools.cache
def _warn_once(named: str, problem: str) -> None:
    warnings.warn(
        f"llmmpq: the {named} cannot run, the slow reference runs in their place: {problem}",
        RuntimeWarning,
        stacklevel=3,
    )


def explain_together(
    device: torch.device,
    dtype: torch.dtype,
    members: Sequence[tuple[tuple[int, int], Scheme]],
    *,
    num_rows: int = 1,
) -> Candidate:
    """Whether matrices of these shapes and schemes, which have one input, share a launch, by which backend, and why."""
    if device.type not in together_on():
        return Candidate(SEPARATE, False, TOGETHER_OFF)
    described = tuple((shape, scheme.widths(shape), scheme.group_size) for shape, scheme in members)
    return _explain_together(device, dtype, described, num_rows)


def _explain_together(
    device: torch.device, dtype: torch.dtype, members: tuple[Member, ...], num_rows: int
) -> Candidate:
    backends = {_first_accepted(_explain(device, dtype, runs, group, num_rows)) for _, runs, group in members}
    if len(backends) > 1:
        return Candidate(SEPARATE, False, f"their kernels differ: {' and '.join(sorted(backends))}")
    backend = backends.pop()
    failure = _failures_together.get(_kinds(backend, device, members))
    if failure is not None:
        return Candidate(SEPARATE, False, f"{FAILED}{failure}")
    if backend not in ("gemv", CPU):
        return Candidate(SEPARATE, False, f"{backend} takes one matrix at a time")
    problem = refusal_together(members) or _rows_problem(backend, device, members, num_rows)
    if problem is not None:
        return Candidate(SEPARATE, False, problem)
    return Candidate(backend, True, TOGETHER_REASONS[backend])


def _rows_problem(backend: str, device: torch.device, members: tuple[Member, ...], num_rows: int) -> str | None:
    if backend == CPU:
        from llmmpq_kernels import cpu

        most = cpu.MOST_ROWS
    else:
        from llmmpq_kernels import together, tuning

        if (problem := tuning.refusal_of_warps(device, num_rows, members)) is not None:
            return problem
        most = together.MOST_ROWS
    return None if num_rows <= most else f"{num_rows} rows given, at most {most} are multiplied so"


def together_on() -> tuple[str, ...]:
    """The types of devices on which launches are shared."""
    value = os.environ.get(TOGETHER_VARIABLE, "")
    if value not in TOGETHER_DEVICES:
        raise RecipeError(
            f"the environment variable {TOGETHER_VARIABLE} is {value!r}: set it to 1 (linears with one input share a"
            " launch) or to 0 (each has its own, as without it)"
        )
    return TOGETHER_DEVICES[value]


def _first_accepted(candidates: list[Candidate]) -> str:
    return next((candidate.backend for candidate in candidates if candidate.accepted), "none")


@functools.lru_cache(maxsize=4096)
def choose_together(device: torch.device, dtype: torch.dtype, members: tuple[Member, ...], num_rows: int) -> str | None:
    """The backend that multiplies with all of them in one launch; None where each goes alone."""
    candidate = _explain_together(device, dtype, members, num_rows)
    return candidate.backend if candidate.accepted else None


def give_up_together(backend: str, device: torch.device, members: tuple[Member, ...], error: Exception) -> None:
    """Remember that a shared launch failed, and say so."""
    reason = _first_line(error)
    _failures_together[_kinds(backend, device, members)] = reason
    choose_together.cache_clear()
    warnings.warn(
        f"llmmpq: the {backend} kernel failed on {device} for {len(members)} matrices in one launch, each is launched"
        f" alone from now on: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def _kinds(backend: str, device: torch.device, members: tuple[Member, ...]) -> tuple[str, tuple[Kind, ...]]:
    return backend, tuple(_kind(backend, device, runs, group_size) for _, runs, group_size in members)


def give_up_on(backend: str, device: torch.device, runs: Runs, group_size: int, error: Exception) -> None:
    """Remember a failure, and say so the first time."""
    reason = _first_line(error)
    _failures[_kind(backend, device, runs, group_size)] = reason
    choose.cache_clear()
    choose_together.cache_clear()
    warnings.warn(
        f"llmmpq: the {backend} kernel failed on {device} for widths {[bits for bits, _ in runs]} in groups of"
        f" {group_size}, the slow reference runs in its place: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def _kind(backend: str, device: torch.device, runs: Runs, group_size: int) -> Kind:
    return Kind(backend, device.type, tuple(bits for bits, _ in runs), group_size)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
