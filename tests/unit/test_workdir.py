"""The work folder: nothing half-written is ever loaded, nothing that still fits is done again, two runs never meet."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from llmmpq import digest, workdir
from llmmpq.digest import cached_digests, digest_of, file_sha256
from llmmpq.errors import CheckpointError
from llmmpq.workdir import WorkDir

NOTES = {"a": {"algorithm": "gptq", "damping": 0.01}, "losses": [0.1, 1e-300, 3.0000000000000004]}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.words": torch.randint(-(2**31), 2**31, (5, 8), generator=generator, dtype=torch.int32),
        "a.scales": torch.randn(5, 2, generator=generator).half(),
    }


@pytest.fixture
def work(tmp_path):
    with WorkDir(tmp_path / "work") as work:
        yield work


@pytest.fixture
def stage(work):
    return work.stage("quantize", {"model": "m", "bits": 4})


def assert_holds(stage, index: int) -> None:
    notes, found = stage.load_block(index)
    assert notes == NOTES
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


# Blocks


def test_a_block_comes_back_as_it_was_saved(stage):
    assert stage.load_block(3) is None
    stage.save_block(3, NOTES, tensors())
    assert_holds(stage, 3)
    assert stage.load_block(2) is None


def test_notes_alone_can_be_saved(stage):
    stage.save_block(0, {"losses": {"x": [1.5]}}, {})
    assert stage.load_block(0) == ({"losses": {"x": [1.5]}}, {})


def test_saving_again_replaces(stage):
    stage.save_block(0, {}, {"a": torch.zeros(3)})
    stage.save_block(0, NOTES, tensors())
    assert_holds(stage, 0)


def test_what_was_loaded_outlives_the_file(stage):
    stage.save_block(0, NOTES, tensors())
    _, found = stage.load_block(0)
    path = stage.block_file(0)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


@pytest.mark.parametrize("left", [0, 4, 60, -1])
def test_a_truncated_block_is_done_again(stage, left):
    stage.save_block(0, NOTES, tensors())
    path = stage.block_file(0)
    path.write_bytes(path.read_bytes()[:left])
    assert stage.load_block(0) is None
    assert not path.exists()
    stage.save_block(0, NOTES, tensors())
    assert_holds(stage, 0)


@pytest.mark.parametrize("metadata", [None, {}, {"notes": "{"}, {"other": "{}"}])
def test_a_block_without_notes_is_done_again(stage, metadata):
    save_file({"a": torch.ones(2)}, stage.block_file(0), metadata)
    assert stage.load_block(0) is None


def test_a_block_of_something_else_is_done_again(stage):
    stage.block_file(0).write_bytes(os.urandom(1000))
    assert stage.load_block(0) is None


@pytest.mark.parametrize("where", ["notes", "tensor"])
def test_a_block_with_a_flipped_bit_is_done_again(stage, where):
    stage.save_block(0, NOTES, tensors())
    path = stage.block_file(0)
    data = bytearray(path.read_bytes())
    data[data.index(b"gptq") if where == "notes" else -1] ^= 1
    path.write_bytes(data)
    assert stage.load_block(0) is None


class Killed(BaseException):
    """As a signal would: nothing on the way catches it."""


@pytest.mark.parametrize("at", ["write", "sync", "rename"])
def test_an_interrupted_save_leaves_nothing_to_load(stage, work, monkeypatch, at):
    def killed(*_args, **_options):
        raise Killed

    with monkeypatch.context() as patch:
        if at == "write":

            def half(_tensors, path, _metadata):
                path.write_bytes(b"\x10")
                raise Killed

            patch.setattr(workdir, "save_file", half)
        elif at == "sync":
            patch.setattr(workdir.os, "fsync", killed)
        else:
            patch.setattr(workdir.Path, "replace", killed)
        with pytest.raises(Killed):
            stage.save_block(0, NOTES, tensors())
    again = work.stage("quantize", {"model": "m", "bits": 4})
    assert again.load_block(0) is None
    again.save_block(0, NOTES, tensors())
    assert_holds(again, 0)


@pytest.mark.parametrize("at", ["sync", "rename"])
def test_an_interrupted_result_is_no_result(stage, work, monkeypatch, at):
    def killed(*_args, **_options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(*((workdir.os, "fsync", killed) if at == "sync" else (workdir.Path, "replace", killed)))
        with pytest.raises(Killed):
            stage.save_result({"x": 1})
    assert work.stage("quantize", {"model": "m", "bits": 4}).load_result() is None


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_is_a_checkpoint_error_and_harms_nothing(stage, monkeypatch, existing):
    if existing:
        stage.save_block(0, NOTES, tensors())
        stage.save_result({"x": 1})

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(workdir.os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"block-0000.*No space left on device.*--work-dir"):
            stage.save_block(0, {}, {})
        with pytest.raises(CheckpointError, match=r"result\.json.*No space left on device"):
            stage.save_result({})
    assert list(stage.folder.glob("*.partial")) == []
    if existing:
        assert_holds(stage, 0)
        assert stage.load_result() == {"x": 1}
    else:
        assert stage.load_block(0) is stage.load_result() is None


def test_the_result_comes_back_as_it_was_saved(stage, work):
    assert stage.load_result() is None
    stage.save_result({"losses": [0.1, 1e-300], "name": "é"})
    assert work.stage("quantize", {"model": "m", "bits": 4}).load_result() == {"losses": [0.1, 1e-300], "name": "é"}


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe"])
def test_a_damaged_result_is_made_again(stage, data):
    """A disk error must cost a measurement, not end every further run with a traceback."""
    stage.save_result({"x": 1})
    (stage.folder / "result.json").write_bytes(data)
    assert stage.load_result() is None


# Inputs


def test_equal_inputs_find_the_same_results(work):
    one = work.stage("measure", {"b": [1, 2], "a": {"y": 1, "x": 2}})
    one.save_block(0, NOTES, tensors())
    two = work.stage("measure", {"a": {"x": 2, "y": 1}, "b": [1, 2]})
    assert two.folder == one.folder
    assert two.changed == []
    assert_holds(two, 0)


@pytest.mark.parametrize("other", [{"bits": 8, "model": "m"}, {"bits": 4}, {"bits": 4, "model": "m", "more": 1}])
def test_other_inputs_find_nothing_and_leave_the_rest_alone(work, other):
    one = work.stage("quantize", {"bits": 4, "model": "m"})
    one.save_block(0, NOTES, tensors())
    two = work.stage("quantize", other)
    assert two.folder != one.folder
    assert two.load_block(0) is two.load_result() is None
    assert_holds(work.stage("quantize", {"bits": 4, "model": "m"}), 0)


def test_another_stage_with_equal_inputs_is_another_place(work):
    work.stage("measure", {"x": 1}).save_result({"x": 1})
    other = work.stage("quantize", {"x": 1})
    assert other.load_result() is None
    assert other.changed == []


def test_another_version_of_the_algorithms_finds_nothing(work, monkeypatch):
    work.stage("measure", {"x": 1}).save_result({"x": 1})
    monkeypatch.setattr(workdir, "ALGORITHM_VERSION", workdir.ALGORITHM_VERSION + 1)
    later = work.stage("measure", {"x": 1})
    assert later.load_result() is None
    assert later.changed == ["algorithm_version"]


def test_changed_inputs_are_named(work):
    first = {"model": {"model.safetensors": "abc"}, "numerics": {"batch": 1}, "tokens": "t"}
    assert work.stage("measure", first).changed == []
    assert work.stage("measure", first | {"numerics": {"batch": 2}, "tokens": "u"}).changed == ["numerics", "tokens"]
    assert work.stage("measure", {k: v for k, v in first.items() if k != "tokens"}).changed == ["numerics", "tokens"]


def test_changes_are_named_against_the_latest_other_run(work):
    for number, inputs in enumerate(({"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 2, "b": 2})):
        stage = work.stage("measure", inputs)
        stamp = 10**18 + number * 10**9
        os.utime(stage.folder / "inputs.json", ns=(stamp, stamp))
    assert work.stage("measure", {"a": 2, "b": 3}).changed == ["b"]
    assert work.stage("measure", {"a": 2, "b": 1}).changed == []  # found, not new


def test_a_tuple_is_no_change(work):
    """JSON knows only lists; a tuple that stayed the same must not be called changed."""
    work.stage("measure", {"widths": (2, 3), "x": 1})
    assert work.stage("measure", {"widths": (2, 3), "x": 2}).changed == ["x"]


def test_a_damaged_record_of_inputs_is_passed_over(work):
    stage = work.stage("measure", {"x": 1})
    (stage.folder / "inputs.json").write_text("{")
    assert work.stage("measure", {"x": 2}).changed == []


def test_discarding_frees_the_disk(stage, work):
    stage.save_block(0, NOTES, tensors())
    stage.discard()
    assert not stage.folder.exists()
    assert work.stage("quantize", {"model": "m", "bits": 4}).load_block(0) is None


# The lock


def test_a_second_user_is_refused_and_the_first_unharmed(tmp_path):
    with WorkDir(tmp_path) as work:
        stage = work.stage("measure", {})
        with pytest.raises(CheckpointError, match="another llmmpq is at work"):
            WorkDir(tmp_path)
        stage.save_result({"x": 1})
    with WorkDir(tmp_path) as work:
        assert work.stage("measure", {}).load_result() == {"x": 1}


def test_a_second_process_is_refused_until_the_first_dies(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom llmmpq.workdir import WorkDir\n"
        "work = WorkDir(Path(sys.argv[1]))\nprint('locked', flush=True)\ntime.sleep(100)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(CheckpointError, match="another llmmpq is at work"):
            WorkDir(tmp_path)
        process.kill()
        process.wait()
        WorkDir(tmp_path).__exit__()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_lock_is_dropped_when_the_work_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), WorkDir(tmp_path):
        raise ZeroDivisionError
    WorkDir(tmp_path).__exit__()


def test_a_work_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot use the work folder .*file.*--work-dir"):
        WorkDir(tmp_path / "file" / "work")


# Digests


def test_digests_know_values_not_their_order():
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    different = [{"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": [1]}, {"a": None}, {"b": 1}, {"a": [1, 2]}, {"a": [2, 1]}, {}]
    assert len({digest_of(value) for value in different}) == len(different)


def test_file_digests_in_small_reads(tmp_path, monkeypatch):
    data = os.urandom(1000)
    (tmp_path / "x").write_bytes(data)
    monkeypatch.setattr(digest, "HASH_CHUNK_NBYTES", 64)
    counted = []
    assert file_sha256(tmp_path / "x", advance=counted.append) == hashlib.sha256(data).hexdigest()
    assert (sum(counted), len(counted)) == (1000, 16)


@pytest.fixture
def hashed(monkeypatch):
    names, original = [], digest.file_sha256
    monkeypatch.setattr(digest, "file_sha256", lambda path, **o: names.append(path.name) or original(path, **o))
    return names


def test_cached_digests_are_made_once_and_again_after_a_change(tmp_path, hashed):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text(path.name)
    cache = tmp_path / "cache.json"
    first = cached_digests(paths, cache)
    assert first == {path.name: file_sha256(path) for path in paths}
    counted = []
    assert cached_digests(paths, cache, advance=counted.append) == first
    assert hashed == ["a", "b"]
    assert sum(counted) == 2
    paths[0].write_text("A")  # of the same size
    os.utime(paths[0], ns=(1, 1))
    assert cached_digests(paths, cache)["a"] == file_sha256(paths[0]) != first["a"]
    assert hashed == ["a", "b", "a"]


def test_cached_digests_follow_links(tmp_path, hashed):
    """Files of the Hub's cache are links to blobs: the name is the link's, the content the blob's."""
    (tmp_path / "blob").write_text("x")
    (tmp_path / "model.safetensors").symlink_to("blob")
    assert cached_digests([tmp_path / "model.safetensors"], tmp_path / "cache.json") == {
        "model.safetensors": file_sha256(tmp_path / "blob")
    }


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"x": null}'])
def test_a_damaged_cache_of_digests_is_made_again(tmp_path, text):
    (tmp_path / "a").write_text("a")
    cache = tmp_path / "cache.json"
    cache.write_text(text)
    assert cached_digests([tmp_path / "a"], cache) == {"a": file_sha256(tmp_path / "a")}
    assert str((tmp_path / "a").resolve()) in json.loads(cache.read_text())
