"""The native CEMA against the definition in float64."""

import multiprocessing

import pytest
import torch

from megalodon_lm.ops import reference
from megalodon_lm.ops.cema import cema_coefficients
from megalodon_lm.ops.cpu import cema as native
from megalodon_lm.ops.cpu.cema import cema

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
    assert_close(actual[1], expected[1], 2e-5)


def test_bf16_input_loses_no_more_than_its_rounding():
    inputs = case(150, dtype=torch.bfloat16)
    actual = gradients(lambda *a: cema(*a), inputs)
    expected = gradients(lambda *a: reference.cema(*a), double(inputs))
    assert [t.dtype for t in actual[0]] == [torch.bfloat16, torch.float32]
    assert_close(actual[0], expected[0], 5e-3)
    assert_close(actual[1], expected[1], 1e-2)


def test_same_bits_every_time_and_for_every_number_of_threads():
    found = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(lambda *a: cema(*a), case(100, 128, 16)))
    torch.set_num_threads(2)
    for other in found[1:]:
        for a, b in zip([*found[0][0], *found[0][1]], [*other[0], *other[1]], strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_computes_the_same():
    expected = cema(*case(50, 128))[0].sum().item()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_total) == expected


def _total():
    torch.set_num_threads(2)
    return native._forward(*_packed(case(50, 128)), None, None, False)[0].sum().item()


def _packed(inputs):
    seen = []
    original = native._forward
    native._forward = lambda *a: seen.append(a) or original(*a)
    try:
        with torch.no_grad():
            cema(*inputs)
    finally:
        native._forward = original
    return seen[0][:4]


def test_operator_is_well_formed_and_compiles():
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in _packed(case(20))]
    torch.library.opcheck(native.cema_forward, (*inputs, None, None, True))
    leaves = case(20)

    def loss(x, p, q, g, omega, state):
        y, h = cema(x, p, q, g, omega, state)
        return y.square().sum() + h.square().sum()

    x = leaves[0].requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), x)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(*leaves), x)[0], expected)
