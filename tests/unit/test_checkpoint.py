"""Reading model folders lazily, refusing damaged ones, and writing shards that every other reader agrees with."""

import hashlib
import json
import resource
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmmpq.errors import CheckpointError
from llmmpq.model import checkpoint as module
from llmmpq.model.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    TORCH_DTYPES,
    Checkpoint,
    OutputTensor,
    write_bytes,
    write_checkpoint,
)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def one_of_each() -> dict[str, torch.Tensor]:
    """Every readable dtype, in sizes that would leave the next tensor misaligned."""
    tensors = {f"{dtype}.t": random_tensor(dtype, (3, 5), seed) for seed, dtype in enumerate(TORCH_DTYPES.values())}
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "a.byte": torch.tensor([7], dtype=torch.uint8),
    }


def sharded(folder, shards: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    weight_map = {}
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def point_index_at(folder, file: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": file}}))


def output(name: str, tensor: torch.Tensor, pieces: int = 1) -> OutputTensor:
    return OutputTensor(
        name=name,
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        chunks=lambda: tensor.chunk(pieces) if pieces > 1 else [tensor],
    )


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name


# Reading


def test_a_single_file_is_read_as_safetensors_reads_it(tmp_path):
    save_file(one_of_each(), tmp_path / SINGLE_FILE)
    checkpoint = Checkpoint.open(tmp_path)
    expected = load_file(tmp_path / SINGLE_FILE)
    assert_same(checkpoint.read(expected), expected)
    assert {name: entry.shape for name, entry in checkpoint.entries.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.files == [tmp_path / SINGLE_FILE]


def test_shards_are_read_through_their_index(tmp_path):
    expected = sharded(
        tmp_path,
        {"one.safetensors": {"a": torch.ones(2), "c": torch.zeros(3)}, "two.safetensors": {"b": torch.arange(4.0)}},
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert_same(checkpoint.read(["c", "b", "a"]), expected)
    assert [path.name for path in checkpoint.files] == ["one.safetensors", "two.safetensors"]


def test_the_index_decides_between_two_shards_with_the_same_tensor(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "old.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "zzz.safetensors")
    save_file({"b": torch.ones(2), "a": torch.full((2,), 9.0)}, tmp_path / "other.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "old.safetensors", "b": "other.safetensors"}}))
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.read(["a"])["a"], torch.zeros(2))
    assert checkpoint.read(["a", "b"]).keys() == {"a", "b"}


def test_a_single_file_beside_an_index_is_what_transformers_reads(tmp_path):
    """Left behind when a model was saved again in another number of shards: the same weights must be quantized."""
    sharded(tmp_path, {"old.safetensors": {"a": torch.zeros(2)}})
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE_FILE)
    assert torch.equal(Checkpoint.open(tmp_path).read(["a"])["a"], torch.ones(2))


def test_a_weight_that_the_compute_dtype_cannot_hold_is_not_called_damage(tmp_path):
    save_file({"w": torch.tensor([1e6, 2.0])}, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="float16") as caught:
        Checkpoint.open(tmp_path).read(["w"], dtype=torch.float16)
    assert "damaged" not in str(caught.value)


def test_reading_casts_only_floating_point(tmp_path):
    save_file({"w": torch.tensor([1.5, 2.25]), "ids": torch.tensor([1, 2])}, tmp_path / SINGLE_FILE)
    tensors = Checkpoint.open(tmp_path).read(["w", "ids"], dtype=torch.bfloat16)
    assert_same(tensors, {"w": torch.tensor([1.5, 2.25], dtype=torch.bfloat16), "ids": torch.tensor([1, 2])})


def test_what_is_read_is_a_copy_and_outlives_the_file(tmp_path):
    path = tmp_path / SINGLE_FILE
    save_file({"w": torch.arange(1000.0)}, path)
    tensor = Checkpoint.open(tmp_path).read(["w"])["w"]
    tensor.add_(1)
    assert torch.equal(load_file(path)["w"], torch.arange(1000.0))
    # Overwritten in place, a mapped tensor would change under our feet.
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(tensor, torch.arange(1000.0) + 1)


def test_opening_reads_no_weights(tmp_path, monkeypatch):
    save_file({"w": torch.tensor([float("nan")])}, tmp_path / SINGLE_FILE)
    reads = []
    monkeypatch.setattr(module, "is_finite", lambda tensor: reads.append("w") or True)
    checkpoint = Checkpoint.open(tmp_path)
    assert reads == []
    checkpoint.read(["w"])
    assert reads == ["w"]


@pytest.mark.parametrize("num_rows", [1, 7, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_row_chunks_are_bounded_and_make_up_the_tensor(tmp_path, monkeypatch, dtype, num_rows):
    monkeypatch.setattr(module, "COPY_CHUNK_NBYTES", 256)
    expected = random_tensor(dtype, (num_rows, 6, 2))
    save_file({"w": expected}, tmp_path / SINGLE_FILE)
    chunks = list(Checkpoint.open(tmp_path).row_chunks("w"))
    assert torch.equal(torch.cat(chunks), expected)
    assert all(chunk.nbytes <= 256 for chunk in chunks)
    assert len(chunks) >= -(-expected.nbytes // 256)


def test_a_row_above_the_chunk_size_is_one_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COPY_CHUNK_NBYTES", 16)
    expected = torch.randn(3, 100)
    save_file({"w": expected}, tmp_path / SINGLE_FILE)
    chunks = list(Checkpoint.open(tmp_path).row_chunks("w"))
    assert [tuple(chunk.shape) for chunk in chunks] == [(1, 100)] * 3
    assert torch.equal(torch.cat(chunks), expected)


def test_row_chunks_of_a_scalar_and_of_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COPY_CHUNK_NBYTES", 1)
    save_file({"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}, tmp_path / SINGLE_FILE)
    checkpoint = Checkpoint.open(tmp_path)
    assert [float(chunk) for chunk in checkpoint.row_chunks("scalar")] == [3.0]
    assert sum(chunk.numel() for chunk in checkpoint.row_chunks("empty")) == 0


# Damage


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_bad_weight_is_named_with_its_file(tmp_path, dtype, bad):
    weight = torch.ones(40, 3, dtype=dtype)
    weight[17, 1] = weight[30, 2] = bad
    sharded(tmp_path, {"one.safetensors": {"fine": torch.ones(2)}, "two.safetensors": {"blocks.0.w": weight}})
    checkpoint = Checkpoint.open(tmp_path)
    for read in (lambda: checkpoint.read(["blocks.0.w"]), lambda: checkpoint.check_finite(["fine", "blocks.0.w"])):
        with pytest.raises(CheckpointError, match=r"(?s)'blocks\.0\.w'.*two\.safetensors.*\b2 NaN or infinite"):
            read()
    assert checkpoint.read(["fine"]).keys() == {"fine"}


def test_a_bad_weight_in_the_last_chunk_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COPY_CHUNK_NBYTES", 64)
    weight = torch.ones(50, 4)
    weight[-1, -1] = float("nan")
    save_file({"w": weight}, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="'w'"):
        Checkpoint.open(tmp_path).check_finite(["w"])


def test_opposite_infinities_do_not_cancel_and_large_sums_are_no_damage(tmp_path):
    huge = torch.full((8,), 3e38)
    save_file({"both": torch.tensor([float("inf"), -float("inf")]), "huge": huge}, tmp_path / SINGLE_FILE)
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.read(["huge"])["huge"], huge)
    with pytest.raises(CheckpointError, match="2 NaN or infinite"):
        checkpoint.read(["both"])


@pytest.mark.parametrize("left", [0, 4, 50, -1])
def test_a_truncated_shard_is_named_with_its_size(tmp_path, left):
    sharded(tmp_path, {"one.safetensors": {"a": torch.ones(9)}, "two.safetensors": {"b": torch.ones(9)}})
    path = tmp_path / "two.safetensors"
    data = path.read_bytes()[:left]
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"two\.safetensors \({len(data)} bytes\).*truncated or damaged"):
        Checkpoint.open(tmp_path)


def test_an_index_that_names_a_missing_shard(tmp_path):
    sharded(tmp_path, {"one.safetensors": {"a": torch.ones(9)}, "two.safetensors": {"b": torch.ones(9)}})
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors, which is missing"):
        Checkpoint.open(tmp_path)


def test_an_index_that_names_a_tensor_its_shard_does_not_hold(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX_FILE).write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "lost.weight": "one.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"'lost\.weight' in one\.safetensors, which does not hold it"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "..",
        ".",
        "",
        "sub/x.safetensors",
        "sub\\x.safetensors",
        "..\\x.safetensors",
        "/x.safetensors",
        "x.bin",
        "pytorch_model.pt",
        3,
        None,
        ["x.safetensors"],
    ],
)
def test_a_shard_outside_the_folder_is_never_opened(tmp_path, file, monkeypatch):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder, folder / "sub"):
        for name in ("x.safetensors", "x.bin", "sub\\x.safetensors", "..\\x.safetensors"):
            save_file({"a": torch.ones(2)}, place / name)
    point_index_at(folder, file)
    monkeypatch.setattr(module, "safe_open", lambda *_a, **_k: pytest.fail("opened"))
    with pytest.raises(CheckpointError, match="inside the model folder"):
        Checkpoint.open(folder)


def test_an_absolute_path_is_refused_although_it_points_into_the_folder(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    point_index_at(tmp_path, str(tmp_path / "x.safetensors"))
    with pytest.raises(CheckpointError, match="inside the model folder"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {}}', '{"weight_map": []}', "{}", "3", '"weight_map"'])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint.open(tmp_path)


def test_an_index_that_is_not_text_is_named(tmp_path):
    (tmp_path / INDEX_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=rf"only pickled weights \({name}\).*run code"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="not a model folder"):
        Checkpoint.open(tmp_path)


def test_an_unknown_dtype_is_named_with_its_tensor(tmp_path):
    save_file({"w": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"'w' in .*model\.safetensors has dtype F8_E4M3; readable are F64"):
        Checkpoint.open(tmp_path)


# Writing


def test_what_is_written_reads_back_identically(tmp_path):
    tensors = one_of_each()
    counted = []
    digests = write_checkpoint(
        tmp_path, [output(n, t) for n, t in tensors.items()], max_shard_nbytes=1 << 30, on_bytes=counted.append
    )
    assert_same(load_file(tmp_path / SINGLE_FILE), tensors)
    assert_same(Checkpoint.open(tmp_path).read(tensors), tensors)
    assert digests == {SINGLE_FILE: hashlib.sha256((tmp_path / SINGLE_FILE).read_bytes()).hexdigest()}
    assert sum(counted) == sum(tensor.nbytes for tensor in tensors.values())
    with safe_open(tmp_path / SINGLE_FILE, framework="pt") as stored:
        assert stored.metadata() == {"format": "pt"}  # without it transformers refuses the file


def test_every_tensor_is_aligned_to_its_element(tmp_path):
    # Names in the worst order: a byte first would misalign all that follow.
    tensors = {
        "a": torch.ones(2, dtype=torch.uint8),
        "b": torch.ones(3, dtype=torch.float16),
        "c": torch.ones(5, dtype=torch.float64),
        "d": torch.ones(1, dtype=torch.int32),
        "a long name to move the end of the header": torch.ones(1, dtype=torch.bool),
    }
    write_checkpoint(tmp_path, [output(n, t) for n, t in tensors.items()], max_shard_nbytes=1 << 30)
    data = (tmp_path / SINGLE_FILE).read_bytes()
    header_nbytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_nbytes])
    assert header_nbytes % 8 == 0
    for name, tensor in tensors.items():
        start, stop = header[name]["data_offsets"]
        assert (8 + header_nbytes + start) % tensor.element_size() == 0
        assert data[8 + header_nbytes :][start:stop] == tensor.numpy().tobytes()


def test_the_order_within_a_shard_does_not_depend_on_the_order_given(tmp_path):
    tensors = one_of_each()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = write_checkpoint(tmp_path / "one", [output(n, t) for n, t in tensors.items()], max_shard_nbytes=1 << 30)
    backwards = reversed(tensors.items())
    assert one == write_checkpoint(tmp_path / "two", [output(n, t) for n, t in backwards], max_shard_nbytes=1 << 30)


@pytest.mark.parametrize("limit", [1, 100, 160, 1000])
def test_shards_stay_within_the_limit(tmp_path, limit):
    tensors = {f"t{i}": torch.full((5 + i,), float(i)) for i in range(12)}
    digests = write_checkpoint(tmp_path, [output(n, t) for n, t in tensors.items()], max_shard_nbytes=limit)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    for number, shard in enumerate(shards, start=1):
        held = load_file(tmp_path / shard)
        assert held
        # Only a tensor that is larger by itself may pass the limit.
        assert sum(tensor.nbytes for tensor in held.values()) <= limit or len(held) == 1
        if len(shards) > 1:
            assert shard == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    assert (tmp_path / INDEX_FILE).exists() == (len(shards) > 1)
    assert_same(Checkpoint.open(tmp_path).read(tensors), tensors)
    written = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert digests == written
    if len(shards) > 1:
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_shards_are_filled_before_a_new_one_is_begun(tmp_path):
    tensors = {f"t{i}": torch.zeros(10) for i in range(6)}
    write_checkpoint(tmp_path, [output(n, t) for n, t in tensors.items()], max_shard_nbytes=80)
    assert [sorted(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))] == [
        ["t0", "t1"],
        ["t2", "t3"],
        ["t4", "t5"],
    ]


def test_tensors_arrive_in_pieces_and_need_not_be_contiguous(tmp_path):
    tensor = torch.arange(60.0).reshape(6, 10)
    tensors = [output("pieces", tensor, pieces=4), output("transposed", tensor.t())]
    write_checkpoint(tmp_path, tensors, max_shard_nbytes=1 << 30)
    assert_same(load_file(tmp_path / SINGLE_FILE), {"pieces": tensor, "transposed": tensor.t()})


def test_chunks_are_asked_for_one_tensor_at_a_time(tmp_path):
    alive, most = 0, 0

    def chunks():
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        yield torch.zeros(4)
        alive -= 1

    tensors = [OutputTensor(name=f"t{i}", dtype=torch.float32, shape=(4,), chunks=chunks) for i in range(5)]
    write_checkpoint(tmp_path, tensors, max_shard_nbytes=40)
    assert (alive, most) == (0, 1)


def test_a_copy_through_row_chunks_is_identical(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COPY_CHUNK_NBYTES", 100)
    (tmp_path / "out").mkdir()
    tensors = {"w": torch.randn(33, 7), "b": torch.randn(5).half()}
    save_file(tensors, tmp_path / SINGLE_FILE)
    source = Checkpoint.open(tmp_path)
    planned = [
        OutputTensor(
            name=name,
            dtype=TORCH_DTYPES[entry.dtype],
            shape=entry.shape,
            chunks=lambda name=name: source.row_chunks(name),
        )
        for name, entry in source.entries.items()
    ]
    counted = []
    write_checkpoint(tmp_path / "out", planned, max_shard_nbytes=1 << 30, on_bytes=counted.append)
    assert_same(load_file(tmp_path / "out" / SINGLE_FILE), tensors)
    assert len(counted) > 2


@pytest.mark.parametrize("rows", [1, 3])
def test_a_wrong_size_is_refused(tmp_path, rows):
    tensor = OutputTensor(name="w", dtype=torch.float32, shape=(2, 4), chunks=lambda: [torch.zeros(rows, 4)])
    with pytest.raises(CheckpointError, match=f"w: planned 32 bytes, got {rows * 16}"):
        write_checkpoint(tmp_path, [tensor], max_shard_nbytes=1 << 30)


def test_a_wrong_dtype_is_refused(tmp_path):
    tensor = OutputTensor(name="w", dtype=torch.float32, shape=(4,), chunks=lambda: [torch.zeros(4, dtype=torch.int32)])
    with pytest.raises(CheckpointError, match=r"w: planned as torch\.float32, got torch\.int32"):
        write_checkpoint(tmp_path, [tensor], max_shard_nbytes=1 << 30)


FILL_THE_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from llmmpq.errors import CheckpointError
from llmmpq.model.checkpoint import OutputTensor, write_bytes, write_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG, as a full disk does with ENOSPC
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
folder = Path(sys.argv[1])
tensor = OutputTensor(name="w", dtype=torch.float32, shape=(1000, 64), chunks=lambda: [torch.zeros(1000, 64)])
for write in (
    lambda: write_checkpoint(folder, [tensor], max_shard_nbytes=1 << 30),
    lambda: write_bytes(folder / "small", bytes(200_000)),
):
    try:
        write()
    except CheckpointError as error:
        print(error)
"""


def test_a_full_disk_is_a_checkpoint_error(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] in (resource.RLIM_INFINITY, -1)
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "model.safetensors" in first
    assert "Free some space" in first
    assert "small" in second


def test_a_folder_that_is_not_there_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write"):
        write_checkpoint(tmp_path / "none", [output("w", torch.ones(2))], max_shard_nbytes=1 << 30)
    with pytest.raises(CheckpointError, match="cannot write"):
        write_bytes(tmp_path / "none" / "file", b"x")


def test_small_files_come_with_their_digest(tmp_path):
    assert write_bytes(tmp_path / "file", b"abc") == hashlib.sha256(b"abc").hexdigest()
    assert (tmp_path / "file").read_bytes() == b"abc"
