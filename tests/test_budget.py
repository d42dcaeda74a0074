"""The size that a budget is spent on."""

from megalodon_lm import ModelConfig
from megalodon_lm.training.budget import BYTE_MODELS, byte_model


def test_more_operations_never_choose_a_smaller_model():
    sizes = [ModelConfig.named(byte_model(10 ** (power / 8))).num_parameters for power in range(80, 160)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(BYTE_MODELS)


def test_no_operations_still_choose_one():
    assert byte_model(0.0) == BYTE_MODELS[0][1]
