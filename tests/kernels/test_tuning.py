"""Launch figures: every file of them is sound, and picks are what they say."""

import json
from pathlib import Path

import pytest
import torch

from llmmpq_kernels import gemm, gemv, tuning

FOLDER = Path(gemm.__file__).parent / "launch"
CPU = torch.device("cpu")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_file_covers_every_width_and_number_of_rows(path):
    launch = tuning.load_launch(path.stem)
    assert launch.gemv_most_rows <= gemv.MOST_ROWS
    assert (launch.measured_on is None) == (path.stem == "default")
    for widths in ((2,), (3,), (8,), (2, 3, 4, 8)):
        runs = tuple((bits, 4) for bits in widths)
        for rows in (1, 2, 3, gemv.MOST_ROWS, launch.gemv_most_rows):
            assert tuning._first_fitting(launch.gemv, rows, runs)
        for rows in (1, 16, 17, 1 << 20):
            entry = tuning._first_fitting(launch.gemm, rows, runs)
            assert all(entry[key] & (entry[key] - 1) == 0 for key in ("block_m", "block_n", "block_c", "num_warps"))
    assert set(json.loads(path.read_text())) == {
        "measured_on",
        "gemv_most_rows",
        "gemm_most_rows",
        "gemv",
        "gemm",
    }


def test_an_unknown_device_takes_the_default():
    assert tuning.load_launch("NVIDIA Nothing 9000") == tuning.load_launch("default")
    assert tuning.file_name("NVIDIA H200") == "nvidia-h200.json"


def test_rows_choose_the_kernel():
    launch = tuning.load_launch("default")
    picks = [tuning.backend_for(rows, launch) for rows in (1, launch.gemv_most_rows, 16, 256, 257, 2048)]
    assert picks == ["gemv", "gemv", "gemm", "gemm", "dequantized", "dequantized"]


def test_splits_never_exceed_the_blocks():
    config = tuning.gemv_config(CPU, 1, (32, 64), ((4, 2),), (2,))
    assert config.split == 1
    tall = tuning.gemv_config(CPU, 1, (16, 65536), ((4, 1024),), (2048,))
    assert 1 <= tall.split <= tuning.MOST_SPLITS
