"""Functions of sixteen floats at once, against float64."""

import numpy as np
import pytest
import torch
from numba import njit

from megalodon_lm.ops.cpu import simd
from megalodon_lm.ops.cpu.simd import LANES, exp, load, sigmoid, store


def applied(function, x):
    """The values of a vector function, compiled anew and kept nowhere: patches decide what it is made of."""

    @njit(error_model="numpy")
    def run(x, y):
        for i in range(0, len(x), LANES):
            store(y, i, function(load(x, i)))

    y = np.empty_like(x)
    run(x, y)
    return y


def worst(found, expected):
    """Largest relative difference."""
    return float(np.abs(found.astype(np.float64) / expected - 1).max())


@pytest.fixture(params=["as here", "from bits"])
def guess(request, monkeypatch):
    """Reciprocals by what this processor has, and by what any has."""
    if request.param == "from bits":
        monkeypatch.setattr(simd, "has_wide_vectors", lambda: False)


def test_exp():
    for lowest, highest in ((-87, 88), (-1, 1), (-1e-3, 1e-3)):
        x = np.linspace(lowest, highest, 1 << 14, dtype=np.float32)
        assert worst(applied(exp, x), np.exp(x.astype(np.float64))) < 4.5e-7
    assert applied(exp, np.zeros(LANES, np.float32)).tolist() == [1.0] * LANES


def test_exp_far_below_is_tiny_and_nan_stays():
    x = np.array([-88, -1e4, -np.inf, np.nan] * 4, np.float32)
    y = applied(exp, x).reshape(4, 4)
    assert (y[:, :3] < 1.3e-38).all()
    assert (y[:, :3] >= 0).all()
    assert np.isnan(y[:, 3]).all()


def test_sigmoid(guess):
    for limit in (80, 1):
        x = np.linspace(-limit, limit, 1 << 14, dtype=np.float32)
        assert worst(applied(sigmoid, x), 1 / (1 + np.exp(-x.astype(np.float64)))) < 5e-7


def test_sigmoid_at_the_ends(guess):
    y = applied(sigmoid, np.array([-np.inf, np.inf, np.nan, 0] * 4, np.float32)).reshape(4, 4)
    assert (y[:, 0] < 2e-35).all()
    assert (y[:, 0] >= 0).all()
    assert (y[:, 1] == 1).all()
    assert np.isnan(y[:, 2]).all()
    assert (y[:, 3] == 0.5).all()


def test_bf16_is_the_nearest():
    x = torch.linspace(-20, 20, 1 << 14)
    y = torch.empty(len(x), dtype=torch.bfloat16)

    @njit(error_model="numpy")
    def run(x, y):
        for i in range(0, len(x), LANES):
            some = load(x, i)
            store(y, i, some * sigmoid(some))

    run(x.numpy(), y.view(torch.uint16).numpy())
    expected = (x.double() * x.double().sigmoid()).bfloat16()
    assert (y != expected).float().mean() < 1e-3  # ties that float32 decides
