"""What setup.py, the build hook and the test runner decide, without building anything; and the wheel, where one was built."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import process

pytest.importorskip("setuptools")
pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = (
    "CNNFAST_CUDA", "CNNFAST_NATIVE", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAFLAGS", "TORCH_CUDA_ARCH_LIST",
    "MAX_JOBS", "CMAKE_ARGS",
)  # fmt: skip


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"cnnfast_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Any:
    """setup.py as a module, in an environment that asks for nothing."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return _load(ROOT / "setup.py")


@pytest.fixture
def backend(setup: Any) -> Any:
    return sys.modules["backend"]


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def nvcc(path: Path, release: str, body: str = "exit 0") -> str:
    return script(
        path,
        f'case "$*" in --version) echo "Cuda compilation tools, release {release}, V{release}.1";; *) {body};; esac',
    )


# ---- architectures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("8.0", "80-real"),
        ("8.0;9.0+PTX", "80-real;90-real;90-virtual"),
        ("8.0 8.6, 9.0a", "80-real;86-real;90a-real"),
        (" 12.0f+PTX ", "120f-real;120f-virtual"),
        ("8.0;8.0", "80-real"),
    ],
)
def test_architectures_asked_for(setup: Any, monkeypatch: pytest.MonkeyPatch, given: str, expected: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert setup.architectures("nvcc") == expected


@pytest.mark.parametrize(
    ("given", "word"), [("sm_80", "'sm_80'"), ("8", "'8'"), ("Ampere", "'Ampere'"), ("7.5;8.0", "7.5")]
)
def test_architectures_refused(setup: Any, given: str, word: str) -> None:
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST: .*{re.escape(word)}"):
        setup.listed_architectures(given)


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ("9.0", "90-real"),
        ("9.0\n8.0\n9.0", "80-real;90-real"),
        ("7.5", "default"),  # too old: nothing of it, and no failure
        ("12.1", "default"),  # newer than this nvcc
        ("7.5\n8.6", "86-real"),
        ("No devices were found", "default"),
    ],
)
def test_architectures_of_the_cards_here(
    setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cards: str, expected: str
) -> None:
    script(tmp_path / "nvidia-smi", f"printf '{cards}\n'".replace("\n", "\\n"))
    compiler = script(tmp_path / "nvcc", "printf 'compute_75\\ncompute_80\\ncompute_86\\ncompute_90\\n'")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.architectures(compiler) == (setup.DEFAULT_ARCHITECTURES if expected == "default" else expected)


# ---- the CUDA compiler -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "auto"),
        ("", "auto"),
        ("AUTO", "auto"),
        ("off", "off"),
        ("0", "off"),
        ("no", "off"),
        ("system", "system"),
        ("wheel", "wheel"),
    ],
)
def test_cuda_mode(backend: Any, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str) -> None:
    if given is not None:
        monkeypatch.setenv("CNNFAST_CUDA", given)
    assert backend.cuda_mode() == expected


def test_cuda_mode_unknown(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNFAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected auto, system, wheel or off, got 'yes'"):
        backend.cuda_mode()


def test_nvcc_is_probed(backend: Any, tmp_path: Path) -> None:
    assert backend.nvcc_version(nvcc(tmp_path / "good", "12.4")) == (12, 4)
    assert backend.nvcc_version(str(tmp_path / "missing")) is None
    assert backend.nvcc_version(script(tmp_path / "mute", "exit 3")) is None
    assert backend.nvcc_problem(str(tmp_path / "good")) == ""
    assert "can't be run" in backend.nvcc_problem(str(tmp_path / "mute"))
    assert "is 11.8; 12.0 or newer" in backend.nvcc_problem(nvcc(tmp_path / "old", "11.8"))
    quarrel = nvcc(
        tmp_path / "quarrel", "12.0", "echo '#error -- unsupported GNU version! gcc later than 12' >&2; exit 1"
    )
    assert "unsupported GNU version" in backend.nvcc_problem(quarrel)


@pytest.mark.parametrize(
    ("mode", "system", "fetched"),
    [
        ("auto", True, False), ("auto", False, True), ("system", True, False), ("system", False, False),
        ("wheel", True, True), ("wheel", False, True), ("off", True, False), ("off", False, False),
    ],
)  # fmt: skip
def test_wheels_are_fetched_only_where_needed(
    backend: Any, monkeypatch: pytest.MonkeyPatch, mode: str, system: bool, fetched: bool
) -> None:
    monkeypatch.setenv("CNNFAST_CUDA", mode)
    monkeypatch.setattr(backend.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(backend, "usable_nvcc", lambda: ("/usr/bin/nvcc", "") if system else (None, "none"))
    assert backend.cuda_wheels() == (backend.CUDA_WHEELS if fetched else [])
    monkeypatch.setenv("CNNFAST_NATIVE", "off")
    assert backend.cuda_wheels() == []
    monkeypatch.delenv("CNNFAST_NATIVE")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert backend.cuda_wheels() == []


def test_the_toolkit_is_pinned_as_a_whole(backend: Any) -> None:
    (requirement,) = backend.CUDA_WHEELS
    assert re.fullmatch(r"cuda-toolkit\[.*nvcc.*\]==[\d.]+", requirement)
    assert requirement in (ROOT / "Makefile").read_text()


def test_without_any_cuda_compiler(
    setup: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without build isolation nobody adds the wheels: automatic mode warns and builds for the CPU, the others stop."""
    monkeypatch.setattr(setup, "usable_nvcc", lambda: (None, "there is no nvcc on this system"))
    monkeypatch.setattr(setup, "wheel_cuda_root", lambda: None)
    assert setup.cuda_arguments() == []
    assert "WARNING: there is no nvcc on this system" in capsys.readouterr().err
    for mode, text in (("system", "there is no nvcc"), ("wheel", "compiler wheels aren't installed")):
        monkeypatch.setenv("CNNFAST_CUDA", mode)
        with pytest.raises(SystemExit, match=text):
            setup.cuda_arguments()
    monkeypatch.setenv("CNNFAST_CUDA", "off")
    assert setup.cuda_arguments() == []
    assert capsys.readouterr().err == ""


def test_cuda_arguments(setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setattr(setup, "usable_nvcc", lambda: ("/opt/nvcc", ""))
    monkeypatch.setattr(setup, "wheel_cuda_root", lambda: tmp_path)
    assert "-DCMAKE_CUDA_COMPILER=/opt/nvcc" in setup.cuda_arguments()
    monkeypatch.setenv("CNNFAST_CUDA", "wheel")
    arguments = setup.cuda_arguments()
    assert f"-DCMAKE_CUDA_COMPILER={tmp_path}/bin/nvcc" in arguments
    assert f"-DCMAKE_CUDA_FLAGS=-L{tmp_path}/lib" in arguments
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real" in arguments


# ---- one sentence ----------------------------------------------------------------------------------------------------


def _hook(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The hook that pip calls first, in a process with nothing on its path."""
    clean = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    clean.update({"PATH": str(tmp_path), "PYTHONPATH": str(ROOT / "build_backend"), **environment})
    code = "import backend; backend.check(); print(backend.cuda_wheels())"
    return subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.skipif(sys.platform != "linux", reason="native modules are built on Linux")
@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "no C\\+\\+ compiler found: install one .* or set CXX"),
        ({"CXX": "missing-g++"}, "CXX=missing-g\\+\\+ can't be run"),
        ({"CXX": "OLD"}, "old is gcc 7, too old .*: gcc 9 or newer is needed"),
        ({"CNNFAST_CUDA": "perhaps"}, "CNNFAST_CUDA: expected auto, system, wheel or off, got 'perhaps'"),
    ],
)
def test_what_stops_a_build_is_one_sentence(tmp_path: Path, environment: dict[str, str], sentence: str) -> None:
    old = script(
        tmp_path / "old", 'case "$1" in -dumpversion) echo 7.5.0;; *) echo "g++ 7.5.0, Free Software Foundation";; esac'
    )
    done = _hook(tmp_path, **{k: v.replace("OLD", old) for k, v in environment.items()})
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert re.search(f"^cnnfast: .*{sentence}", lines[0]), lines[0]


def test_no_compiler_is_needed_without_native_modules(tmp_path: Path) -> None:
    done = _hook(tmp_path, CNNFAST_NATIVE="off")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_link_that_became_a_file(backend: Any, tmp_path: Path) -> None:
    (tmp_path / "cnnfast").mkdir()
    (tmp_path / "cnnfast" / "kernels").write_text("../kernels")
    with pytest.raises(SystemExit, match=r"core\.symlinks"):
        backend.check_link(tmp_path)
    backend.check_link(ROOT)


def test_cmake_is_checked(setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="cmake is missing"):
        setup.cmake_program()
    script(tmp_path / "cmake", "echo cmake version 3.16.3")
    with pytest.raises(SystemExit, match=r"is 3\.16; 3\.22 or newer"):
        setup.cmake_program()
    script(tmp_path / "cmake", "echo cmake version 3.22.1")
    assert setup.cmake_program() == str(tmp_path / "cmake")


def test_jobs(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert int(setup.jobs()) >= 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup.jobs() == "3"


# ---- the package -----------------------------------------------------------------------------------------------------


def test_metadata() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'"torch>=2\.9"', text), "torch is a dependency without an upper bound"
    requires = re.search(r"requires = \[(.*)\]", text)
    assert requires is not None
    assert "torch" not in requires.group(1), "the build needs no torch"
    version = re.search(r'^version = "(.*)"', text, re.M)
    assert version is not None
    assert f'__version__ = "{version.group(1)}"' in (ROOT / "cnnfast" / "__init__.py").read_text()
    assert "torch==" + "2.14.1 torchvision==0.29.1" in (ROOT / "Makefile").read_text()


def test_every_package_is_installed() -> None:
    from setuptools import find_packages

    found = set(find_packages(str(ROOT), include=["cnnfast*"]))
    walked = {
        ".".join(Path(folder).relative_to(ROOT).parts)
        for folder, _, files in os.walk(ROOT / "cnnfast", followlinks=True)
        if any(f.endswith(".py") for f in files)
    }
    assert found == walked
    assert "cnnfast.kernels" in found


WITHOUT_ANYTHING = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton" or name in ("cnnfast._cpu", "cnnfast._cuda"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch, cnnfast
from cnnfast import dispatch
assert cnnfast.__file__.startswith(sys.argv[1]), cnnfast.__file__
x, w = torch.randn(1, 4, 6, 6), torch.randn(8, 4, 3, 3)
torch.testing.assert_close(cnnfast.functional.conv2d(x, w), torch.nn.functional.conv2d(x, w))
with cnnfast.strict():
    try:
        cnnfast.functional.conv2d(x, w)
    except NotImplementedError as error:
        assert "cnnfast._cpu can't be imported" in str(error), error
    else:
        raise AssertionError("strict mode was served without any kernel")
print({name: b.status() for name, b in dispatch.backends().items()})
"""


def test_imports_without_native_modules_compiler_triton_or_home(tmp_path: Path) -> None:
    """Everything but Python and torch taken away: the package imports, ATen serves, and strict mode says why."""
    shutil.copytree(ROOT / "cnnfast", tmp_path / "cnnfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    home = "/proc/no-such-home"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CNNFAST_", "TRITON_", "XDG_", "TORCH"))}
    environment.update(
        {
            "PATH": "",
            "HOME": home,
            "PYTHONPATH": str(tmp_path),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
    )
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ANYTHING, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _wheel() -> Path | None:
    folder = ROOT / os.environ.get("CNNFAST_TEST_WHEEL", "dist")
    return max(folder.glob("cnnfast-*.whl"), key=lambda p: p.stat().st_mtime, default=None)


def test_wheel_content() -> None:
    wheel = _wheel()
    if wheel is None:
        pytest.skip("no wheel was built (pip wheel . --no-deps -w dist, or CNNFAST_TEST_WHEEL)")
    names = zipfile.ZipFile(wheel).namelist()
    inside = {n for n in names if ".dist-info/" not in n}
    assert all(n.startswith("cnnfast/") for n in inside), sorted(inside)
    assert {f"cnnfast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")} <= inside
    assert "cnnfast/py.typed" in inside
    modules = [n for n in inside if n.endswith(".so")]
    assert sum("/_cpu." in n for n in modules) == 1, modules
    assert all(re.fullmatch(r"cnnfast/_(cpu|cuda)\.[\w-]+\.so", n) for n in modules), modules
    if os.environ.get("CNNFAST_TEST_WHEEL"):
        assert sum("/_cuda." in n for n in modules) == 1, modules
    assert not [n for n in inside if "emulat" in n or "test" in n or n.endswith((".cpp", ".cu", ".h"))]


# ---- the test runner -------------------------------------------------------------------------------------------------

REPORT = """<testsuites><testsuite>
<testcase file="tests/test_a.py" name="a" time="1.5"/><testcase file="tests/test_a.py" name="b" time="2.5"><failure/></testcase>
<testcase file="tests/test_b.py" name="c" time="0"><skipped/></testcase><testcase classname="tests.test_b" name="d"><error/></testcase>
</testsuite></testsuites>"""


def test_runner_reads_reports(tmp_path: Path) -> None:
    run = _load(ROOT / "tests" / "run.py")
    (tmp_path / "report.xml").write_text(REPORT)
    counts, files = run.read(tmp_path / "report.xml")
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert files["test_a.py"] == 4
    assert run.read(tmp_path / "missing.xml") == (Counter(), Counter())


@pytest.mark.parametrize(
    ("outcomes", "line", "code"),
    [
        ([({"passed": 3, "skipped": 1}, 0), ({"passed": 2}, 0)], "5 passed, 0 failed, 1 skipped", 0),
        ([({"passed": 3, "failed": 1}, 1), ({"passed": 2}, 0)], "5 passed, 1 failed, 0 skipped", 1),
        ([({"passed": 3}, 0), ({}, 5)], "3 passed, 1 failed, 0 skipped", 1),  # a part that ran nothing
        ([({"passed": 3}, 0), ({"skipped": 2}, 0)], "3 passed, 1 failed, 2 skipped", 1),  # all skipped is nothing
        ([({"passed": 3}, -11)], "3 passed, 1 failed, 0 skipped", 1),  # a crash
    ],
)
def test_runner_sums(capsys: pytest.CaptureFixture[str], outcomes: list[Any], line: str, code: int) -> None:
    run = _load(ROOT / "tests" / "run.py")
    results = [
        run.Result(run.Part(f"part{i}", "", 1, ""), 1.0, returncode, Counter(counts), Counter())
        for i, (counts, returncode) in enumerate(outcomes)
    ]
    assert run.summary(results, {"emulation": 2.0}) == code
    assert capsys.readouterr().out.splitlines()[-1] == line
