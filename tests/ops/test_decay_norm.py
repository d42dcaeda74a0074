"""Timestep decay normalisation, portable and native, against the definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm.ops import reference
from megalodon_lm.ops.backend import set_backend
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.cpu import decay_norm as native
from megalodon_lm.ops.decay_norm import MEAN_DECAY, VAR_DECAY, decay_norm
from megalodon_lm.ops.timestep_norm import NormState

from .cases import BOUNDARIES, assert_close, boundaries, gradients

B, D, G = 3, 12, 3
COUNT = torch.tensor([5, 0, 100])
TYPES = [torch.float64, torch.float32]  # portable, and native


def case(length, dtype=torch.float64, dim=D, batch=B):
    """x, weight, bias, and averages at the entry, as large as those of COUNT tokens."""
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((batch, length, dim), (dim,), (dim,)))
    mean = torch.randn(batch, G, generator=g, dtype=torch.float64) * 1e-2
    var = torch.rand(batch, G, generator=g, dtype=torch.float64) * 1e-2 + 1e-4
    wide = torch.promote_types(dtype, torch.float32)
    return [x.to(dtype), w.to(wide), b.to(wide), mean, var]


def run(op, where=None, count=COUNT, **options):
    def call(x, w, b, mean, var):
        y, state = op(x, w, b, G, 1e-5, NormState(count, mean, var), where, **options)
        call.count = state.count
        return y, state.mean, state.var

    return call


def held_to_the_definition(inputs, where, tolerance, to_gradients):
    fast, slow = run(decay_norm, where), run(reference.decay_norm, where)
    assert (decay_norm.implementation(*inputs[:3], G) is native.decay_norm) == (inputs[0].dtype != torch.float64)
    actual, expected = gradients(fast, inputs), gradients(slow, [t.double() for t in inputs])
    assert_close(actual[0], expected[0], tolerance)
    assert_close(actual[1], expected[1], to_gradients)
    assert torch.equal(fast.count, slow.count)
    assert fast.count.dtype == torch.int64
    return actual[0][0]


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize("length", [1, 7, 64, 150])
def test_portable_equals_reference_with_all_gradients(kind, length):
    held_to_the_definition(case(length), boundaries(kind, B, length), 1e-11, 1e-10)


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize(("length", "dim"), [(1, 12), (7, 48), (64, 12), (150, 48)])
def test_native_equals_reference_with_all_gradients(kind, length, dim):
    held_to_the_definition(case(length, torch.float32, dim), boundaries(kind, B, length), 1e-5, 1e-4)


def test_bf16_in_and_out_lose_no_more_than_their_rounding():
    y = held_to_the_definition(case(150, torch.bfloat16, 48), boundaries("both", B, 150), 5e-3, 1e-2)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("natively", [False, True])
def test_large_means_wear_nothing_down(natively):
    """Mean 1000, std 1, where float32 itself has steps of 6e-5."""
    x = (1000 + case(300)[0]).float()
    op = native.decay_norm if natively else decay_norm.portable
    y, state = op(x, torch.zeros(D), torch.zeros(D), G)
    expected, exact = reference.decay_norm(x.double(), torch.zeros(D).double(), torch.zeros(D).double(), G)
    assert (y - expected).abs().max() < 1e-3
    assert_close([state.mean, state.var], [exact.mean, exact.var], 1e-6)


@given(st.data())
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("dtype", TYPES)
def test_any_cut_gives_the_same(dtype, data):
    """Outputs, exit state and all gradients."""
    length = data.draw(st.integers(2, 40))
    cut = data.draw(st.integers(1, length - 1))
    where = boundaries(data.draw(st.sampled_from(["none", "documents"])), B, length, data.draw(st.integers(0, 99)))
    parts = [None, None] if where is None else [Boundaries(s) for s in where.starts.split([cut, length - cut], 1)]

    def pieces(x, w, b, mean, var):
        first, state = decay_norm(x[:, :cut], w, b, G, 1e-5, NormState(COUNT, mean, var), parts[0])
        second, state = decay_norm(x[:, cut:], w, b, G, 1e-5, state, parts[1])
        pieces.count = state.count
        return torch.cat([first, second], 1), state.mean, state.var

    whole, inputs = run(decay_norm, where), case(length, dtype)
    actual, expected = gradients(pieces, inputs), gradients(whole, inputs)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert_close(actual[0], expected[0], tolerance)
    assert_close(actual[1], expected[1], 10 * tolerance)
    assert torch.equal(pieces.count, whole.count)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=5), st.integers(0, 20))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("dtype", TYPES)
def test_packed_and_padded_equals_separate(dtype, sizes, padding):
    """The first document goes on from the entry; the state is that of the last one."""
    length = sum(sizes)
    x, w, b, mean, var = case(length + padding, dtype, batch=1)
    starts = torch.zeros(1, length + padding, dtype=torch.bool)
    starts[0, torch.tensor(sizes).cumsum(0)[:-1]] = True
    entry = NormState(torch.tensor([7]), mean, var)
    y, state = decay_norm(x, w, b, G, 1e-5, entry, Boundaries(starts, torch.tensor([length])))
    alone = [
        decay_norm(document, w, b, G, 1e-5, None if i else entry)
        for i, document in enumerate(x[:, :length].split(sizes, 1))
    ]
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert_close([y[:, :length]], [torch.cat([y for y, _ in alone], 1)], tolerance)
    assert not y[:, length:].any()
    assert_close(state[1:], alone[-1][1][1:], tolerance)
    assert torch.equal(state.count, alone[-1][1].count)


@pytest.mark.parametrize("dtype", TYPES)
def test_nothing_leaks(dtype):
    """No gradient at all reaches earlier documents, the entry state, later tokens or padding."""
    x, w, b, mean, var = (t.requires_grad_() for t in case(20, dtype))
    starts = torch.zeros(B, 20, dtype=torch.bool)
    starts[:, 8] = True
    where = Boundaries(starts, torch.tensor([20, 15, 15]))
    y, state = decay_norm(x, w, b, G, 1e-5, NormState(COUNT, mean, var), where)
    to_x, to_mean, to_var = torch.autograd.grad(y[:, 9:12].sin().sum(), (x, mean, var), retain_graph=True)
    assert to_x[:, 8:12].count_nonzero() == B * 4 * D
    assert not to_x[:, :8].any()
    assert not to_x[:, 12:].any()
    assert not to_mean.any()
    assert not to_var.any()
    (to_x,) = torch.autograd.grad(y.sum() + state.mean.sum() + state.var.sum(), x)
    assert not to_x[1:, 15:].any()


@pytest.mark.parametrize("dtype", TYPES)
def test_single_tokens_one_after_another(dtype):
    x, w, b, mean, var = case(30, dtype)
    state = NormState(COUNT, mean, var)
    expected, leaving = reference.decay_norm(x.double(), w.double(), b.double(), G, 1e-5, state)
    for t in range(30):
        y, state = decay_norm(x[:, t : t + 1], w, b, G, 1e-5, state)
        assert_close([y[:, 0]], [expected[:, t]], 1e-6)
    assert_close(state[1:], leaving[1:], 1e-6)
    assert torch.equal(state.count, leaving.count)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [1, 10, 1000, 100_000, 10_000_000, 1 << 60])
def test_divides_by_the_sum_of_weights_however_many_tokens_there_were(dtype, count):
    """Of tokens that are all alike, mean and variance are those of any one of them after any number."""
    x = torch.tensor([3.0, 5.0], dtype=dtype).repeat(1, 100, 2)  # mean 4, variance 1
    sums = [1 - decay ** torch.tensor(count, dtype=torch.float64) for decay in (MEAN_DECAY, VAR_DECAY)]
    state = NormState(torch.tensor([count]), 4 * sums[0].expand(1, 2), sums[1].expand(1, 2))
    zero = torch.zeros(4, dtype=dtype)
    y, leaving = decay_norm(x, zero, zero, 2, 0.0, state)
    torch.testing.assert_close(y, x - 4, rtol=1e-5, atol=1e-5)
    assert leaving.count.item() == count + 100


def test_does_not_drift_over_ten_million_tokens():
    """Mean 1000, std 1, in pieces of 100,000, against sums with the weights written out over the last 600,000."""
    generator = torch.Generator().manual_seed(0)
    weight = bias = torch.zeros(4)
    state, last = None, []
    for _ in range(100):
        x = 1000 + torch.randn(1, 100_000, 4, generator=generator)
        y, state = decay_norm(x, weight, bias, 2, state=state)
        last = [*last[-5:], x.double().view(-1, 2, 2)]
    tokens = torch.cat(last)
    ages = torch.arange(len(tokens)).flip(0)[:, None].double()
    mean = ((1 - MEAN_DECAY) * MEAN_DECAY**ages * tokens.mean(-1)).sum(0)
    var = ((1 - VAR_DECAY) * VAR_DECAY**ages * tokens.var(-1, unbiased=False)).sum(0)
    assert state.count.item() == 10_000_000
    assert (state.mean[0] - mean).abs().max() < 1e-4
    assert (state.var[0] - var).abs().max() < 1e-6
    expected = (tokens[-1] - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
    assert (y[0, -1].double() - expected.flatten()).abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore")  # inside torch.compile
@pytest.mark.parametrize("backend", ["auto", "portable"])
def test_compiles_to_one_graph(backend):
    set_backend(backend)
    where, inputs = boundaries("both", B, 70), case(70, torch.float32)

    def outputs(x, w, b, mean, var):
        y, state = decay_norm(x, w, b, G, 1e-5, NormState(COUNT, mean, var), where)
        return y, state.mean, state.var, state.count.double()

    try:
        torch.compiler.reset()
        compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
        actual, expected = gradients(compiled, inputs), gradients(outputs, inputs)
    finally:
        set_backend("auto")
        torch.compiler.reset()
    assert_close(actual[0], expected[0], 1e-6)
    assert_close(actual[1], expected[1], 1e-5)
