"""`cpu.c` as a library: compiled by the machine's own C compiler the first time, kept for the next.

Plain torch cannot beat float32 on a CPU: every step of unpacking is a pass over the cache that costs as much as reading
a float32 weight from memory (docs/log.md has the figures). One compiled loop can. A C compiler is what Triton and
`torch.compile` ask for too; where there is none, `unavailable` says so and nothing is lost but speed.

Rejected: building with the wheel (a wheel for each platform and processor, for one loop), torch's C++ extensions
(headers and ninja), OpenMP (a second pool of threads beside torch's; the rows are shared out in `cpu.py`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

# Contraction makes one instruction of a product and a sum. Dequantizing is a difference and a product, and stays exact.
# No function of ours hands vectors to another, so how they would be passed (psabi) is no matter.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-Wno-psabi", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
SECONDS = 120  # ten times what it took on the slowest machine seen


class Library:
    """The functions of `cpu.c`, or why there are none."""

    def __init__(self, handle: ctypes.CDLL | None, problem: str | None) -> None:
        self.handle, self.problem = handle, problem


@functools.cache
def load() -> Library:
    """Compiled at most once in a process; never raises."""
    if sys.byteorder != "little":
        return Library(None, "the stored words are little-endian, this processor is not")
    command = _compiler()
    if command is None:
        return Library(None, f"no C compiler: none of {', '.join(COMPILERS)} is installed, and $CC is not set")
    try:
        return Library(_open(_build(command)), None)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no message"])[0]
        return Library(None, f"{command[0]} could not compile it: {reason}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Library(None, f"{command[0]} could not compile it: {error}")


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "llmmpq_prepare": (pointer, pointer, number, number, pointer, pointer),
        "llmmpq_multiply": (pointer, pointer, number, number, pointer, pointer, number, number),
        "llmmpq_dequantize": (pointer, pointer, number, number),
    }
    for name, arguments in signatures.items():
        getattr(library, name).argtypes, getattr(library, name).restype = arguments, None
    return library


def _compiler() -> list[str] | None:
    wanted = shlex.split(os.environ.get("CC", ""))
    if wanted:
        return wanted
    return next(([found] for name in COMPILERS if (found := shutil.which(name))), None)


def _build(command: list[str]) -> Path:
    source = (files(__package__) / "cpu.c").read_text(encoding="utf-8")
    version = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=True, timeout=SECONDS
    ).stdout
    made_of = "\0".join([source, version, *command, *FLAGS, platform.machine(), _processor()])
    name = f"cpu-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    for folder in (_cache_folder(), Path(tempfile.gettempdir()) / f"llmmpq-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.getuid():
                continue  # what another user may have put there is not loaded
            return _compile(command, source, folder / name)
        except PermissionError:
            continue
    raise OSError(f"no folder to write to: {_cache_folder()}")


def _compile(command: list[str], source: str, target: Path) -> Path:
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        file = Path(folder) / "cpu.c"
        file.write_text(source, encoding="utf-8")
        built = file.with_suffix(".so")
        arguments = [*command, *FLAGS, str(file), "-o", str(built)]
        subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=SECONDS)
        os.replace(built, target)  # whole or not at all, whoever else builds it meanwhile
    return target


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "llmmpq"


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features")})
    )
