"""Runs every checker of style and structure, and reports all that they find: `make check`; with --fix, `make format`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tool(name: str) -> str:
    """A program of this environment."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name) or name


def sources() -> list[str]:
    """The C++ and CUDA files."""
    return sorted(
        str(p.relative_to(ROOT))
        for folder in ("csrc", "tests")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".h", ".cpp", ".cu")
    )


def commands(fix: bool) -> dict[str, list[str]]:
    """Checker -> command."""
    if fix:
        return {
            "ruff": [tool("ruff"), "check", "--fix", "."],
            "ruff format": [tool("ruff"), "format", "."],
            "clang-format": [tool("clang-format"), "-i", *sources()],
        }
    return {
        "ruff": [tool("ruff"), "check", "."],
        "ruff format": [tool("ruff"), "format", "--check", "."],
        "mypy": [sys.executable, "-m", "mypy", "-p", "cnnfast"],
        "clang-format": [tool("clang-format"), "--dry-run", "--Werror", *sources()],
        "import-linter": [tool("lint-imports")],
    }


def main() -> int:
    """Runs them all, shows the output of those that complain, and a table at the end."""
    failed = 0
    lines = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    for name, command in commands("--fix" in sys.argv[1:]).items():
        begin = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            returncode, output = done.returncode, done.stdout + done.stderr
        except OSError as error:
            returncode, output = 1, f"{error}: make env installs it\n"
        if returncode:
            failed += 1
            print(f"==== {name}\n{output}", flush=True)
        lines.append(f"{name:14} {'FAILED' if returncode else 'ok':7}{time.monotonic() - begin:5.1f} s")
    print("\n".join(lines), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
