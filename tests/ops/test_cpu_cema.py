"""The native CEMA against the definition in float64."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megalodon_lm.ops import reference
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.cema import cema_coefficients
from megalodon_lm.ops.cpu import cema as native
from megalodon_lm.ops.cpu.causal_attention import causal_attention
from megalodon_lm.ops.cpu.cema import cema
from megalodon_lm.ops.cpu.norms import rms_norm
from megalodon_lm.ops.cpu.timestep_norm import timestep_norm

from .cases import BOUNDARIES, assert_close, boundaries, gradients

B = 3


def case(length, dim=40, ndim=5, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(dim, ndim, 1), (dim, ndim, 1), (dim, 1, 1), (dim, ndim, 2)]
    p, q, gain = cema_coefficients(*(torch.randn(s, generator=g) for s in shapes))
    x = torch.randn(B, length, dim, generator=g).to(dtype)
    return [x, p, q, gain, torch.randn(dim, generator=g), torch.randn(B, dim, ndim, 2, generator=g)]


def double(inputs):
    return [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in inputs]


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize(("length", "dim", "ndim"), [(1, 40, 5), (7, 64, 16), (64, 40, 5), (150, 40, 5)])
def test_equals_reference_with_all_gradients(kind, length, dim, ndim):
    where = boundaries(kind, B, length)
    inputs = case(length, dim, ndim)
    actual = gradients(lambda *a: cema(*a, where), inputs)
    expected = gradients(lambda *a: reference.cema(*a, where), double(inputs))
    assert_close(actual[0], expected[0], 5e-6)
    assert_close(actual[1], expected[1], 1e-5)


def test_equals_reference_where_every_token_starts_a_document():
    where = Boundaries(torch.ones(B, 70, dtype=torch.bool), None)
    actual = gradients(lambda *a: cema(*a, where), case(70))
    expected = gradients(lambda *a: reference.cema(*a, where), double(case(70)))
    assert_close(actual[0], expected[0], 5e-6)
    assert_close(actual[1], expected[1], 1e-5)


def test_without_entry_state():
    inputs = case(70)[:5]
    actual = gradients(lambda *a: cema(*a), inputs)
    expected = gradients(lambda *a: reference.cema(*a), double(inputs))
    assert_close(actual[0], expected[0], 5e-6)
    assert_close(actual[1], expected[1], 1e-5)


@pytest.mark.parametrize("kind", BOUNDARIES)
def test_bf16_input_loses_no_more_than_its_rounding(kind):
    where = boundaries(kind, B, 150)
    inputs = case(150, dtype=torch.bfloat16)
    actual = gradients(lambda *a: cema(*a, where), inputs)
    expected = gradients(lambda *a: reference.cema(*a, where), double(inputs))
    assert [t.dtype for t in actual[0]] == [torch.bfloat16, torch.float32]
    assert_close(actual[0], expected[0], 5e-3)
    assert_close(actual[1], expected[1], 1e-2)


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 66])
def test_without_gradients(kind, dtype, length):
    where = boundaries(kind, B, length)
    inputs = [t.requires_grad_() for t in case(length, dtype=dtype)]
    with torch.no_grad():
        actual = cema(*inputs, where)
        expected = reference.cema(*double(inputs), where)
    assert not any(t.requires_grad for t in actual)
    assert_close(actual, expected, 5e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("length", [1, 3])
def test_document_start_forgets_even_what_is_not_finite(length):
    inputs = case(length)
    inputs[-1][:] = torch.inf
    starts = torch.zeros(B, length, dtype=torch.bool)
    starts[:, 0] = True
    assert all(torch.isfinite(t).all() for t in cema(*inputs, Boundaries(starts, None)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 3])
def test_nan_stays_nan(dtype, length):
    inputs = case(length, dtype=dtype)
    inputs[0][0, -1, 7] = torch.nan
    y, h = cema(*inputs)
    assert torch.isnan(y).sum() == 1
    assert torch.isnan(h[0, 7, :, 0]).all()


def test_long_memory_stays_accurate():
    """|q| = 1 - 1e-4: rounding that added up over the memory would show."""
    x, p, q, g, omega, _ = case(3000, 8, 4)
    q = torch.polar(torch.full_like(q.abs(), 1 - 1e-4), q.angle())
    actual = gradients(lambda *a: cema(*a), [x[:1], p, q, g, omega])
    expected = gradients(lambda *a: reference.cema(*a), double([x[:1], p, q, g, omega]))
    assert_close(actual[0], expected[0], 5e-5)
    assert_close(actual[1], expected[1], 5e-5)


def test_same_bits_every_time_and_for_every_number_of_threads():
    found = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(lambda *a: cema(*a), case(100, 128, 16)))
    torch.set_num_threads(2)
    for other in found[1:]:
        for a, b in zip([*found[0][0], *found[0][1]], [*other[0], *other[1]], strict=True):
            assert torch.equal(a, b)


def test_calls_from_several_python_threads_do_not_mix():
    expected = _total()
    with ThreadPoolExecutor(4) as pool:
        assert [f.result() for f in [pool.submit(_total) for _ in range(16)]] == [expected] * 16


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_computes_the_same():
    expected = _total()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_total) == expected


def _total():
    return cema(*case(50, 128))[0].sum().item()


@pytest.mark.parametrize("kind", BOUNDARIES)
def test_operator_is_well_formed(kind):
    where = boundaries(kind, B, 70) or Boundaries()
    x, p, q, g, omega, state = case(70)
    direct = F.pad(omega, (0, -len(omega) % native.CHANNELS)).view(-1, native.CHANNELS)
    inputs = [t.contiguous().requires_grad_() for t in (x, native.pack(p, q, g), direct, state)]
    torch.library.opcheck(native.cema_forward, (*inputs, where.starts, where.lengths, True))


def test_backward_fills_no_zeros_for_what_has_no_gradient(monkeypatch):
    """Only for the exit statistics and states of a loss that does not use them, which are small."""

    class Zeros(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "zeros" in func.name() and out.numel() > 1:
                made.append(tuple(out.shape))
            return out

    x, p, q, g, omega, state = (t.requires_grad_() for t in case(200, 64, 16))
    weight = torch.zeros(64, requires_grad=True)
    heads = x.view(B, 200, 2, 32)
    outputs = {
        "cema": (cema(x, p, q, g, omega, state)[0], {tuple(state.shape)}),
        "timestep norm": (timestep_norm(x, weight, weight, 4)[0], {(B, 4)}),
        "norm": (rms_norm(x, weight, 1e-5), set()),
        "attention": (causal_attention(heads, heads, heads, None, None, torch.arange(200).expand(B, -1)), {(0,)}),
    }
    for name, (out, small) in outputs.items():
        made = []
        with Zeros():
            torch.autograd.grad(out.sum(), x)
        assert set(made) <= small | {tuple(x.shape)}, name


def loss(x, p, q, g, omega, state, starts, lengths):
    y, h = cema(x, p, q, g, omega, state, Boundaries(starts, lengths))
    return y.square().sum() + h.square().sum()


@pytest.mark.parametrize("kind", BOUNDARIES)
def test_compiles_as_one_graph(kind):
    where = boundaries(kind, B, 20) or Boundaries()
    inputs = [t.requires_grad_() for t in case(20)]
    expected = torch.autograd.grad(loss(*inputs, where.starts, where.lengths), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*inputs, where.starts, where.lengths), inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
