"""Building a model, drawing its weights, and cutting it by heads are three things."""

import copy

import pytest
import torch

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.errors import InputError

from .test_cut_invariant import build


@pytest.mark.parametrize("changes", [{}, {"share_emb": True, "rescale_nffn": True, "init_mode": "xavier"}])
def test_a_seed_means_one_model_however_it_is_built(changes):
    config = ModelConfig.named("tiny", **changes)
    torch.manual_seed(5)
    direct = Megalodon(config)
    with torch.device("meta"):
        later = Megalodon(config)
    assert all(p.is_meta for p in later.parameters())
    later.to_empty(device="cpu")
    for parameter in later.parameters():
        parameter.data.fill_(float("nan"))
    for model in (later, direct):  # drawn anew too
        torch.manual_seed(5)
        model.init_weights()
    torch.manual_seed(5)
    for built in (later, direct):
        for (name, p), q in zip(Megalodon(config).named_parameters(), built.parameters(), strict=True):
            assert torch.equal(p, q), name
        torch.manual_seed(5)
    assert (later.output.output.weight is later.embed.weight) == config.share_emb
    assert later.fingerprint() == direct.fingerprint()


def test_building_alone_draws_nothing():
    before = torch.random.get_rng_state()
    with torch.device("meta"):
        Megalodon(ModelConfig.named("tiny"))
    assert torch.equal(torch.random.get_rng_state(), before)
    Megalodon(ModelConfig.named("tiny"))  # which draws
    assert not torch.equal(torch.random.get_rng_state(), before)


ROWS = ("wz.weight", "wz.bias", "wv.weight", "wv.bias", "wr.weight", "wr.bias", "fc1.weight", "fc3.weight")
COLUMNS = ("gamma", "beta", "wh2.weight", "fc2.weight")


def shard(layer, index, count, names=ROWS + COLUMNS):
    """Part `index` of `count` of a layer's heads or hidden features; wh1, which all hold, is left to the first."""
    part = copy.deepcopy(layer)
    for name, parameter in part.named_parameters():
        if name in names:
            parameter.data = parameter.data.chunk(count, dim=0 if name in ROWS else 1)[index].clone()
        elif name.startswith("wh1") and index:
            parameter.data.zero_()
    return part


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["portable", "native"])
def test_parts_of_a_layer_by_heads_add_up_to_the_whole(dtype):
    """A tensor-parallel rank holds the rows of some heads, and what the ranks add to the residual is summed."""
    block = build(dtype, num_heads=4, value_dim=64).layers[0]
    x, residual = torch.randn(2, 2, 30, 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, state = block.mega(x)
        parts = [shard(block.mega, i, 2)(x) for i in range(2)]
        torch.testing.assert_close(sum(y - x for y, _ in parts), whole - x)
        for name in ("keys", "values"):
            joined = torch.cat([getattr(part["attention"], name) for _, part in parts], 2)
            torch.testing.assert_close(joined, getattr(state["attention"], name))
        parts = [shard(block.nffn, i, 2)(x, residual) - residual for i in range(2)]
        torch.testing.assert_close(sum(parts), block.nffn(x, residual) - residual)


@pytest.mark.parametrize(
    ("names", "count", "message"),
    [
        (ROWS + COLUMNS, 8, "2 features of z are no whole heads of width 4"),
        (("wv.weight", "wv.bias", "wr.weight", "wr.bias"), 8, "8 features of values are no whole heads of width 16"),
        (("wv.weight", "wv.bias"), 2, "wz, wv and wr hold 4, 2 and 4 heads"),
        (("wz.weight", "wz.bias"), 2, "wz, wv and wr hold 2, 4 and 4 heads"),
        (("wr.weight", "wr.bias"), 8, "wz, wv and wr hold 4, 4 and 0.5 heads"),
    ],
)
def test_parts_that_cut_a_head_are_refused(names, count, message):
    layer = shard(build(num_heads=4, value_dim=64).layers[0].mega, 0, count, names)
    with pytest.raises(InputError, match=message):
        layer(torch.randn(1, 5, 32, dtype=torch.float64))


def test_groups_of_the_norm_are_never_cut():
    """Half of the features are half of the groups; a part that is no whole group is refused."""
    norm = build(norm_num_groups=4).layers[0].mega.timenorm
    x = torch.randn(2, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, _ = norm(x)
    norm.weight.data, norm.bias.data = norm.weight.data[:16], norm.bias.data[:16]
    torch.testing.assert_close(norm(x[..., :16])[0], whole[..., :16])
    with pytest.raises(InputError, match="12 features are no whole groups of 8"):
        norm(x[..., :12])
