"""Digests of values and files: what stages use to know whether an artifact still fits its inputs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HASH_CHUNK_NBYTES = 8 << 20


def digest_of(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path, *, advance: Callable[[int], None] = lambda num: None) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_NBYTES):
            hasher.update(chunk)
            advance(len(chunk))
    return hasher.hexdigest()


def cached_digests(
    paths: Iterable[Path], cache_file: Path, *, advance: Callable[[int], None] = lambda num: None
) -> dict[str, str]:
    """File name -> sha256, reusing what `cache_file` knows of files whose size, time and inode are unchanged."""
    try:
        cache = json.loads(cache_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        cache = {}
    if not isinstance(cache, dict):
        cache = {}
    digests = {}
    for path in paths:
        real = path.resolve()
        status = real.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = cache.get(str(real))
        if not isinstance(known, list) or known[:3] != stamp or len(known) != 4:
            cache[str(real)] = known = [*stamp, file_sha256(real, advance=advance)]
        else:
            advance(status.st_size)
        digests[path.name] = known[3]
    partial = cache_file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(cache, indent=1), encoding="utf-8")
    partial.replace(cache_file)
    return digests
