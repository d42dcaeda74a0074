"""Muon against its definition, and AdamW beside it."""

import pytest
import torch

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.training import muon
from megalodon_lm.training.muon import Muon, orthogonalized
from megalodon_lm.training.optimizer import build_optimizer
from megalodon_lm.training.recipe import TrainingRecipe


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (1, 8), (8, 1)])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 0.275), (torch.bfloat16, 0.35)])
def test_orthogonalised_is_the_direction_of_the_singular_vectors(shape, dtype, within):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag(s.clamp(min=s.max() / 10)) @ v
    found = orthogonalized(matrix.float()[None], dtype)[0]
    assert found.dtype == torch.float32
    assert torch.linalg.matrix_norm(found.double() - u @ v, 2) < within


def test_zeros_stay_zeros():
    assert torch.equal(orthogonalized(torch.zeros(1, 4, 6), torch.float32), torch.zeros(1, 4, 6))


def test_matrices_of_one_shape_move_together_as_each_alone(monkeypatch):
    shapes = [(6, 4), (4, 6), (6, 4), (6, 4), (8, 8), (6, 4)]
    monkeypatch.setattr(muon, "TOGETHER", 3 * 24)
    counts, found = [], []
    together = muon.orthogonalized
    monkeypatch.setattr(muon, "orthogonalized", lambda x, dtype: counts.append(len(x)) or together(x, dtype))
    for groups in ([shapes], [[shape] for shape in shapes]):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizers = []
        for start in range(0, len(shapes), len(groups[0])):
            part = weights[start : start + len(groups[0])]
            group = {"params": part, "matrices": True, "momentum": 0.9, "lr": 0.1, "weight_decay": 0.5}
            optimizers.append(Muon([group], torch.float32))
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            for optimizer in optimizers:
                optimizer.step()
        found.append(weights)
    assert counts == [3, 1, 1, 1] * 3 + [1] * 6 * 3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_steps_follow_the_definition():
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(12, 6))
    expected, momentum = weight.detach().double().clone(), torch.zeros(12, 6, dtype=torch.float64)
    group = {"params": [weight], "matrices": True, "momentum": 0.9, "lr": 0.1, "weight_decay": 0.5}
    optimizer = Muon([group], torch.float32)
    for _ in range(4):
        gradient = torch.randn(12, 6)
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        u, _, v = torch.linalg.svd(0.1 * gradient.double() + 0.9 * momentum, full_matrices=False)
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 2**0.5 * (u @ v)
    # each step may be off by 0.27 of its size in every direction
    assert torch.linalg.matrix_norm(weight.double() - expected, 2) < 4 * 0.28 * 0.1 * 2**0.5


def test_everything_but_the_matrices_of_blocks_moves_as_with_adamw():
    recipe = TrainingRecipe(learning_rate=1e-2)
    models = []
    for kind in ("adamw", "muon"):
        torch.manual_seed(2)
        model = Megalodon(ModelConfig.named("tiny"))
        recipe.optimizer = kind
        optimizer = build_optimizer(model, recipe, "float32")
        for _ in range(3):
            for number, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        models.append(dict(model.named_parameters()))
    linear = ("wv", "wz", "wr", "wh1", "wh2", "fc1", "fc2", "fc3")
    for name, with_adamw in models[0].items():
        by_muon = name.endswith(".weight") and name.split(".")[-2] in linear
        assert torch.equal(with_adamw, models[1][name]) != by_muon, name
