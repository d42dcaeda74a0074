"""The table of ops: which implementation runs, what autocast means to it, and what happens where none can work."""

import logging
import subprocess
import sys

import pytest
import torch

import megalodon_lm.ops
from megalodon_lm.ops import backend
from megalodon_lm.ops.cema import cema, cema_coefficients
from megalodon_lm.ops.chunk_attention import chunk_attention
from megalodon_lm.ops.cpu import elementwise_kernels, simd
from megalodon_lm.ops.decay_norm import decay_norm
from megalodon_lm.ops.gates import silu_gate
from megalodon_lm.ops.norms import rms_norm
from megalodon_lm.ops.timestep_norm import timestep_norm

D, N = 32, 2
CPU = torch.device("cpu")


def draw(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g) for s in shapes]


@pytest.fixture
def choose(monkeypatch):
    """Sets the backend for one test."""
    monkeypatch.setattr(backend, "_chosen", "auto")
    return backend.set_backend


@pytest.fixture
def fresh(monkeypatch):
    """Homes not tried yet."""
    monkeypatch.setattr(backend, "_failures", {})


def test_what_runs_is_told(choose):
    x, w = draw((3, D), (D,))
    assert rms_norm.implementation(x, w, 1e-5).__module__ == "megalodon_lm.ops.cpu.norms"
    assert rms_norm.implementation(x[:, :7], w[:7], 1e-5) is rms_norm.portable  # no whole vectors
    assert rms_norm.implementation(x.double(), w, 1e-5) is rms_norm.portable
    assert backend.runs_natively(x)
    assert backend.describe(CPU).startswith("native CPU kernels")
    choose("portable")
    assert rms_norm.implementation(x, w, 1e-5) is rms_norm.portable
    assert not backend.runs_natively(x)
    assert backend.describe(CPU) == "portable PyTorch on cpu"


def everything(x, weight, bias, alpha, delta, theta, gamma, omega):
    """All kinds of ops, one after another."""
    y, norm = timestep_norm(x, weight, bias, 2)
    y, forgetful = decay_norm(y, weight, bias, 2)
    y, h = cema(y, *cema_coefficients(alpha, delta, theta, gamma), omega)
    y = rms_norm(y, weight, 1e-5)
    heads = y.unflatten(-1, (2, -1))
    attention, cache = chunk_attention(heads, heads, heads, 16, 1e4)
    return silu_gate(y, attention.flatten(-2)), norm.var, forgetful.var, h, cache.keys


def inputs():
    return draw((2, 20, D), (D,), (D,), (D, N, 1), (D, N, 1), (D, 1, 1), (D, N, 2), (D,))


@pytest.mark.parametrize("name", ["auto", "portable"])
def test_autocast_rounds_outputs_and_products_alone(name, choose):
    choose(name)
    with torch.autocast("cpu", torch.bfloat16):
        y, var, forgetful, h, keys = everything(*inputs())
        assert torch.is_autocast_enabled("cpu")
    assert (var.dtype, forgetful.dtype, h.dtype) == (torch.float64, torch.float64, torch.float32)
    assert (y.dtype, keys.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.filterwarnings("ignore")  # inside torch.compile
def test_autocast_compiles_to_one_graph():
    def run(x, *rest):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cat([t.double().flatten() for t in everything(x, *rest)])

    x, *rest = inputs()
    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        given = x.clone().requires_grad_()
        out = function(given, *rest)
        found.append((out, *torch.autograd.grad(out.square().sum(), given)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_device_joins_by_a_file_of_its_own(fresh, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "norms.py").write_text(
        "from megalodon_lm.ops import norms\n"
        "from megalodon_lm.ops.backend import implements\n"
        "@implements(norms.rms_norm, 'cpu', lambda x, *_, **__: len(x) > 1)\n"
        "def rms_norm(x, weight, eps, out_dtype=None):\n"
        "    return 'mine'\n"
    )
    for op in backend.OPS.values():
        monkeypatch.setattr(op, "implementations", {})
    monkeypatch.setattr(megalodon_lm.ops, "__path__", [*megalodon_lm.ops.__path__, str(tmp_path)])
    monkeypatch.setitem(backend.HOMES, "cpu", backend.Home("elsewhere", "mine", (torch.float32,)))
    x, w = draw((2, D), (D,))
    try:
        assert rms_norm(x, w, 1e-5) == "mine"
        assert torch.equal(rms_norm(x[:1], w, 1e-5), rms_norm.portable(x[:1], w, 1e-5))
        assert torch.equal(silu_gate(x, x), silu_gate.portable(x, x))
    finally:
        for name in [name for name in sys.modules if name.startswith("megalodon_lm.ops.elsewhere")]:
            del sys.modules[name]
        del megalodon_lm.ops.elsewhere


@simd.compiled
def _impossible(threads, num_tasks, args):
    args.no_such_thing()


def test_a_kernel_that_cannot_be_compiled_leaves_it_to_the_portable_path_and_says_so_once(fresh, caplog, monkeypatch):
    monkeypatch.setattr(elementwise_kernels, "norm_forward_on_team", _impossible)
    x, w = draw((3, D), (D,))
    for _ in range(2):
        assert torch.equal(rms_norm(x, w, 1e-5), rms_norm.portable(x, w, 1e-5))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "_impossible" in record.message
    assert "portable" in record.message
    assert "\n" not in record.message
    assert not backend.runs_natively(x)
    assert backend.describe(CPU) == "portable PyTorch on cpu"


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("sys.modules['numba'] = None; model(x)", 1),
        ("model.double()(x); set_backend('portable'); model.float()(x); assert 'numba' not in sys.modules", 0),
    ],
)
def test_numba_is_loaded_only_for_its_kernels_and_can_be_missing(code, lines):
    setting = (
        "import sys, torch; from megalodon_lm import *; from megalodon_lm.ops.backend import set_backend; "
        "model = Megalodon(ModelConfig.named('tiny')); x = torch.zeros(1, 4, dtype=torch.int64); "
    )
    done = subprocess.run([sys.executable, "-c", setting + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == lines
    assert "portable" in done.stderr or not lines
