"""PEP 517 backend: setuptools, plus the CUDA compiler wheels where the build needs them.

``CNNFAST_CUDA=auto`` (default): on Linux the CUDA module is built with the system's nvcc where that works, else with
PyPI's compiler wheels, which this hook then adds to the build's requirements; ``system`` or ``wheel`` force one; ``off``
builds no CUDA. The whole toolkit set is pinned together: on PyPI the compiler's own dependencies are not pinned to each
other. ``CNNFAST_NATIVE=off`` builds no native module at all.

What can stop a build is found here, before anything is downloaded or compiled, and ends it with one sentence.
"""

import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403

ROOT = Path(__file__).resolve().parent.parent
CUDA_WHEELS = ["cuda-toolkit[nvcc,cudart,cccl]==13.0.3"]
MINIMUM_NVCC = (12, 0)
MINIMUM_COMPILER = {"gcc": 9, "clang": 10}
WITHOUT = "CNNFAST_NATIVE=off installs without native kernels"


def say(message):
    """Build messages go to stderr, which pip shows with -v and on failure."""
    print(f"cnnfast: {message}", file=sys.stderr, flush=True)


def stop(message):
    """Ends the build with one sentence."""
    raise SystemExit(f"cnnfast: {message}")


def native():
    """Whether native modules are built: on Linux, unless CNNFAST_NATIVE=off."""
    return sys.platform == "linux" and os.environ.get("CNNFAST_NATIVE", "").lower() not in ("off", "0", "no")


def cuda_mode():
    """What CNNFAST_CUDA asks for: auto, system, wheel or off."""
    mode = os.environ.get("CNNFAST_CUDA", "").lower() or "auto"
    if mode in ("0", "no", "none"):
        mode = "off"
    if mode not in ("auto", "system", "wheel", "off"):
        stop(f"CNNFAST_CUDA: expected auto, system, wheel or off, got {mode!r}")
    return mode


# ---- what the machine has --------------------------------------------------------------------------------------------


def check_link(root=ROOT):
    """The Triton kernels are cnnfast.kernels through a link, which some Windows clones turn into a file."""
    if not (Path(root) / "cnnfast" / "kernels").is_dir():
        stop(
            "cnnfast/kernels must be a link to ../kernels, but this clone made it a file: set core.symlinks and clone again"
        )


def compiler_version(command):
    """("gcc" or "clang", major version) of a C++ compiler; None where it isn't one that we know, or can't be run."""
    try:
        out = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=True).stdout
        number = subprocess.run(
            [*shlex.split(command), "-dumpversion"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    major = re.match(r"\d+", number)
    name = "clang" if "clang" in out else "gcc" if "Free Software Foundation" in out else None
    return (name, int(major.group())) if name and major else None


def check_compiler():
    """A C++17 compiler, or one clear sentence."""
    asked = os.environ.get("CXX")
    compiler = asked or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        stop(f"no C++ compiler found: install one (Debian, Ubuntu: apt-get install g++) or set CXX; {WITHOUT}")
    if not shutil.which(shlex.split(compiler)[0]):
        stop(f"CXX={compiler} can't be run: install that compiler or unset CXX; {WITHOUT}")
    version = compiler_version(compiler)
    if version and version[1] < MINIMUM_COMPILER[version[0]]:
        name, major = version
        stop(
            f"{compiler} is {name} {major}, too old for these kernels: {name} {MINIMUM_COMPILER[name]} or newer is needed; {WITHOUT}"
        )


def system_nvcc():
    """The system's nvcc: CUDACXX, CUDA_HOME, CUDA_PATH, PATH, the default prefix; None if there is none."""
    candidates = [os.environ.get("CUDACXX")]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append(os.path.join(os.environ[variable], "bin", "nvcc"))
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def nvcc_version(nvcc):
    """(major, minor) of an nvcc, or None if it can't be run."""
    try:
        out = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", out)
    return (int(match.group(1)), int(match.group(2))) if match else None


@functools.cache
def nvcc_problem(nvcc):
    """Why an nvcc can't build our kernels: too old, or at odds with the host compiler; empty where it can."""
    version = nvcc_version(nvcc)
    if version is None:
        return f"{nvcc} can't be run"
    if version < MINIMUM_NVCC:
        return f"{nvcc} is {version[0]}.{version[1]}; {MINIMUM_NVCC[0]}.{MINIMUM_NVCC[1]} or newer is needed"
    host = ["-ccbin", shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text("#include <cuda_fp16.h>\n__global__ void probe(__half* x) { *x = __half(1.f); }\n")
        command = [nvcc, *host, "-std=c++17", "-arch=sm_80", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    error = next((line for line in (done.stderr + done.stdout).splitlines() if "error" in line), "no reason given")
    return f"{nvcc} doesn't work with this host compiler: {error.strip()}"


def usable_nvcc():
    """(the system's nvcc, "") where it can build our kernels, else (None, the reason)."""
    nvcc = system_nvcc()
    if not nvcc:
        return None, "there is no nvcc on this system"
    problem = nvcc_problem(nvcc)
    return (None, problem) if problem else (nvcc, "")


# ---- hooks -----------------------------------------------------------------------------------------------------------


def check():
    """Everything that would stop the build later."""
    cuda_mode()
    check_link()
    if native():
        check_compiler()


def cuda_wheels():
    """The CUDA compiler wheels where this build needs them."""
    mode = cuda_mode()
    if mode in ("off", "system") or not native() or platform.machine() not in ("x86_64", "aarch64"):
        return []
    return [] if mode == "auto" and usable_nvcc()[0] else CUDA_WHEELS


def get_requires_for_build_wheel(config_settings=None):
    """Adds the CUDA compiler wheels where they are needed."""
    check()
    return _setuptools.get_requires_for_build_wheel(config_settings) + cuda_wheels()


def get_requires_for_build_editable(config_settings=None):
    """Adds the CUDA compiler wheels where they are needed."""
    check()
    return _setuptools.get_requires_for_build_editable(config_settings) + cuda_wheels()
