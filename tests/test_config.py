import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalodon_lm import Megalodon, ModelConfig, State
from megalodon_lm.config import SIZES

PUBLISHED = {
    "mega200M": 220_627_968,
    "mega1.3B": 1_342_832_640,
    "mega1.3B_pg19": 1_327_628_288,
    "mega7.1B": 7_117_381_632,
    "mega7.3B": 7_385_817_088,
    "paper7B": 7_385_817_088,
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    config = ModelConfig.named(name)
    with torch.device("meta"):
        built = sum(p.numel() for p in Megalodon(config).parameters())
    assert built == config.num_parameters == PUBLISHED.get(name, built)


def test_rescaled_feed_forward_is_counted():
    config = ModelConfig.named("tiny", rescale_nffn=True, swiglu=False)
    assert sum(p.numel() for p in Megalodon(config).parameters()) == config.num_parameters


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_round_trip(suffix, tmp_path):
    config = ModelConfig.named("mega1.3B_pg19", dropout=0.1, init_mode="xavier")
    config.save(tmp_path / f"c.{suffix}")
    assert ModelConfig.load(tmp_path / f"c.{suffix}") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers = 0 must be at least 1"),
        ({"norm_num_groups": 5}, "norm_num_groups = 5 must divide model_dim = 64; 4 does"),
        ({"num_heads": 3}, "num_heads = 3 must divide z_dim = 32; 2 does"),
        ({"num_heads": 32}, "even width"),
        ({"dropout": 1.0}, "dropout = 1.0 is a probability"),
        ({"norm_eps": 0.0}, "norm_eps = 0.0 must be positive"),
        ({"rope_base": float("inf")}, "must be positive and finite"),
        ({"init_mode": "kaiming"}, "must be one of 'he', 'bert', 'xavier'"),
        ({"model_dim": 64.0}, "must be of type int, not float"),
        ({"swiglu": 1}, "must be of type bool"),
        ({"model_dimension": 64}, "unknown key 'model_dimension'.*did you mean 'model_dim'"),
    ],
)
def test_wrong_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.named("tiny", **changes)


def test_unknown_size_lists_the_known():
    with pytest.raises(ValueError, match=r"'mega7B'; did you mean 'mega7.3B'\?; known sizes: mega200M, "):
        ModelConfig.named("mega7B")


def test_flops_of_the_matrix_products():
    """All linear maps of a forward pass, as PyTorch counts them, against the count without CEMA and attention."""
    config = ModelConfig.named("tiny")
    model = Megalodon(config)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 64, dtype=torch.int64))
    counted = sum(v for op, v in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op)) / 64
    rest = 2 * config.num_layers * (8 * config.model_dim * config.cema_ndim + 32.5 * (config.z_dim + config.value_dim))
    assert config.flops_per_token() - rest == counted
    assert config.flops_per_token(backward=True) == 3 * config.flops_per_token()


@pytest.mark.parametrize("name", ["tiny", "small", "paper7B"])
@pytest.mark.parametrize(("batch", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_state_bytes(name, batch, dtype):
    config = ModelConfig.named(name)
    state = State.empty(config, batch, "meta", dtype)
    assert state.nbytes == config.state_bytes(batch, dtype.itemsize)


def test_state_bytes_of_a_state_that_has_read(tiny):
    _, state = tiny(torch.zeros(3, 100, dtype=torch.int64))
    assert state.nbytes == tiny.config.state_bytes(3)
