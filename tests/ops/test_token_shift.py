import pytest
import torch

from megalodon_lm.ops import recurrence_definitions
from megalodon_lm.ops.token_shift import token_shift

from .cases import BOUNDARIES, assert_close, boundaries, gradients


@pytest.mark.parametrize("entry", [False, True])
@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("kind", BOUNDARIES)
def test_equals_definition_with_all_gradients(kind, length, entry):
    g = torch.Generator().manual_seed(0)
    where = boundaries(kind, 3, length)
    inputs = [torch.randn(s, generator=g, dtype=torch.float64) for s in [(3, length, 8), (2, 8), (3, 8)]]
    given = inputs if entry else inputs[:2]
    rest = (where,) if entry else (None, where)
    found = gradients(lambda *a: token_shift(*a, *rest), given)
    expected = gradients(lambda *a: recurrence_definitions.token_shift(*a, *rest), given)
    assert_close(found[0] + found[1], expected[0] + expected[1], 1e-12)
