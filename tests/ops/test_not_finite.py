"""NaN and infinity reach what depends on them and nothing else: where the definition is finite, and only there."""

import importlib
import pkgutil

import pytest
import torch
import torch.nn.functional as F

import megalodon_lm.ops
from megalodon_lm.ops import bidirectional_definitions, recurrence_definitions, reference
from megalodon_lm.ops.adaptive_memory import MemoryState
from megalodon_lm.ops.backend import OPS
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.cema import cema_coefficients
from megalodon_lm.ops.chunk_attention import KeyValueCache
from megalodon_lm.ops.cpu import adaptive_memory, causal_attention
from megalodon_lm.ops.cpu import finite as cpu_finite
from megalodon_lm.ops.finite import is_finite
from megalodon_lm.ops.local_attention import LocalCache
from megalodon_lm.ops.sliding_attention import SlidingCache
from megalodon_lm.ops.timestep_norm import NormState

from .cases import boundaries
from .test_elementwise import (
    gate_definition,
    head_definition,
    layer_definition,
    rms_definition,
    silu_definition,
    sum_definition,
)

for file in pkgutil.iter_modules(megalodon_lm.ops.__path__, "megalodon_lm.ops."):
    importlib.import_module(file.name)

B, L, D, N, G, H, C = 2, 18, 32, 2, 2, 2, 8
FILL = torch.tensor([3, 7])
# The NaN that NVIDIA's processors make: a carry out of its fraction would turn it into a number.
FULL_NAN = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
NOT_FINITE = [FULL_NAN, torch.inf, torch.nan, -torch.inf]


def draw(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g) for s in shapes]


def cema_inputs():
    parameters = draw((D, N, 1), (D, N, 1), (D, 1, 1), (D, N, 2))
    return [*draw((B, L, D)), *cema_coefficients(*parameters), *draw((D,), (B, D, N, 2))]


def run_cema(op):
    def run(where, *inputs):
        y, h = op(*inputs, where)
        return y, torch.view_as_complex(h)

    return run


def run_norm(op):
    def run(where, x, weight, bias, mean, var):
        var = torch.where(torch.isinf(var), torch.nan, var)  # finite features have a finite one
        y, state = op(x, weight, bias, G, 1e-5, NormState(torch.tensor([5, 100]), mean.double(), var.double()), where)
        return y, state.mean, state.var

    return run


def run_attention(op):
    def run(where, q, k, v, keys, values):
        used = (torch.arange(C) < FILL[:, None])[..., None, None]
        cache = KeyValueCache(torch.where(used, keys, 0), torch.where(used, values, 0), FILL)
        out, leaving = op(q, k, v, C, 1e4, cache, where)
        return out, leaving.keys, leaving.values

    return run


def run_sliding(op):
    def run(where, q, k, v, keys, values):
        position = torch.tensor([3, 23])
        fill = torch.tensor([3, 15])
        used = (torch.arange(2 * C) < fill[:, None])[..., None, None]
        cache = SlidingCache(torch.where(used, keys, 0), torch.where(used, values, 0), fill, position)
        out, leaving = op(q, k, v, C, 1e4, cache, where)
        return out, leaving.keys, leaving.values

    return run


def run_local(op):
    def run(where, q, k, v, keys, values):
        position = torch.tensor([3, 23])
        fill = torch.tensor([3, C - 1])
        used = (torch.arange(C) < fill[:, None])[..., None, None]
        cache = LocalCache(torch.where(used, keys, 0), torch.where(used, values, 0), fill, position)
        out, leaving = op(q, k, v, C, 1e4, cache, where)
        return out, leaving.keys, leaving.values

    return run


def run_memory(op):
    def run(where, q, k, v, keys, values, memory, log_sum):
        used = (torch.arange(C) < FILL[:, None])[..., None, None]
        memory = memory.to(torch.promote_types(memory.dtype, torch.float32))
        state = MemoryState(torch.where(used, keys, 0), FILL, memory, log_sum, torch.tensor([3, 2]))
        cache = KeyValueCache(keys, torch.where(used, values, 0), FILL)
        out, leaving = op(q, k, v, C, 2, state, cache, where)
        return out, leaving.keys, leaving.memory, leaving.log_sum

    return run


def run_plain(op):
    return lambda where, *inputs: op(*inputs, where)


def run_delta_rule(op):
    def run(where, r, log_w, *rest):
        return op(r, -log_w.abs(), *rest, where)

    return run


def run_scan(op):
    def run(where, x, dt, a, *rest):
        return op(x, dt.abs(), -a.abs(), *rest, where)

    return run


def run_gated_delta(op):
    def run(where, q, k, v, log_decay, beta, state):
        return op(q, F.normalize(k, dim=-1), v, -log_decay.abs(), beta.sigmoid(), state, where)

    return run


def run_duality(op):
    def run(where, x, b, c, log_decay, step, *rest):
        return op(x, b, c, -log_decay.abs(), step.abs(), *rest, where)

    return run


def run_convolution(op):
    def run(where, x, weight, bias, state):
        # all taps of a channel: whether one counts that nothing comes before is not said
        weight = torch.where(torch.isfinite(weight).all(1, keepdim=True), weight, torch.nan)
        return op(x, weight, bias, state, where)

    return run


HEADS = [(B, L, H, 16), (B, L, H, 16), (B, L, H, 32), (B, C, H, 16), (B, C, H, 32)]
NORM = [*draw((B, L, D), (D,), (D,), (B, G)), draw((B, G))[0].square() + 0.1]
OPS_WITH_STATE = {
    "cema": (run_cema, cema_inputs()),
    "timestep_norm": (run_norm, NORM),
    "decay_norm": (run_norm, NORM),
    "chunk_attention": (run_attention, draw(*HEADS)),
    "sliding_attention": (run_sliding, draw(*HEADS[:3], (B, 2 * C, H, 16), (B, 2 * C, H, 32))),
    "local_attention": (run_local, draw(*HEADS)),
    "adaptive_memory": (run_memory, draw(*HEADS, (B, 2, H, 16, 32), (B, H, 16))),
    "token_shift": (run_plain, draw((B, L, D), (N, D), (B, D))),
    "generalized_delta_rule": (run_delta_rule, draw(*HEADS[:2], *HEADS[1:3], *HEADS[:2], (B, H, 16, 32))),
    "selective_scan": (run_scan, draw((B, L, D), (B, L, D), (D, N), (B, L, N), (B, L, N), (D,), (B, D, N))),
    "gated_delta_rule": (run_gated_delta, draw(*HEADS[:3], (B, L, H), (B, L, H), (B, H, 16, 32))),
    "state_space_duality": (
        run_duality, draw(HEADS[2], *HEADS[:2], (B, L, H), (B, L, H), (H,), (B, H, 16, 32)),
    ),
    "short_convolution": (run_convolution, draw((B, L, D), (D, 4), (D,), (B, 3, D))),
}  # fmt: skip
OF_PRODUCTS = ("gated_delta_rule", "state_space_duality")  # portable alone
PARTLY_NATIVE = {"short_convolution": "shifted_products"}
TOKEN_OPS = {
    "rms_norm": (rms_definition, (1e-5,), draw((B, L, D), (D,))),
    "layer_norm": (layer_definition, (1e-5,), draw((B, L, D), (D,), (D,))),
    "head_rms_norm": (head_definition, (1e-5,), draw(HEADS[0], (H, 16), (H, 16))),
    "silu": (silu_definition, (), draw((B, L, D))),
    "silu_gate": (gate_definition, (), draw((B, L, D), (B, L, D))),
    "add_branch": (sum_definition, (), draw((B, L, D), (B, L, D), (B, L, D))),
}


BIDIRECTIONAL = {
    "sequence_norm": ((G, 1e-5), draw((B, L, D), (D,), (D,))),
    "bidirectional_attention": ((C, 1e4, "softmax"), draw(*HEADS[:3])),
}
LINEAR = {"linear", "linears", "linear_silu", "linear_gate", "linear_add"}
# test_bidirectional.py, test_laplace.py, test_linear.py, test_block.py
ELSEWHERE = {"zero_padding", "reverse", "laplace", *LINEAR, "read_block"}
DEFINITIONS = (reference, recurrence_definitions, bidirectional_definitions)


def definition(name):
    return next(getattr(module, name) for module in DEFINITIONS if hasattr(module, name))


def native(op):
    """The op, made sure that it runs natively."""

    def run(*args):
        assert op.implementation(*args) is not op.portable
        return op(*args)

    return run


def test_every_op_of_the_table_is_held_to_it():
    assert (
        set(OPS) - set(PARTLY_NATIVE.values()) - ELSEWHERE
        == OPS_WITH_STATE.keys() | TOKEN_OPS.keys() | BIDIRECTIONAL.keys()
    )


def in_type(t, dtype):
    if t.is_complex():
        return t.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return t.to(dtype)


def spoilt(inputs, seed):
    """Copies of the inputs, in one of them one element that is not finite."""
    g = torch.Generator().manual_seed(seed)
    inputs = [t.clone() for t in inputs]
    which = inputs[seed % len(inputs)]
    flat = (torch.view_as_real(which) if which.is_complex() else which).view(-1)
    flat[int(torch.randint(len(flat), (), generator=g))] = NOT_FINITE[seed // len(inputs) % 4]
    return inputs


def compare(fast, slow, inputs, dtype, all_of_a_type):
    wide = torch.promote_types(dtype, torch.float32)
    for seed in range(2 * len(inputs)):
        given = spoilt(inputs, seed)
        given = [in_type(t, dtype if i == 0 or all_of_a_type else wide) for i, t in enumerate(given)]
        with torch.no_grad():
            found, expected = fast(*given), slow(*(in_type(t, torch.float64) for t in given))
        for i, (a, e) in enumerate(zip(found, expected, strict=True)):
            wrong = torch.isfinite(a) != torch.isfinite(e)
            assert not wrong.any(), (seed, i, wrong.nonzero()[:5], a[wrong][:5], e[wrong][:5])


@pytest.mark.parametrize("kind", ["none", "both"])
@pytest.mark.parametrize("name", OPS_WITH_STATE)
def test_portable(name, kind):
    run, inputs = OPS_WITH_STATE[name]
    where, fast, slow = boundaries(kind, B, L), OPS[name].portable, definition(name)
    compare(lambda *a: run(fast)(where, *a), lambda *a: run(slow)(where, *a), inputs, torch.float64, True)


@pytest.mark.parametrize("kind", ["none", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in OPS_WITH_STATE if name not in OF_PRODUCTS])
def test_native(name, kind, dtype, monkeypatch):
    monkeypatch.setattr(causal_attention, "FEW_QUERIES", 4)
    monkeypatch.setattr(adaptive_memory, "FEWEST_PRODUCTS", 0)
    run, inputs = OPS_WITH_STATE[name]
    fast = OPS[name] if name in PARTLY_NATIVE else native(OPS[name])
    where, slow = boundaries(kind, B, L), definition(name)
    of_one_type = name.endswith(("attention", "memory"))
    compare(lambda *a: run(fast)(where, *a), lambda *a: run(slow)(where, *a), inputs, dtype, of_one_type)


@pytest.mark.parametrize("lengths", [None, torch.tensor([L, 11])])
@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_ops_of_whole_sequences(name, lengths):
    rest, inputs = BIDIRECTIONAL[name]
    where, fast, slow = None if lengths is None else Boundaries(None, lengths), OPS[name].portable, definition(name)
    compare(lambda *a: [fast(*a, *rest, where)], lambda *a: [slow(*a, *rest, where)], inputs, torch.float64, True)


@pytest.mark.parametrize("lengths", [None, torch.tensor([L, 11])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequence_norm_natively(dtype, lengths):
    where = None if lengths is None else Boundaries(None, lengths)
    fast, slow = native(OPS["sequence_norm"]), definition("sequence_norm")
    rest, inputs = (D, 1e-5, where), draw((B, L, D), (D,), (D,))
    compare(lambda *a: [fast(*a, *rest)], lambda *a: [slow(*a, *rest)], inputs, dtype, False)


@pytest.mark.parametrize("natively", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TOKEN_OPS)
def test_ops_of_single_tokens(name, dtype, natively):
    definition, rest, inputs = TOKEN_OPS[name]
    fast = native(OPS[name]) if natively else OPS[name].portable
    compare(lambda *a: [fast(*a, *rest)], lambda *a: definition(*a), inputs, dtype, True)


@pytest.mark.parametrize("look", [is_finite, cpu_finite.is_finite])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (2, 16)])  # rows of whole words of eight bytes, and others
def test_the_last_token_of_each_run_is_looked_at(look, dtype, shape):
    since = torch.tensor([[3, 4, 0, 1, 2, -1], [1, 1, 1, 2, 3, 4]])
    ends = torch.tensor([[False, True, False, False, True, False], [True, True, False, False, False, True]])
    plain = torch.full((2, 6, *shape), torch.finfo(dtype).max / 64, dtype=dtype) * (-1) ** torch.arange(shape[-1])
    plain = plain.to(dtype)
    assert look(plain, since)
    for value in NOT_FINITE:
        for place in (0, plain[0, 0].numel() - 1):
            for row in range(2):
                for token in range(6):
                    out = plain.clone()
                    out[row, token].view(-1)[place] = value
                    assert look(out, since) != ends[row, token], (value, place, row, token)


@pytest.mark.parametrize("shape", [(0, 6, 2, 2), (2, 0, 2, 2)])
def test_nothing_is_finite(shape):
    assert cpu_finite.is_finite(torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.int64))
