"""How the loops for CPUs are compiled and kept, and what happens where they cannot be."""

import os
import subprocess
import sys
import tempfile

import pytest

from llmmpq_kernels import native

needs_a_compiler = pytest.mark.skipif(native.load().problem is not None, reason=str(native.load().problem))


@pytest.fixture
def fresh_load(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    native.load.cache_clear()
    yield native.load
    native.load.cache_clear()


def test_without_a_compiler_the_reason_is_said(fresh_load, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler" in fresh_load().problem


def test_a_compiler_that_fails_is_quoted(fresh_load, monkeypatch):
    monkeypatch.setenv("CC", "false")
    assert "false could not compile it" in fresh_load().problem
    monkeypatch.setenv("CC", "/no/such/compiler --here")
    fresh_load.cache_clear()
    assert "/no/such/compiler could not compile it" in fresh_load().problem


@needs_a_compiler
def test_it_is_compiled_once_for_all_processes(fresh_load, monkeypatch, tmp_path):
    assert fresh_load().problem is None
    (built,) = (tmp_path / "llmmpq").iterdir()
    written = built.stat().st_mtime_ns
    fresh_load.cache_clear()
    assert fresh_load().problem is None
    assert [built.stat().st_mtime_ns] == [file.stat().st_mtime_ns for file in (tmp_path / "llmmpq").iterdir()]
    assert built.stat().st_mtime_ns == written


def test_a_command_that_cannot_be_read_is_quoted(fresh_load, monkeypatch):
    monkeypatch.setenv("CC", "gcc 'open")
    assert '$CC is "gcc \'open", which is no command' in fresh_load().problem


def libraries(folder):
    return sorted(path.name for path in folder.rglob("*.so"))


@needs_a_compiler
def test_a_damaged_library_is_built_again(fresh_load, monkeypatch, tmp_path):
    assert fresh_load().problem is None
    (built,) = (tmp_path / "llmmpq").iterdir()
    # Elsewhere: the loader goes by the path, and has this one already.
    damaged = tmp_path / "other" / "llmmpq" / built.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(built.read_bytes()[:1000])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    fresh_load.cache_clear()
    assert fresh_load().problem is None
    assert damaged.stat().st_size == built.stat().st_size
    assert libraries(tmp_path / "temporary") == []


@needs_a_compiler
@pytest.mark.parametrize("kind", ["a file", "writable", "no home"])
def test_a_cache_folder_that_will_not_do_gives_way_to_the_temporary_one(fresh_load, monkeypatch, tmp_path, kind):
    folder = tmp_path / "llmmpq"
    if kind == "a file":
        folder.write_text("")
    elif kind == "writable":
        folder.mkdir()
        folder.chmod(0o777)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")

        def fail():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(native.Path, "home", fail)
    assert fresh_load().problem is None
    assert not folder.is_dir() or not libraries(folder)
    assert len(libraries(tmp_path / "temporary")) == 1


@needs_a_compiler
def test_without_a_folder_the_folders_are_blamed(fresh_load, monkeypatch, tmp_path):
    for folder in (tmp_path / "llmmpq", tmp_path / "temporary" / f"llmmpq-{os.getuid()}"):
        folder.mkdir()
        folder.chmod(0o777)
    problem = fresh_load().problem
    assert problem.startswith("no folder to keep the compiled loops in")
    assert problem.count("may be written by others") == 2
    assert "could not compile" not in problem


@needs_a_compiler
def test_a_folder_of_another_user_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        native._make_private(tmp_path / "folder")


SCRIPT = """
import torch
from llmmpq.records import Scheme
from llmmpq.runtime.linear import PackedLinear
for size in (64, 96):
    linear = PackedLinear((size, size), Scheme(bits=4, group_size=32), device="cpu")
    for rows in (1, 5):
        linear(torch.zeros(rows, size))
"""


def test_the_reference_says_once_why_it_runs():
    command = [sys.executable, "-W", "always::RuntimeWarning", "-c", SCRIPT]
    environment = os.environ | {"CC": "/bin/false", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the slow reference runs in their place: /bin/false could not compile it") == 1
