"""Threads, forks, distributed training, memory over time, and what an import may need."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support import process
from torch.testing import assert_close

import cnnfast
from cnnfast import dispatch, functional, ops, settings
from cnnfast.backends import cpu
from cnnfast.ops import _operator

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
REPOSITORY = Path(__file__).resolve().parent.parent


def groups_for(backend: str, stride: int = 1) -> int:
    """1, or the number of groups of a small 16 to 16 channel convolution that a pinned kernel serves; 0: it serves none."""
    for groups in (1, 4, 16):
        with contextlib.suppress(NotImplementedError), cnnfast.backend(backend):
            functional.conv2d(
                torch.zeros(1, 16, 3, 3), torch.zeros(16, 16 // groups, 3, 3), stride=stride, groups=groups
            )
            return groups
    return 0


PINNED = [
    backend
    for backend in sorted({
        f"{i.backend}.{i.stem}" for i in dispatch.implementations() if not process.not_here(i) and i.backend == "cpu"
    })
    if groups_for(backend)
]  # fmt: skip


def run_python(code: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter on the repository; its output is in the failure message."""
    env = {k: v for k, v in os.environ.items() if k not in ("CNNFAST_EMULATE_CUDA", "TRITON_INTERPRET")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH", "")]))
    env.update(environment)
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
        check=False,
    )
    assert out.returncode == 0, f"exit status {out.returncode}\n{out.stdout}\n{out.stderr}"
    return out


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", *PINNED])
def test_threads(backend: str) -> None:
    """Eight threads at once, different shapes, forward and backward: everybody gets their own results."""
    torch.manual_seed(0)
    jobs, groups = [], groups_for(backend)
    for i in range(8):
        x, w = torch.randn(1 + i % 3, 16, 8 + i, 9), torch.randn(16, 16 // groups, 3, 3)
        out = torch.conv2d(a := x.clone().requires_grad_(), c := w.clone().requires_grad_(), padding=1, groups=groups)
        out.square().sum().backward()
        jobs.append((x, w, out.detach(), a.grad, c.grad))
    failures: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def work(job: Any) -> None:
        try:
            x, w, *expected = job
            start.wait()
            for _ in range(10):
                a, c = x.clone().requires_grad_(), w.clone().requires_grad_()
                out = functional.conv2d(a, c, padding=1, groups=groups)
                out.square().sum().backward()
                assert_close([out.detach(), a.grad, c.grad], expected, rtol=1e-3, atol=1e-3)
        except BaseException as error:
            failures.append(error)

    with cnnfast.backend(backend):
        threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not failures, failures[0]


@pytest.mark.parametrize("backend", ["auto", *PINNED])
def test_thread_count_changes_nothing(backend: str) -> None:
    """1, 2, 3 or 7 threads: results equal bit by bit, and torch's setting stays as it was."""
    torch.manual_seed(0)
    stride = 2 if groups_for(backend, 2) else 1
    groups = groups_for(backend, stride)
    x, w, b = torch.randn(2, 16, 15, 13), torch.randn(16, 16 // groups, 3, 3), torch.randn(16)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            with cnnfast.backend(backend):
                a, c, d = (t.clone().requires_grad_() for t in (x, w, b))
                out = functional.conv2d(a, c, d, stride=stride, padding=1, groups=groups)
                out.backward(torch.cos(out.detach()))
            results.append([out.detach(), a.grad, c.grad, d.grad])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for p, q in zip(results[0], other, strict=True):
            assert torch.equal(p, q)


# ---- fork ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.skipif(cpu.MODULE is None, reason=f"no CPU kernels here: {cpu.ABSENT}")
@pytest.mark.parametrize("backend", PINNED or ["cpu"])
def test_fork_after_parallel_work(backend: str) -> None:
    """A forked child convolves, forward and backward, though its parent used all threads. torch's own hangs there."""
    groups = groups_for(backend)
    code = f"""
        import os, signal, torch, cnnfast
        # small enough that torch's own copies and comparisons stay serial: in a forked child they hang otherwise
        x, w = torch.randn(2, 16, 24, 24), torch.randn(16, 16 // {groups}, 3, 3)
        def work():
            with cnnfast.backend({backend!r}):
                a, c = x.clone().requires_grad_(), w.clone().requires_grad_()
                out = cnnfast.functional.conv2d(a, c, padding=1, groups={groups})
                return out.detach(), *torch.autograd.grad(out, (a, c), out.detach())
        torch.relu(torch.randn(1 << 21))
        torch.conv2d(x, w, groups={groups})
        expected = work()
        for _ in range(3):
            child = os.fork()
            if not child:
                signal.alarm(20)
                same = all(torch.equal(p, q) for p, q in zip(work(), expected))
                os._exit(0 if same else 3)
            _, status = os.waitpid(child, 0)
            assert status == 0, f"the child ended with {{status}} (14: it hung)"
            assert all(torch.equal(p, q) for p, q in zip(work(), expected)), "the parent's own results changed"
    """
    run_python(code, timeout=90)


def test_data_loader_workers() -> None:
    """Convolutions inside forked DataLoader workers, after parallel work in the parent."""
    if cpu.MODULE is None:
        pytest.skip(f"no CPU kernels here: {cpu.ABSENT}")
    run_python("""
        import torch, cnnfast
        class Blurred(torch.utils.data.Dataset):
            def __len__(self): return 8
            def __getitem__(self, i):
                x, w = torch.full((1, 1, 16, 16), float(i)), torch.ones(1, 1, 3, 3)
                with cnnfast.strict(): return cnnfast.functional.conv2d(x, w)[0]
        torch.conv2d(torch.randn(2, 16, 32, 32), torch.randn(32, 16, 3, 3)); torch.relu(torch.randn(1 << 21))
        cnnfast.functional.conv2d(torch.randn(2, 16, 32, 32), torch.randn(32, 16, 3, 3))
        options = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 20}
        loader = torch.utils.data.DataLoader(Blurred(), batch_size=4, **options)
        assert [float(b.mean()) for b in loader] == [9 * 1.5, 9 * 5.5]
    """)


# ---- distributed -----------------------------------------------------------------------------------------------------


def _ddp(rank: int, port: int, compiled: bool) -> None:
    import warnings

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    signal.alarm(100)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        cnnfast.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(),
        cnnfast.Conv2d(8, 4, 3, groups=2).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    )  # fmt: skip
    reference = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3, groups=2)
    )
    reference.load_state_dict(net.state_dict())
    parallel: Any = torch.nn.parallel.DistributedDataParallel(net)
    if compiled:
        parallel = torch.compile(parallel, backend="aot_eager")
    x = torch.randn(4, 3, 8, 8)
    reference(x).square().mean().backward()
    for _ in range(2):
        net.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*[Gg]rad strides.*")
            parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        for p, q in zip(net.parameters(), reference.parameters(), strict=True):
            assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, check_stride=False)
    del parallel
    torch.distributed.destroy_process_group()
    # On a loaded machine torch's own threads sometimes outlive what they belong to, and the interpreter's last steps abort
    # ("terminate called without an active exception"). All that is asked here has been checked by now.
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_ddp(compiled: bool) -> None:
    """Two processes: gradients are the average's, strides don't make DDP warn."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = f"""
        import sys
        sys.path.insert(0, {str(REPOSITORY / "tests")!r})
        import test_processes
        test_processes._ddp(int(sys.argv[1]) if len(sys.argv) > 1 else RANK, {port}, {compiled})
    """
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code).replace("RANK", str(rank))],
            env={**env, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [child.communicate(timeout=150)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_over_changing_shapes() -> None:
    """300 new shapes, forward and backward, after 600 others: no growth beyond what the first rounds needed."""
    run_python("""
        import gc, resource, torch, cnnfast
        from pathlib import Path
        def resident():
            gc.collect()
            return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        conv = cnnfast.Conv2d(8, 8, 3, padding=1)
        def round(start):
            for i in range(300):
                x = torch.randn(1, 8, 16 + i % 20, start + i // 20, requires_grad=True)
                conv(x).sum().backward()
        round(8); round(30)
        before = resident()
        round(60)
        grown = resident() - before
        assert grown < 24 << 20, f"{grown >> 20} MiB in 300 calls"
    """, OMP_NUM_THREADS="1")  # fmt: skip


def test_caches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_operator, "_CACHE_LIMIT", 16)
    ops.conv2d._runs.clear()
    for i in range(60):
        functional.conv2d(torch.randn(1, 2, 3 + i, 3), torch.randn(2, 2, 3, 3))
        assert len(ops.conv2d._runs) <= 16
    out = functional.conv2d(torch.ones(1, 2, 3, 3), torch.ones(2, 2, 3, 3))
    assert float(out.sum()) == 36


def test_results_own_their_memory() -> None:
    """A later call never changes an earlier result, nor do results share memory with operands."""
    x, w = torch.randn(1, 8, 6, 6), torch.randn(8, 8, 1, 1)
    outs = [functional.conv2d(x * i, w) for i in range(4)]
    copies = [o.clone() for o in outs]
    for i in range(4, 8):
        functional.conv2d(x * i, w)
    for a, b in zip(outs, copies, strict=True):
        assert torch.equal(a, b)
    addresses = {t.untyped_storage().data_ptr() for t in (*outs, x, w)}
    assert len(addresses) == 6


def test_nothing_holds_operands() -> None:
    """Caches keep kinds of calls, not tensors: operands are freed with their last user."""
    import gc
    import weakref

    x, w = torch.randn(1, 3, 77, 5), torch.randn(4, 3, 3, 3)
    out = functional.conv2d(x.requires_grad_(), w.requires_grad_())
    out.sum().backward()
    held = [weakref.ref(t) for t in (x, w, out)]
    del x, w, out
    gc.collect()
    assert [r() for r in held] == [None, None, None]


# ---- imports ---------------------------------------------------------------------------------------------------------

_CONVOLVES = """
    x, w = torch.randn(1, 3, 6, 6, requires_grad=True), torch.randn(4, 3, 3, 3)
    out = cnnfast.functional.conv2d(x, w)
    torch.testing.assert_close(out, torch.conv2d(x, w))
    out.sum().backward()
    status = {name: b.status() for name, b in dispatch.backends().items()}
"""
_BLOCK = """
    import sys
    for name in BLOCKED: sys.modules[name] = None
    import torch, cnnfast
    from cnnfast import dispatch
"""


def _blocked(*names: str, then: str) -> None:
    run_python(_BLOCK.replace("BLOCKED", repr(names)) + _CONVOLVES + then)


def test_import_without_native_modules() -> None:
    """ATen serves, and the reasons are in the status and in what strict() raises."""
    _blocked("cnnfast._cpu", "cnnfast._cuda", then="""
    assert "import of cnnfast._cpu halted" in status["cpu"], status
    assert "import of cnnfast._cuda halted" in status["cuda"], status
    try:
        with cnnfast.strict(): cnnfast.functional.conv2d(x, w)
    except NotImplementedError as error: assert "import of cnnfast._cpu halted" in str(error), error
    else: raise AssertionError("strict() found a kernel")
    """)  # fmt: skip


def test_import_without_triton() -> None:
    _blocked("triton", then="""
    assert "import of triton halted" in status["triton"], status
    """)  # fmt: skip


def test_import_without_optional_packages() -> None:
    """Nothing but torch is needed to import and to convolve."""
    _blocked("triton", "torchvision", "onnx", "matplotlib", "sklearn", "skimage", "scipy", "pandas", "PIL", then="")


def test_import_without_a_writable_home_or_a_compiler(tmp_path: Path) -> None:
    """No compiler on the PATH, a home and a cache that can't be written, a folder that isn't the repository."""
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o500)
    run_python(
        "import os; os.chdir('/')\nimport torch, cnnfast\nfrom cnnfast import dispatch\n" + textwrap.dedent(_CONVOLVES)
        + "import shutil; assert not (shutil.which('gcc') or shutil.which('cc') or shutil.which('c++'))\n"
        + "assert not os.listdir(os.environ['HOME'])",
        HOME=str(home), XDG_CACHE_HOME="/nonexistent/cache", PATH="/nonexistent", CUDA_HOME="", TMPDIR=str(tmp_path),
    )  # fmt: skip


def test_import_is_silent_and_starts_nothing() -> None:
    """No output, no warning, no thread, no child, no CUDA initialisation, no compilation."""
    out = run_python("""
        import threading, warnings, sys
        warnings.simplefilter("error")
        import torch
        before = threading.active_count()
        import cnnfast
        assert threading.active_count() == before
        assert not torch.cuda.is_initialized()
        assert "torch._inductor" not in sys.modules and "torchvision" not in sys.modules
    """)  # fmt: skip
    assert out.stdout == ""


def test_isa_can_be_capped() -> None:
    if cpu.MODULE is None:
        pytest.skip(f"no CPU kernels here: {cpu.ABSENT}")
    code = """
        import torch, cnnfast
        from cnnfast import dispatch, settings
        from cnnfast.backends import cpu
        with settings.observe() as events: cnnfast.functional.conv2d(torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3))
        print(events[0].selection.implementation.name, *cpu.isas())
    """
    isa = cpu.isas()[-1]
    name, first, *_ = run_python(code, CNNFAST_CPU_ISA=isa).stdout.split()
    assert name.endswith(f".{isa}")
    assert first == isa
    with pytest.raises(AssertionError, match="CNNFAST_CPU_ISA"):
        run_python(code, CNNFAST_CPU_ISA="sse9")


def test_best_isa_serves_by_default() -> None:
    """Without a cap the widest ISA's kernels come first: a lesser one never serves what the best one has."""
    if cpu.MODULE is None:
        pytest.skip(f"no CPU kernels here: {cpu.ABSENT}")
    order = ("avx512", "avx2", "portable")
    assert list(cpu.isas()) == [i for i in order if i in cpu.isas()]
    with settings.observe() as events:
        functional.conv2d(torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3))
    assert events[0].selection.implementation.name.endswith(cpu.isas()[0])  # type: ignore[attr-defined]
