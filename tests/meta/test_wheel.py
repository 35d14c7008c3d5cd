"""The wheel holds everything that runs, under the right names, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"llmmpq": "llmmpq", "recipes": "llmmpq/recipes", "kernels/torch-ext/llmmpq_kernels": "llmmpq_kernels"}
SHIPPED = {".py", ".yaml", ".json", ".txt", ".safetensors", ".typed", ".html", ".css", ".c"}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    # Built from a copy: setuptools would leave build/ in the source tree and pick stale files up from there.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for folder in ("llmmpq", "recipes", "kernels", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.slow
def test_every_source_file_is_in_the_wheel(wheel_names: set[str]) -> None:
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SHIPPED
    }
    assert expected - wheel_names == set()
    assert {
        "llmmpq/py.typed",
        "llmmpq/recipes/demo.yaml",
        "llmmpq/assets/demo/model.safetensors",
        "llmmpq_kernels/__init__.py",
    } <= wheel_names


@pytest.mark.slow
def test_nothing_else_is_in_the_wheel(wheel_names: set[str]) -> None:
    roots = {name.split("/")[0] for name in wheel_names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"llmmpq", "llmmpq_kernels"}
    assert not [name for name in wheel_names if "test" in Path(name).stem]
