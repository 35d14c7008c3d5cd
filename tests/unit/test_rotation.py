"""Learning a rotation, and reading a checkpoint through one."""

import pytest
import torch
from safetensors.torch import save_file

from llmmpq.errors import CheckpointError
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.residual import Residual
from llmmpq.model.rotated import RotatedCheckpoint
from llmmpq.quantize import rotation
from llmmpq.quantize.rotation import fourth_power, learn_rotation, random_rotation

SIZE = 24


def off(matrix):
    return float((matrix.double().t() @ matrix.double() - torch.eye(len(matrix))).abs().max())


def hidden(size=SIZE, num_rows=2000):
    """Rows of signs alone, turned: the rotation that turns them back has the least fourth power, 1."""
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, (num_rows, size), generator=generator) * 2.0 - 1
    return signs @ random_rotation(size, seed=5)


def test_a_random_rotation_is_orthogonal_and_depends_on_its_seed():
    assert off(random_rotation(SIZE, seed=0)) < 1e-6
    assert torch.equal(random_rotation(SIZE, seed=1), random_rotation(SIZE, seed=1))
    assert not torch.equal(random_rotation(SIZE, seed=1), random_rotation(SIZE, seed=2))


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_what_is_flat_in_some_basis_is_found(num_blocks):
    parts = hidden().chunk(num_blocks)
    learned = learn_rotation(lambda index: parts[index], num_blocks, SIZE, seed=0)
    assert off(learned) < 1e-6
    assert fourth_power(hidden(), random_rotation(SIZE, seed=0)) > 2.5
    assert fourth_power(hidden(), learned) < 1.1


def test_equal_seeds_learn_the_same_bits_and_every_step_is_told():
    steps = []
    one, two, other = (
        learn_rotation(lambda _: hidden(), 1, SIZE, seed=seed, on_step=lambda: steps.append(1)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert len(steps) == 3 * rotation.STEPS


def test_blocks_that_say_little_each_are_heard_together(monkeypatch):
    """24 rows for 24 channels: without what the steps before were heading for, 2.3; against it, 2.6."""
    monkeypatch.setattr(rotation, "STEPS", 100)
    parts = hidden(num_rows=480).chunk(20)
    learned = learn_rotation(lambda index: parts[index], len(parts), SIZE, seed=0)
    assert fourth_power(torch.cat(parts), learned) < 1.8


@pytest.mark.parametrize("rows", [torch.zeros(40, SIZE), torch.ones(1, SIZE), torch.eye(SIZE)])
def test_rows_without_a_slope_do_no_harm(rows):
    assert off(learn_rotation(lambda _: rows, 1, SIZE, seed=0)) < 1e-6


TENSORS = {
    "embed": torch.randn(50, SIZE),
    "norm": 1 + 0.3 * torch.randn(SIZE),
    "read": torch.randn(40, SIZE),
    "write": torch.randn(SIZE, 30),
    "bias": torch.randn(SIZE),
    "both": torch.randn(SIZE, SIZE),
    "other": torch.randn(7, 5),
}
RESIDUAL = Residual(
    readers={"read": "norm", "both": "norm"},
    writers=("write", "bias", "both"),
    embeddings=("embed",),
    norms={"norm": 1.0},
)
R = random_rotation(SIZE, seed=9)


def expected(gain):
    return {
        "embed": TENSORS["embed"] @ R,
        "norm": None,
        "read": (TENSORS["read"] * gain) @ R,
        "write": R.t() @ TENSORS["write"],
        "bias": R.t() @ TENSORS["bias"],
        "both": ((R.t() @ TENSORS["both"]) * gain) @ R,
        "other": TENSORS["other"],
    }


@pytest.fixture
def source(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path)


@pytest.mark.parametrize("without", [1.0, 0.0])
def test_each_kind_of_tensor_is_turned_as_it_meets_the_stream(source, without):
    residual = Residual(
        readers=RESIDUAL.readers, writers=RESIDUAL.writers, embeddings=RESIDUAL.embeddings, norms={"norm": without}
    )
    read = RotatedCheckpoint(source, residual, R).read(TENSORS, dtype=torch.float32)
    assert list(read) == list(TENSORS)
    assert torch.equal(read["norm"], torch.full((SIZE,), without))
    for name, tensor in expected(TENSORS["norm"] + (1 - without)).items():
        if tensor is not None:
            torch.testing.assert_close(read[name], tensor, rtol=0, atol=2e-5, msg=name)


def test_in_chunks_it_is_the_same(source, monkeypatch):
    whole = RotatedCheckpoint(source, RESIDUAL, R).read(TENSORS)
    monkeypatch.setattr("llmmpq.model.checkpoint.COPY_CHUNK_NBYTES", 4 * SIZE * 6)
    rotated = RotatedCheckpoint(source, RESIDUAL, R)
    assert len(list(rotated.row_chunks("embed"))) > 5
    for name, tensor in whole.items():
        torch.testing.assert_close(torch.cat(list(rotated.row_chunks(name))), tensor, rtol=0, atol=2e-5)


def test_what_is_kept_reads_as_it_is_stored_and_the_rest_is_not_rounded(tmp_path):
    save_file({name: tensor.bfloat16() for name, tensor in TENSORS.items()}, tmp_path / "model.safetensors")
    source = Checkpoint.open(tmp_path)
    rotated = RotatedCheckpoint(source, RESIDUAL, R, rounded=["embed"])
    read = rotated.read(["embed", "read"], dtype=torch.float32)
    (stored,) = rotated.row_chunks("embed")
    assert stored.dtype == torch.bfloat16
    assert torch.equal(read["embed"], stored.float())
    assert not torch.equal(read["read"], read["read"].bfloat16().float())
    assert rotated.read(["read"])["read"].dtype == torch.bfloat16


def test_what_the_dtype_cannot_hold_is_an_error(tmp_path):
    save_file({"embed": torch.full((3, SIZE), 60000.0, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    residual = Residual(readers={}, writers=(), embeddings=("embed",), norms={})
    rotated = RotatedCheckpoint(Checkpoint.open(tmp_path), residual, R)
    with pytest.raises(
        CheckpointError, match=r"'embed', rotated, reaches .*, more than torch.float16 holds: use --dtype"
    ):
        rotated.read(["embed"], dtype=torch.float16)


def test_what_the_file_cannot_hold_is_an_error_too(tmp_path):
    save_file({"embed": torch.full((3, SIZE), 60000.0, dtype=torch.float16)}, tmp_path / "model.safetensors")
    residual = Residual(readers={}, writers=(), embeddings=("embed",), norms={})
    rotated = RotatedCheckpoint(Checkpoint.open(tmp_path), residual, R, rounded=["embed"])
    with pytest.raises(CheckpointError, match=r"more than torch.float16 holds: leave out --rotate"):
        list(rotated.row_chunks("embed"))
    with pytest.raises(CheckpointError, match=r"more than torch.float16 holds: leave out --rotate"):
        rotated.read(["embed"], dtype=torch.float32)


def test_nan_is_found_as_without_a_rotation(tmp_path):
    damaged = TENSORS | {"write": torch.full((SIZE, 30), torch.nan)}
    save_file(damaged, tmp_path / "model.safetensors")
    rotated = RotatedCheckpoint(Checkpoint.open(tmp_path), RESIDUAL, R)
    with pytest.raises(CheckpointError, match=r"'write'.*NaN"):
        rotated.read(["write"])
    with pytest.raises(CheckpointError, match=r"'write'.*NaN"):
        rotated.check_finite(["write"])
