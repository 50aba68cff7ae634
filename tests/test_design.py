"""The rules of the design that neither compiler nor import-linter sees (layers: test_layers.py)."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from cases import conv2d

from cnnfast import dispatch
from cnnfast.backends import cpu, cuda

REPOSITORY = Path(__file__).resolve().parent.parent
CSRC = REPOSITORY / "csrc"
OPERATIONS = sorted(p.stem for p in (REPOSITORY / "cnnfast" / "ops").glob("[a-z]*.py"))
MODULES = [m for m in (cpu.MODULE, cuda.MODULE) if m is not None]


# ---- the core names no operation -------------------------------------------------------------------------------------

CORE = [
    *sorted((CSRC / "bindings").glob("*")), CSRC / "CMakeLists.txt",
    REPOSITORY / "setup.py", REPOSITORY / "build_backend" / "backend.py", REPOSITORY / "cnnfast" / "dispatch.py",
    REPOSITORY / "cnnfast" / "backends" / "_native.py", REPOSITORY / "cnnfast" / "backends" / "_gpu.py",
    REPOSITORY / "cnnfast" / "ops" / "_operator.py",
]  # fmt: skip


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_core_names_no_operation(path: Path) -> None:
    """Bindings, dispatcher and build files need no line for a new operation, so they name none."""
    words = {*OPERATIONS, "conv", "pool", "batch_norm"}
    found = [
        f"line {number}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for word in words
        if re.search(rf"(?<![a-z]){word}(?![a-z])|{word}[0-9]d", line, re.IGNORECASE)
    ]
    assert not found, found


def test_the_search_for_names_finds_one() -> None:
    """The test above can fail: an operation's own files name it."""
    with pytest.raises(AssertionError):
        test_core_names_no_operation(REPOSITORY / "cnnfast" / "ops" / "conv2d.py")


def test_files_stay_short() -> None:
    """A file that is much longer than 500 lines wants to be two."""
    files = [p for pattern in ("csrc/**/*.[ch]*", "cnnfast/**/*.py", "kernels/*.py") for p in REPOSITORY.glob(pattern)]
    lengths = {p: len(p.read_text().splitlines()) for p in files if p.is_file() and p.suffix not in (".so",)}
    long = {str(p.relative_to(REPOSITORY)): n for p, n in lengths.items() if n > 850}
    assert not long


# ---- parameter structs -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not MODULES, reason="no native module on this machine")
@pytest.mark.parametrize("direction", conv2d.DIRECTIONS)
def test_params_fields_are_the_problems(direction: str) -> None:
    """params.h's field table and what dispatch packs are one list: each field once, an int64, in a dense struct."""
    case = conv2d.CASES[0]
    problem = conv2d.problem(case, direction, dispatch.TORCH_DTYPES["f32"], "fp32")
    packed = dispatch.parameters(
        problem, {r.name: range(1, 1 + len(r.strides)) for r in dispatch.signature("conv2d").roles}
    )
    for module in MODULES:
        size, fields = module.structs()["Conv2dParams"]
        names = [name for name, _ in fields]
        assert sorted(names) == sorted(packed)
        assert [offset for _, offset in fields] == list(range(0, size, 8))
        assert size == 8 * len(fields)


@pytest.mark.skipif(not MODULES, reason="no native module on this machine")
def test_every_struct_belongs_to_an_operation() -> None:
    """Fields of each struct in each native module are sizes or strides that a signature knows."""
    strides = {f for s in dispatch._signatures.values() for r in s.roles for f in r.strides if f}
    for module in MODULES:
        for name, (_, fields) in module.structs().items():
            lower = {
                f
                for f, _ in fields
                if re.fullmatch(r"[a-z]+_[a-z]", f) and not f.startswith(("pad_", "stride_", "dilation_", "kernel_"))
            }
            assert lower <= strides, f"{name}: {sorted(lower - strides)} are no operand's strides"


@pytest.mark.skipif(not MODULES, reason="no native module on this machine")
def test_native_errors_are_clear() -> None:
    """Wrong ids, wrong sizes of structs, too many operands: an exception each, never a crash."""
    for module in MODULES:
        with pytest.raises(IndexError, match="no kernel"):
            module.Call(10**6, b"")
        with pytest.raises(IndexError, match="no kernel"):
            module.Call(-1, b"")
        name, params = module.kernels()[0]
        size, _ = module.structs()[params]
        with pytest.raises(ValueError, match=f"expected {size} bytes"):
            module.Call(0, b"short")
        call = module.Call(0, bytes(size))
        most = module.PACKED_OPERAND + 1
        with pytest.raises(ValueError, match=f"{most} operands"):
            call([0] * (most + 1), 0, 0, 1)
        assert len(dict.fromkeys(n for n, _ in module.kernels())) == len(module.kernels()), name


def test_registered_kernels_are_well_formed() -> None:
    """Names, directions and dtypes go by the rules that pinning, packing and reports rely on."""
    names = [(i.op, i.name, i.direction) for i in dispatch.implementations()]
    assert len(names) == len(set(names))
    for i in dispatch.implementations():
        assert i.name.split(".")[:2] == [i.backend, i.stem]
        assert i.direction in dispatch.signature(i.op).outputs
        assert i.dtypes, i.name
        assert set(i.dtypes) <= set(dispatch.TORCH_DTYPES)
        m, reason = i.error_bound
        assert 1.0 <= m <= 3.0
        assert reason
        assert set(i.layouts) <= {r.name for r in dispatch.signature(i.op).roles}


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_old_cards_are_refused_by_the_backend(name: str) -> None:
    """What decides is a pure function of the problem: no card is needed to ask."""
    module = importlib.import_module(f"cnnfast.backends.{name}")
    if module.ABSENT or getattr(module, "EMULATED", False) or getattr(module, "INTERPRETED", False):
        pytest.skip("needs the backend as it is for a card")
    old, new = (
        dispatch.Problem("max_pool2d", "fprop", "f32", "cuda", "fp32", (), capability=capability)
        for capability in ((7, 5), (8, 0))
    )
    assert module.BACKEND.unavailable(old) == ["needs compute capability 8.0 or newer, not 7.5"]
    assert module.BACKEND.unavailable(new) == []


# ---- native sources --------------------------------------------------------------------------------------------------


def _code(path: Path) -> str:
    """A source without its comments and strings."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', text)


CUDA_SOURCES = sorted((CSRC / "cuda").rglob("*.[ch]*"))
# What a launcher may not call: it would serialise streams, break graph capture, or own memory that torch should own.
SYNCHRONISING = (
    "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaThreadSynchronize",
    "cudaDeviceReset", "cudaMalloc", "cudaFree", "cudaMallocAsync", "cudaFreeAsync", "cudaMallocManaged",
    "cudaHostAlloc", "cudaMallocHost",
    "cudaMemcpy", "cudaMemset", "cudaMemcpyToSymbol", "cudaSetDevice", "cudaStreamCreate", "cudaEventCreate",
)  # fmt: skip


@pytest.mark.parametrize("path", CUDA_SOURCES, ids=lambda p: p.name)
def test_launchers_neither_synchronise_nor_allocate(path: Path) -> None:
    """Static: the sources call no CUDA function that waits, allocates or changes the device."""
    calls = set(re.findall(r"\bcuda[A-Z]\w*(?=\s*\()", _code(path)))
    assert not calls & set(SYNCHRONISING), f"{path.name} calls {sorted(calls & set(SYNCHRONISING))}"


@pytest.mark.parametrize("path", CUDA_SOURCES, ids=lambda p: p.name)
def test_ptx_only_inside_wrappers(path: Path) -> None:
    """Inline assembly stays in primitives/: everything else compiles for the emulation, too."""
    if "primitives" in path.parts:
        pytest.skip("a wrapper")
    assert not re.search(r"\basm\b", _code(path))


def test_csrc_includes_no_torch() -> None:
    """One build serves every torch: no header of torch, ATen or c10 anywhere in csrc."""
    guilty = [
        str(p.relative_to(REPOSITORY))
        for p in CSRC.rglob("*")
        if p.suffix in (".h", ".hpp", ".cpp", ".cu", ".cuh")
        and re.search(r"#include\s*[<\"](torch|ATen|c10)/", p.read_text())
    ]
    assert not guilty


def test_same_stems_everywhere() -> None:
    """A kernel's file is named after its stem, which starts with its operation's name, in every folder."""
    for folder, suffix in ((CSRC / "cpu", ".cpp"), (CSRC / "cuda", ".cu"), (REPOSITORY / "kernels", ".py")):
        for path in folder.glob(f"*{suffix}"):
            if not path.stem.startswith("_"):
                assert any(path.stem.startswith(op) for op in OPERATIONS), (
                    f"{path} belongs to no operation of {OPERATIONS}"
                )
    for module in MODULES:
        for name, _ in module.kernels():
            assert any(name.startswith(op) for op in OPERATIONS), name


def test_bindings_cover_every_backend_with_a_plan() -> None:
    for name, backend in dispatch.backends().items():
        native = [i for i in backend.implementations if i.node is not None]
        assert bool(native) == (backend.plan is not None), name
