"""The structure that ARCHITECTURE.md promises holds, and what checks it sees a violation."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import matrix
import pytest
from support import process

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)

ROOT = Path(__file__).resolve().parent.parent


def _python() -> list[Path]:
    folders = ("cnnfast", "kernels", "tests", "benchmarks", "examples")
    return [p for folder in folders for p in (ROOT / folder).rglob("*.py")]


def test_nothing_imports_kernels_from_the_top() -> None:
    """``kernels`` is ``cnnfast.kernels`` for everybody: imported twice, every kernel would exist twice."""
    for path in _python():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not [n for n in names if n.split(".")[0] == "kernels"], f"{path}: imports top-level kernels"


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("lint-imports", path=sysconfig.get_path("scripts")) or shutil.which("lint-imports")
    if not tool:
        pytest.skip("import-linter is not installed (pip install -e .[check])")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([tool, "--no-cache"], cwd=folder, env=environment, capture_output=True, text=True)


PLANTED = {
    "ops imports backends": ("cnnfast/ops/conv2d.py", "import cnnfast.backends.cpu"),
    "backends import ops": ("cnnfast/backends/cpu.py", "import cnnfast.ops.conv2d"),
    "dispatch imports functional": ("cnnfast/dispatch.py", "import cnnfast.functional"),
    "nn imports models": ("cnnfast/nn/conv2d.py", "import cnnfast.models.resnet"),
    "nn loads a backend": ("cnnfast/nn/conv2d.py", "import cnnfast.backends.cpu"),
    "a kernel imports dispatch": ("cnnfast/kernels/conv2d_implicit_gemm.py", "import cnnfast.dispatch"),
}


@pytest.mark.parametrize("violation", ["", *PLANTED])
def test_layers(violation: str, tmp_path: Path) -> None:
    """import-linter accepts the tree, and refuses it with one planted import: it sees the kernels through the link, too."""
    shutil.copytree(ROOT / "cnnfast", tmp_path / "cnnfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if violation:
        name, line = PLANTED[violation]
        path = tmp_path / name
        path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    done = _lint(tmp_path)
    assert (done.returncode != 0) == bool(violation), done.stdout + done.stderr
    if violation:
        assert "BROKEN" in done.stdout, done.stdout + done.stderr


def test_coverage_matrix() -> None:
    """ARCHITECTURE.md's matrix is what is registered (of the backends that this environment has)."""
    written = matrix.parse(matrix.DOCUMENT.read_text(encoding="utf-8"))
    registered = matrix.cells()
    present = matrix.present()
    if sys.platform == "linux":
        assert "cpu" in present
    expected = {key: {b: row[b] for b in present} for key, row in registered.items()}
    found = {key: {b: row[b] for b in present} for key, row in written.items() if any(row[b] for b in present)}
    assert found == expected, "run `make matrix`"
