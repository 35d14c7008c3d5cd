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
import stat
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


class CompilerError(Exception):
    """The compiler could not be run, or did not take the source."""


@functools.cache
def load() -> Library:
    """Compiled at most once in a process; never raises."""
    try:
        return _load()
    except CompilerError as error:
        return Library(None, str(error))
    except Exception as error:  # a model must run without it, whatever is wrong with this machine
        return Library(None, f"the compiled loops could not be set up: {type(error).__name__}: {error}")


def _load() -> Library:
    if sys.byteorder != "little":
        return Library(None, "the stored words are little-endian, this processor is not")
    if not hasattr(os, "getuid"):
        return Library(None, f"the compiled loops were never tried on {sys.platform}")
    command = _compiler()
    if command is None:
        return Library(None, f"no C compiler: none of {', '.join(COMPILERS)} is installed, and $CC is not set")
    source = (files(__package__) / "cpu.c").read_text(encoding="utf-8")
    made_of = "\0".join([source, _run(command, "--version"), *command, *FLAGS, platform.machine(), _processor()])
    name = f"cpu-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    problems = []
    for folder_of in (_cache_folder, _temporary_folder):
        try:
            folder = folder_of()
            _make_private(folder)
            return Library(_open_or_compile(command, source, folder / name), None)
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
            problems.append(str(error))
    return Library(None, f"no folder to keep the compiled loops in: {'; '.join(problems)}")


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "llmmpq_prepare": (pointer, number, pointer, number),
        "llmmpq_multiply": (pointer, number, number, number, number),
        "llmmpq_dequantize": (pointer, pointer, number, number),
    }
    for name, arguments in signatures.items():
        getattr(library, name).argtypes, getattr(library, name).restype = arguments, None
    return library


def _compiler() -> list[str] | None:
    value = os.environ.get("CC", "")
    try:
        wanted = shlex.split(value)
    except ValueError as error:
        raise CompilerError(f"$CC is {value!r}, which is no command: {error}") from error
    if wanted:
        return wanted
    return next(([found] for name in COMPILERS if (found := shutil.which(name))), None)


def _run(command: list[str], *arguments: str) -> str:
    try:
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, errors="replace", check=True, timeout=SECONDS
        )
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}, no message"])[0]
        raise CompilerError(f"{command[0]} could not compile it: {reason}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]} could not compile it: {error}") from error
    return done.stdout


def _make_private(folder: Path) -> None:
    """What another user may have put there is not loaded: it would run as this one."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if {folder.lstat().st_uid, folder.stat().st_uid} != {os.getuid()}:
        raise PermissionError(f"{folder} belongs to another user")
    if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} may be written by others: chmod go-w it")


def _open_or_compile(command: list[str], source: str, target: Path) -> ctypes.CDLL:
    if target.is_file() and _is_whole(target):
        try:
            return _open(target)
        except (OSError, AttributeError):  # damaged: built again, in its place
            pass
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        file = Path(folder) / "cpu.c"
        file.write_text(source, encoding="utf-8")
        built = file.with_suffix(".so")
        _run(command, *FLAGS, str(file), "-o", str(built))
        content = built.read_bytes()
        built.write_bytes(content + hashlib.sha256(content).digest())  # what follows a library is not read
        os.replace(built, target)  # whole or not at all, whoever else builds it meanwhile
    return _open(target)


def _is_whole(library: Path) -> bool:
    """Opening a file that was cut short would end the process, not raise."""
    content = library.read_bytes()
    digest_nbytes = hashlib.sha256().digest_size
    return content[-digest_nbytes:] == hashlib.sha256(content[:-digest_nbytes]).digest()


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "llmmpq"


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"llmmpq-{os.getuid()}"


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features")})
    )
