import numpy as np
import pytest
import torch
from scipy import signal

from megalodon_lm.ops import cema as portable
from megalodon_lm.ops import reference
from megalodon_lm.ops.cema import cema_coefficients

from .cases import BOUNDARIES, assert_close, boundaries, gradients

cema = portable.cema.portable

B, L, D, N = 3, 150, 4, 5


def parameters(dim=D, ndim=N, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(dim, ndim, 1), (dim, ndim, 1), (dim, 1, 1), (dim, ndim, 2)]
    return [torch.randn(s, generator=g, dtype=dtype) for s in shapes]


def case(length=L, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, length, D, generator=g, dtype=torch.float64)
    omega = torch.randn(D, generator=g, dtype=torch.float64)
    state = torch.randn(B, D, N, 2, generator=g, dtype=torch.float64)
    return [x, *cema_coefficients(*parameters()), omega, state]


def test_coefficients_equal_reference():
    actual, expected = (f(*parameters()) for f in (cema_coefficients, reference.cema_coefficients))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-14, atol=1e-14)


def test_coefficients_of_bf16_parameters_are_float32():
    p, q, g = cema_coefficients(*parameters(dtype=torch.bfloat16))
    assert (p.dtype, q.dtype, g.dtype) == (torch.float32, torch.complex64, torch.complex64)


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize("length", [1, 7, 64, 150])
def test_equals_reference_with_all_gradients(kind, length):
    where = boundaries(kind, B, length)
    actual = gradients(lambda *a: cema(*a, where), case(length))
    expected = gradients(lambda *a: reference.cema(*a, where), case(length))
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-11)


def test_equals_scipy_state_space_model():
    """The definition is that of scipy's discrete state space simulation with A = diag(q), B = p, C = g, D = omega."""
    x, p, q, g, omega, _ = case()
    for d in range(D):
        a, b = np.diag(q[d].numpy()), p[d].numpy()[:, None]
        # Outputs after the update: y_t = C h_t + D x_t with h_t = A h_{t-1} + B x_t.
        c = g[d].numpy()[None] @ a
        system = (a, b, c, (g[d].numpy() @ b)[None] + omega[d].item())
        expected = scipy_output(system, x[0, :, d].numpy())
        actual = cema(x, p, q, g, omega)[0][0, :, d].numpy()
        np.testing.assert_allclose(actual, expected, atol=1e-10)


def scipy_output(system, u):
    """scipy.signal.dlsim keeps only real states: split the complex system into its real and imaginary parts."""
    a, b, c, d = system
    real_a = np.block([[a.real, -a.imag], [a.imag, a.real]])
    real_b = np.vstack([b.real, b.imag])
    real_c = np.hstack([c.real, -c.imag])
    _, y, _ = signal.dlsim((real_a, real_b, real_c, d.real, 1.0), u)
    return y[:, 0]


def test_gradcheck():
    x, p, q, g, omega, state = (t[:2, :9] if i == 0 else t[:2] if i == 5 else t for i, t in enumerate(case()))
    inputs = [t.clone().requires_grad_() for t in (x, p, q, g, omega, state)]
    where = boundaries("documents", 2, 9)
    assert torch.autograd.gradcheck(lambda *a: cema(*a, where), inputs)
    assert torch.autograd.gradcheck(cema_coefficients, [t.clone().requires_grad_() for t in parameters(2, 3)])


def test_zero_decay_has_finite_gradients():
    """|q| = 0 is reached when both sigmoids saturate."""
    x, p, q, g, omega, state = case()
    q = torch.zeros_like(q).requires_grad_()
    y, h = cema(x, p, q, g, omega, state)
    (y.sum() + h.sum()).backward()
    assert torch.isfinite(q.grad).all()
