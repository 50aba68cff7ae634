"""Builds the native modules with CMake: cnnfast._cpu always, cnnfast._cuda where a CUDA compiler is at hand.

Environment: ``CNNFAST_CUDA`` = auto | system | wheel | off (see build_backend/backend.py), ``MAX_JOBS``, ``CMAKE_ARGS``,
``TORCH_CUDA_ARCH_LIST`` ("8.0;9.0+PTX"), ``CXX``, ``CUDACXX``. No torch is needed: csrc knows pointers only.
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
from backend import cuda_mode, system_nvcc  # noqa: E402

# sm_80's PTX beside real code: older drivers don't compile the PTX of newer toolkits
DEFAULT_ARCHITECTURES = "80-real;90-real;80-virtual"
MINIMUM_NVCC = (12, 0)
MINIMUM_GCC = 9


def say(message):
    """Build messages go to stderr, which pip shows with -v and on failure."""
    print(f"cnnfast: {message}", file=sys.stderr, flush=True)


def stop(message):
    """Ends the build with one sentence."""
    raise SystemExit(f"cnnfast: {message}")


def check_link():
    """The Triton kernels are cnnfast.kernels through a link, which some Windows clones turn into a file."""
    link = HERE / "cnnfast" / "kernels"
    if not link.is_dir():
        stop("cnnfast/kernels must be a link to ../kernels, but this clone made it a file: set core.symlinks and clone again")


def check_compiler():
    """A C++17 compiler, or one clear sentence."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not shutil.which(shlex.split(compiler)[0]):
        stop("no C++ compiler found: install one (Debian, Ubuntu: apt-get install g++) or set CXX")
    out = subprocess.run([*shlex.split(compiler), "-dumpfullversion", "-dumpversion"], capture_output=True, text=True)
    version = re.match(r"\d+", out.stdout)
    name = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True).stdout
    if version and "clang" not in name and int(version.group()) < MINIMUM_GCC:
        stop(f"{compiler} is GCC {out.stdout.strip()}; C++17 kernels need GCC {MINIMUM_GCC} or newer")


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


def nvcc_version(nvcc):
    """(major, minor) of an nvcc, or None if it can't be run."""
    try:
        out = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", out)
    return (int(match.group(1)), int(match.group(2))) if match else None


def architectures():
    """CMAKE_CUDA_ARCHITECTURES from TORCH_CUDA_ARCH_LIST, the present GPU, or the default."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";")
    if asked:
        out = []
        for item in filter(None, asked.split(";")):
            number = re.match(r"(\d+)\.(\d+)(a?)", item)
            if not number:
                stop(f"TORCH_CUDA_ARCH_LIST: expected items such as 8.0 or 9.0+PTX, got {item!r}")
            arch = "".join(number.groups())
            out.append(f"{arch}-real")
            if item.endswith("+PTX"):
                out.append(f"{arch}-virtual")
        return ";".join(dict.fromkeys(out))
    smi = shutil.which("nvidia-smi")
    if smi:
        out = subprocess.run([smi, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True)
        found = sorted({c.strip().replace(".", "") for c in out.stdout.splitlines() if re.fullmatch(r"\d+\.\d", c.strip())})
        if out.returncode == 0 and found:
            return ";".join(f"{c}-real" for c in found)
    return DEFAULT_ARCHITECTURES


def cuda_arguments():
    """CMake arguments for the CUDA module; empty where it isn't built, with the reason said."""
    mode = cuda_mode()
    if mode == "off" or sys.platform != "linux":
        return []
    arguments = ["-DCNNFAST_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architectures()}"]
    nvcc = system_nvcc() if mode in ("auto", "system") else None
    if nvcc:
        version = nvcc_version(nvcc)
        if version and version >= MINIMUM_NVCC:
            return [*arguments, f"-DCMAKE_CUDA_COMPILER={nvcc}"]
        problem = f"{nvcc} is {'.'.join(map(str, version)) if version else 'not runnable'}; 12.0 or newer is needed"
        if mode == "system":
            stop(problem)
        say(problem)
    root = wheel_cuda_root() if mode in ("auto", "wheel") else None
    if root:
        flags = f"{os.environ.get('CUDAFLAGS', '')} -L{root}/lib".strip()  # the wheel has lib, nvcc's profile says lib64
        return [*arguments, f"-DCMAKE_CUDA_COMPILER={root}/bin/nvcc", f"-DCUDAToolkit_ROOT={root}", f"-DCMAKE_CUDA_FLAGS={flags}"]
    if mode != "auto":
        stop(f"CNNFAST_CUDA={mode}, but there is no {'nvcc on this system' if mode == 'system' else 'CUDA compiler wheel'}")
    say("no CUDA compiler here (pip's build isolation would fetch one): building for the CPU alone")
    return []


class CMakeExtension(Extension):
    """A native module that CMake builds."""

    def __init__(self, name):
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """One CMake build writes every native module, in editable mode into the package itself."""

    def run(self):
        check_link()
        check_compiler()
        inplace = self.inplace or getattr(self, "editable_mode", False)
        target = HERE / "cnnfast" if inplace else Path(self.build_lib).resolve() / "cnnfast"
        target.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve() / "cmake"
        cache = build / "CMakeCache.txt"
        if cache.exists():
            cache.unlink()  # pip's isolated environments change place from build to build
        build.mkdir(parents=True, exist_ok=True)
        import pybind11

        cmake = shutil.which("cmake") or stop("cmake is missing: pip install cmake ninja")
        configure = [
            cmake, "-S", str(HERE / "csrc"), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DCNNFAST_OUTPUT={target}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        ninja = shutil.which("ninja")
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += cuda_arguments() + shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (configure, [cmake, "--build", str(build), "--parallel", jobs]):
            say("+ " + shlex.join(command))
            if subprocess.call(command):
                stop(f"the build failed in: {shlex.join(command[:2])} ...; its output is above (pip: -v)")

    def copy_extensions_to_source(self):
        """Nothing to copy: an editable build writes into the package."""

    def get_outputs(self):
        """Native modules are written by CMake."""
        return []


setup(ext_modules=[CMakeExtension("cnnfast._cpu")], cmdclass={"build_ext": CMakeBuild})
