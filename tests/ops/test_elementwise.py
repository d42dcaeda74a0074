"""Norms, gates and rotary positions: portable and native against float64."""

import pytest
import torch

from megalodon_lm.ops import gates, norms, reference, residual, rotary
from megalodon_lm.ops.cpu import gates as native_gates
from megalodon_lm.ops.cpu import norms as native_norms
from megalodon_lm.ops.cpu import residual as native_residual
from megalodon_lm.ops.cpu import rotary as native_rope
from megalodon_lm.ops.cpu.timestep_norm import timestep_norm as native_timestep_norm
from megalodon_lm.ops.timestep_norm import timestep_norm

from .cases import assert_close, gradients


def draw(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


def rms_definition(x, w):
    return [x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (w + 1)]


def layer_definition(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    return [centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * (w + 1) + b]


def head_definition(z, scale, shift):
    return [z / torch.sqrt(z.square().mean(-1, keepdim=True) + 1e-5) * scale + shift]


def gate_definition(gate, x):
    return [gate / (1 + torch.exp(-gate)) * x]


def silu_definition(x):
    return [x / (1 + torch.exp(-x))]


def sum_definition(x, branch, other):
    return [x + branch + other]


def rope_definition(x):
    rows = [[reference.rope(x[b, t], 3 * b + t, 1e4) for t in range(x.shape[1])] for b in range(len(x))]
    return [torch.stack([torch.stack(r) for r in rows])]


def turned(x, slots):
    return rotary.rope(x, rotary.slot_turns(x, slots, 1e4, 80))


SLOTS = torch.arange(70) + 3 * torch.arange(2)[:, None]
CASES = {
    "rms": (rms_definition, draw((2, 70, 32), (32,))),
    "layer": (layer_definition, draw((2, 70, 32), (32,), (32,))),
    "head": (head_definition, draw((2, 70, 3, 32), (3, 32), (3, 32))),
    "gate": (gate_definition, [10 * t for t in draw((3, 16), (3, 16))]),
    "silu": (silu_definition, [10 * t for t in draw((3, 16))]),
    "sum": (sum_definition, draw((3, 70, 16), (3, 70, 16), (3, 70, 16))),
    "rope": (rope_definition, draw((2, 70, 2, 16))),
}


def implementation(name, native):
    modules = {**dict.fromkeys(("rms", "layer", "head"), (norms, native_norms)),
               **dict.fromkeys(("gate", "silu"), (gates, native_gates)),
               "sum": (residual, native_residual), "rope": (rotary, native_rope)}  # fmt: skip
    m = modules[name][native]

    def of(op):
        return op if native else op.portable

    return {
        "rms": lambda x, w: [of(m.rms_norm)(x, w, 1e-5)],
        "layer": lambda x, w, b: [of(m.layer_norm)(x, w, b, 1e-5)],
        "head": lambda z, scale, shift: [of(m.head_rms_norm)(z, scale, shift, 1e-5)],
        "gate": lambda a, x: [of(m.silu_gate)(a, x)],
        "silu": lambda x: [of(m.silu)(x)],
        "sum": lambda x, a, b: [of(m.add_branch)(x, a, b)],
        "rope": lambda x: [m.rotate(x, SLOTS, 1e4, 80) if native else turned(x, SLOTS)],
    }[name]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("native", "dtype", "tolerance"),
    [
        (False, torch.float64, 1e-12),
        (False, torch.float32, 2e-5),
        (True, torch.float32, 2e-5),
        (False, torch.bfloat16, 2e-2),
        (True, torch.bfloat16, 2e-2),
    ],
)
def test_equals_definition_with_all_gradients(name, native, dtype, tolerance):
    definition, inputs = CASES[name]
    inputs = [t.to(dtype) for t in inputs]
    actual = gradients(implementation(name, native), inputs)
    expected = gradients(definition, [t.double() for t in inputs])
    assert_close(actual[0], expected[0], tolerance)
    assert_close(actual[1], expected[1], tolerance)


@pytest.mark.parametrize("native", [False, True])
def test_a_small_offset_stored_in_bf16_has_its_effect(native):
    """1 + 0.003 in bf16 would be 1."""
    x = draw((2, 70, 32))[0]
    offset = torch.full((32,), 0.003, dtype=torch.bfloat16)
    found = [
        *implementation("rms", native)(x.float(), offset),
        *implementation("layer", native)(x.float(), offset, offset),
        (native_timestep_norm if native else timestep_norm.portable)(x.float(), offset, offset, 2)[0],
    ]
    exact = offset.double()
    expected = [*rms_definition(x, exact), *layer_definition(x, exact, exact)]
    expected.append(reference.timestep_norm(x, exact, exact, 2)[0])
    assert_close(found, expected, 1e-5)


def test_gradcheck():
    for name, (_, inputs) in CASES.items():
        small = [t[:1, :3] if t.dim() > 2 else t for t in inputs]
        if name != "rope":
            run = implementation(name, False)
            assert torch.autograd.gradcheck(lambda *a: run(*a)[0], [t.clone().requires_grad_() for t in small])  # noqa: B023
    assert torch.autograd.gradcheck(lambda x: turned(x, SLOTS[:1, :3]), draw((1, 3, 2, 16))[0].requires_grad_())


def test_head_rms_norm_equals_reference():
    z = draw((2, 5, 24))[0]
    heads = z.unflatten(-1, (3, -1))
    actual = norms.head_rms_norm(heads, torch.ones(3, 8), torch.zeros(3, 8), 1e-5).flatten(-2)
    torch.testing.assert_close(actual, reference.head_rms_norm(z, 3), rtol=1e-12, atol=1e-12)


def test_gate_saturates_without_overflow():
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4, 1.0] * 2)
    for found in (native_gates.silu_gate(gate, torch.ones(16)), native_gates.silu(gate)):
        assert_close([found], [torch.nn.functional.silu(gate)], 1e-6)


@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.bfloat16,) * 2, (torch.float32,) * 2])
@pytest.mark.parametrize("number", [1, 2])
def test_branches_are_added_to_the_last_bit_as_tensors_are(number, types):
    x, *branches = draw(*[(7, 33, 16)] * (1 + number))
    x, branches = x.to(types[0]), [t.to(types[1]) for t in branches]
    branches[0][3, 5, 1], x[2, 2, 2] = torch.nan, torch.inf
    assert residual.add_branch.implementation(x, *branches) is native_residual.add_branch
    found = gradients(lambda *a: [residual.add_branch(*a)], [x, *branches])
    expected = gradients(lambda *a: [residual.add_branch.portable(*a)], [x, *branches])
    for a, e in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


def test_operators_are_well_formed():
    x, w, b = (t.float().requires_grad_() for t in draw((2, 5, 32), (32,), (32,)))
    torch.library.opcheck(native_norms.norm_forward, (x, w, b, True, 1e-5, torch.float32))
    torch.library.opcheck(native_gates.silu_forward, (x,))
    torch.library.opcheck(native_gates.silu_gate_forward, (x, x.detach().clone().requires_grad_()))
    torch.library.opcheck(native_residual.add_branch_forward, (x, x.detach().bfloat16(), x.detach().bfloat16()))
