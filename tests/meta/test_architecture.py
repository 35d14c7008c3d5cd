"""The architecture, held by machine: import contracts, a torch-free front, kernels that stand alone."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "torch-ext" / "llmmpq_kernels"


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_import_contracts_are_kept() -> None:
    lint = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True, no_logo=True))"
    result = run_python("-c", lint)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    "module",
    ["llmmpq", "llmmpq.cli", "llmmpq.recipe", "llmmpq.records", "llmmpq.errors", "llmmpq.patterns", "llmmpq.allocate"],
)
def test_importing_it_leaves_torch_alone(module: str) -> None:
    code = (
        "import importlib, pkgutil, sys\n"
        f"module = importlib.import_module({module!r})\n"
        f"if {module!r} == 'llmmpq.allocate':\n"
        "    for part in pkgutil.iter_modules(module.__path__, module.__name__ + '.'):\n"
        "        importlib.import_module(part.name)\n"
        "print(*sorted({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


def test_help_is_instant_and_leaves_torch_alone() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = run_python("-m", "llmmpq", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of computing: the clock on the wall also counts what else the machine does.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == 0, result.stderr
        assert "quantize" in result.stdout
    # The goal is 0.5 s; the rest is slack for a slow machine.
    assert min(seconds) < 1.0

    imported = run_python("-X", "importtime", "-m", "llmmpq", "--help").stderr
    names = {line.rsplit("|", 1)[-1].strip() for line in imported.splitlines()}
    assert "llmmpq.cli" in names
    assert not names & {"torch", "transformers", "accelerate"}


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.relative_to(KERNELS).as_posix())
def test_kernels_import_only_the_standard_library_torch_and_triton(path: Path) -> None:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.split(".")[0])
    assert roots - sys.stdlib_module_names <= {"torch", "triton"}


@pytest.mark.parametrize("folder", ["kernels", "tests"])
def test_no_package_file_shadows_another_distribution(folder: str) -> None:
    """`kernels` is a package of Hugging Face; an `__init__.py` in our folder of that name would hide it."""
    allowed = (ROOT / "kernels" / "torch-ext").rglob("__init__.py")
    assert set((ROOT / folder).rglob("__init__.py")) <= set(allowed)
