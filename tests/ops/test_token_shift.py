import pytest
import torch

from megalodon_lm.ops import recurrence_definitions
from megalodon_lm.ops.cpu import token_shift as cpu
from megalodon_lm.ops.token_shift import token_shift

from .cases import BOUNDARIES, assert_close, boundaries, gradients

B, N, D = 3, 2, 32


def native(*inputs):
    """The op, made sure that it runs natively."""
    assert token_shift.implementation(*inputs) is not token_shift.portable
    return token_shift(*inputs)


def case(length):
    """x, mix, and the token before."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in [(B, length, D), (N, D), (B, D)]]


@pytest.mark.parametrize("entry", [False, True])
@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("kind", BOUNDARIES)
def test_equals_definition_with_all_gradients(kind, length, entry):
    where = boundaries(kind, B, length)
    given = case(length) if entry else case(length)[:2]
    rest = (where,) if entry else (None, where)
    expected = gradients(lambda *a: recurrence_definitions.token_shift(*a, *rest), given)
    for op, dtype, tolerance in (
        (token_shift.portable, torch.float64, 1e-12),
        (native, torch.float32, 1e-6),
        (native, torch.bfloat16, 2e-2),
    ):
        found = gradients(lambda *a: op(*a, *rest), [t.to(dtype) for t in given])  # noqa: B023
        assert_close(found[0] + found[1], expected[0] + expected[1], tolerance)


def test_rounds_once_in_bf16():
    x, mix, entry = case(20)
    given = x.bfloat16(), mix.float(), entry.bfloat16()
    found, expected = native(*given), token_shift.portable(*given)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert_close(found, expected, 5e-3)


@pytest.mark.slow
def test_operator_is_well_formed():
    given = [t.float().requires_grad_() for t in case(20)]
    where = boundaries("both", B, 20)
    for rest in ((None, None), (where.starts, where.lengths)):
        torch.library.opcheck(cpu.token_shift_forward, (*given, *rest))
