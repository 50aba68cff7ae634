"""PEP 517 backend: setuptools, plus the CUDA compiler wheels where the build needs them.

``CNNFAST_CUDA=auto`` (default): on Linux the CUDA module is built with the system's nvcc, else with PyPI's compiler
wheels, which this hook then adds to the build's requirements; ``system`` or ``wheel`` force one; ``off`` builds no CUDA.
The whole toolkit set is pinned together: the compiler's own dependencies are not pinned to each other on PyPI.
"""

import os
import platform
import shutil
import sys

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403

CUDA_WHEELS = ["cuda-toolkit[nvcc,cudart,cccl]==13.0.3"]


def system_nvcc():
    """The system's nvcc: CUDACXX, CUDA_HOME, CUDA_PATH, PATH, the default prefix; None if there is none."""
    candidates = [os.environ.get("CUDACXX")]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append(os.path.join(os.environ[variable], "bin", "nvcc"))
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def cuda_mode():
    """What CNNFAST_CUDA asks for: auto, system, wheel or off."""
    mode = os.environ.get("CNNFAST_CUDA", "auto").lower()
    if mode in ("0", "no", "none"):
        mode = "off"
    if mode not in ("auto", "system", "wheel", "off"):
        raise SystemExit(f"CNNFAST_CUDA: expected auto, system, wheel or off, got {mode!r}")
    return mode


def _cuda_wheels():
    mode = cuda_mode()
    if mode in ("off", "system") or sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return []
    return [] if mode == "auto" and system_nvcc() else CUDA_WHEELS


def get_requires_for_build_wheel(config_settings=None):
    """Adds the CUDA compiler wheels where they are needed."""
    return _setuptools.get_requires_for_build_wheel(config_settings) + _cuda_wheels()


def get_requires_for_build_editable(config_settings=None):
    """Adds the CUDA compiler wheels where they are needed."""
    return _setuptools.get_requires_for_build_editable(config_settings) + _cuda_wheels()
