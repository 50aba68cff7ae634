"""Builds the native modules with CMake: cnnfast._cpu always, cnnfast._cuda where a CUDA compiler is at hand.

Environment: ``CNNFAST_CUDA`` = auto | system | wheel | off and ``CNNFAST_NATIVE`` = off (see build_backend/backend.py),
``MAX_JOBS``, ``CMAKE_ARGS``, ``TORCH_CUDA_ARCH_LIST`` ("8.0;9.0+PTX"), ``CXX``, ``CUDACXX``. No torch is needed: csrc
knows pointers only.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "build_backend"))
from backend import check, cuda_mode, native, say, stop, usable_nvcc  # noqa: E402

# sm_80's PTX beside real code: older drivers don't compile the PTX of newer toolkits
DEFAULT_ARCHITECTURES = "80-real;90-real;80-virtual"
MINIMUM_CAPABILITY = 80  # cp.async and bf16 matrix instructions
MINIMUM_CMAKE = (3, 22)


def wheel_cuda_root():
    """The toolkit that PyPI's cuda-toolkit wheels put into this environment; None without them."""
    try:
        import nvidia
    except ImportError:
        return None
    for path in nvidia.__path__:
        for root in sorted(Path(path).glob("cu[0-9]*"), reverse=True):
            if (root / "bin" / "nvcc").is_file():
                return root
    return None


def listed_architectures(text):
    """CMAKE_CUDA_ARCHITECTURES from the syntax of TORCH_CUDA_ARCH_LIST: "8.0;9.0a+PTX", also by blanks or commas."""
    out = []
    for item in re.split(r"[;,\s]+", text.strip()):
        number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not number:
            stop(f"TORCH_CUDA_ARCH_LIST: expected items such as 8.0 or 9.0+PTX, got {item!r}")
        arch = "".join(number.groups()[:3])
        if int(number.group(1) + number.group(2)) < MINIMUM_CAPABILITY:
            stop(f"TORCH_CUDA_ARCH_LIST: the kernels need compute capability 8.0 or newer, got {item}")
        out += [f"{arch}-real"] + ([f"{arch}-virtual"] if number.group(4) else [])
    return ";".join(dict.fromkeys(out))


def present_architectures(nvcc):
    """The compute capabilities of the cards here that this nvcc can build for, as "90-real;..."; empty without any."""
    smi = shutil.which("nvidia-smi")
    if not smi:
        return ""
    cards = subprocess.run([smi, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True)
    found = {c.strip().replace(".", "") for c in cards.stdout.splitlines() if re.fullmatch(r"\d+\.\d", c.strip())}
    known = set(
        re.findall(r"compute_(\d+)", subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout)
    )
    if cards.returncode or not found:
        return ""
    usable = sorted((c for c in found if c in known and int(c) >= MINIMUM_CAPABILITY), key=int)
    for card in sorted(found - set(usable)):
        say(
            f"{nvcc} has no code for the sm_{card} card here"
            if int(card) >= MINIMUM_CAPABILITY
            else f"sm_{card} is too old"
        )
    return ";".join(f"{c}-real" for c in usable)


def architectures(nvcc):
    """CMAKE_CUDA_ARCHITECTURES: TORCH_CUDA_ARCH_LIST, or the cards here, or the default."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    return listed_architectures(asked) if asked else present_architectures(nvcc) or DEFAULT_ARCHITECTURES


def cuda_arguments():
    """CMake arguments for the CUDA module; empty where it isn't built, with the reason said."""
    mode = cuda_mode()
    if mode == "off":
        return []
    nvcc, problem = usable_nvcc() if mode in ("auto", "system") else (None, "")
    extra = []
    if not nvcc:
        if mode == "system":
            stop(f"CNNFAST_CUDA=system, but {problem}")
        root = wheel_cuda_root()
        if not root and mode == "wheel":
            stop(
                "CNNFAST_CUDA=wheel, but the compiler wheels aren't installed: without build isolation, pip doesn't add them"
            )
        if not root:
            say(f"WARNING: {problem}, and pip's build isolation would fetch one: building for the CPU alone")
            return []
        nvcc = str(root / "bin" / "nvcc")
        flags = (
            f"{os.environ.get('CUDAFLAGS', '')} -L{root}/lib".strip()
        )  # the wheel has lib, nvcc's profile says lib64
        extra = [f"-DCUDAToolkit_ROOT={root}", f"-DCMAKE_CUDA_FLAGS={flags}"]
    return [
        "-DCNNFAST_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architectures(nvcc)}", f"-DCMAKE_CUDA_COMPILER={nvcc}", *extra,
    ]  # fmt: skip


def cmake_program():
    """The cmake to use; one sentence where it is missing or too old."""
    cmake = shutil.which("cmake") or stop("cmake is missing: pip install cmake ninja")
    out = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    version = tuple(map(int, re.findall(r"\d+", out)[:2]))
    if version < MINIMUM_CMAKE:
        stop(
            f"{cmake} is {'.'.join(map(str, version))}; {'.'.join(map(str, MINIMUM_CMAKE))} or newer is needed: pip install cmake"
        )
    return cmake


def forget_compilers(build):
    """Lets CMake look for compilers anew, keeping the objects: isolated environments change place from build to build."""
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    for folder in (build / "CMakeFiles").glob("[0-9]*"):
        shutil.rmtree(folder, ignore_errors=True)


def jobs():
    """How many compilers run at once."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return os.environ.get("MAX_JOBS") or str(cores)


class CMakeBuild(build_ext):
    """One CMake build writes every native module, in editable mode into the package itself."""

    def run(self):
        """Configures and builds; what is missing ends it with one sentence."""
        check()
        if not native():
            say("WARNING: no native module is built here (they need Linux, and CNNFAST_NATIVE not off)")
            return
        inplace = self.inplace or getattr(self, "editable_mode", False)
        target = HERE / "cnnfast" if inplace else Path(self.build_lib).resolve() / "cnnfast"
        # An editable build keeps its objects, so that the next one compiles only what changed.
        build = (
            HERE / "build" / f"native-{sys.implementation.cache_tag}"
            if inplace
            else Path(self.build_temp).resolve() / "cmake"
        )
        target.mkdir(parents=True, exist_ok=True)
        build.mkdir(parents=True, exist_ok=True)
        try:
            import pybind11
        except ImportError:
            stop("pybind11 is missing: pip install pybind11")
        cmake = cmake_program()
        forget_compilers(build)
        configure = [
            cmake, "-S", str(HERE / "csrc"), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DCNNFAST_OUTPUT={target}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        ninja = shutil.which("ninja")
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        cuda = cuda_arguments()
        for stale in target.glob("_c*.so"):
            if not inplace or (stale.name.startswith("_cuda.") and not cuda):
                stale.unlink()  # of an earlier build, which this one would silently pass off as its own
        configure += cuda + shlex.split(os.environ.get("CMAKE_ARGS", ""))
        for command in (configure, [cmake, "--build", str(build), "--parallel", jobs()]):
            say("+ " + shlex.join(command))
            if subprocess.call(command):
                stop(f"the build failed in: {shlex.join(command[:2])} ...; its output is above (pip: -v)")

    def copy_extensions_to_source(self):
        """Nothing to copy: an editable build writes into the package."""

    def get_outputs(self):
        """Native modules are written by CMake."""
        return []


if __name__ == "__main__":  # tests import this file for its functions
    setup(
        license="Apache-2.0",  # here, not in pyproject.toml: the forms that old and new setuptools take there differ
        ext_modules=[Extension("cnnfast._cpu", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
