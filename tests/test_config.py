import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.config import SIZES

PUBLISHED = {
    "mega200M": 220_627_968,
    "mega1.3B": 1_342_832_640,
    "mega1.3B_pg19": 1_327_628_288,
    "mega7.1B": 7_117_381_632,
    "mega7.3B": 7_385_817_088,
    "paper7B": 7_385_817_088,
    "gecko7B": 7_385_817_088,
    "gecko7.1B": 6_975_168_512,  # with a vocabulary of 32,000
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    config = ModelConfig.named(name)
    with torch.device("meta"):
        built = sum(p.numel() for p in Megalodon(config).parameters())
    assert built == config.num_parameters == PUBLISHED.get(name, built)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("swiglu", [False, True])
def test_parameter_counts_of_variants(swiglu, tied, rescale):
    config = ModelConfig.named("tiny", swiglu=swiglu, share_emb=tied, rescale_nffn=rescale)
    plain = ModelConfig.named("tiny", swiglu=False)
    assert sum(p.numel() for p in Megalodon(config).parameters()) == config.num_parameters
    assert config.num_parameters - plain.num_parameters == 2 * swiglu * 64 * 128 + 2 * rescale * 64 - tied * 259 * 64


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_round_trip(suffix, tmp_path):
    config = ModelConfig.named("mega1.3B_pg19", dropout=0.1, init_mode="xavier", rope_base=1e22, norm_eps=1e-12)
    config.save(tmp_path / f"c.{suffix}")
    assert ModelConfig.load(tmp_path / f"c.{suffix}") == config
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_whole_number_for_a_float_is_that_float():
    assert ModelConfig(rope_base=10_000).to_dict() == ModelConfig().to_dict()
    assert repr(ModelConfig(rope_base=10_000).rope_base) == "10000.0"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.toml", "num_layers = 0", r"c\.toml: num_layers = 0 must be at least 1"),
        ("c.toml", "layers = 2", r"c\.toml: unknown key 'layers'.*did you mean 'num_layers'"),
        ("c.toml", "num_layers = ", r"c\.toml is not valid TOML"),
        ("c.json", "{", r"c\.json is not valid JSON"),
        ("c.json", "[]", r"c\.json must hold a table, not list"),
        ("c.json", None, r"cannot read the model configuration .*c\.json: No such file"),
    ],
)
def test_unusable_files_are_refused_by_name(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        ModelConfig.load(tmp_path / name)


def test_saving_where_there_is_no_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write .*c\.toml: No such file"):
        ModelConfig().save(tmp_path / "none" / "c.toml")


SIZE_FIELDS = [
    "vocab_size", "num_layers", "model_dim", "num_heads", "z_dim", "value_dim", "ffn_hidden_dim", "cema_ndim",
    "chunk_size", "norm_num_groups",
]  # fmt: skip


@pytest.mark.parametrize("field", SIZE_FIELDS)
@pytest.mark.parametrize(("value", "rule"), [(0, "must be at least 1"), (-3, "must be at least 1"), (True, "type int")])
def test_sizes_are_positive_whole_numbers(field, value, rule):
    with pytest.raises(ValueError, match=rf"{field} = {value} .*{rule}"):
        ModelConfig(**{field: value})


@pytest.mark.parametrize("field", ["dropout", "hidden_dropout", "attention_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_dropouts_are_probabilities(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value} is a probability and must be at least 0 and below 1"):
        ModelConfig(**{field: value})


@pytest.mark.parametrize("field", ["norm_eps", "rope_base"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_are_positive_and_finite(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value} must be positive and finite"):
        ModelConfig(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_num_groups": 5}, "norm_num_groups = 5 must divide model_dim = 64; 4 does"),
        ({"num_heads": 3}, "num_heads = 3 must divide z_dim = 32; 2 does"),
        ({"num_heads": 4, "value_dim": 130}, "num_heads = 4 must divide value_dim = 130; 2 does"),
        ({"num_heads": 32}, "z_dim = 32 gives heads of width 1, but .* need an even width; use 64"),
        ({"num_heads": 2, "z_dim": 30}, "z_dim = 30 gives heads of width 15, .*; use 32"),
        ({"init_mode": "kaiming"}, "must be one of 'he', 'bert', 'xavier'"),
        ({"model_dim": 64.0}, "must be of type int, not float"),
        ({"swiglu": 1}, "must be of type bool"),
        ({"dropout": "0.1"}, "dropout = '0.1' must be of type float, not str"),
        ({"dropout": True}, "dropout = True must be of type float, not bool"),
        ({"model_dimension": 64}, "unknown key 'model_dimension'.*did you mean 'model_dim'"),
    ],
)
def test_wrong_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.named("tiny", **changes)


def test_the_named_remedy_is_one():
    ModelConfig.named("tiny", num_heads=32, z_dim=64)
    ModelConfig.named("tiny", num_heads=2, z_dim=32)
    ModelConfig.named("tiny", norm_num_groups=4)


def test_unknown_size_lists_the_known():
    with pytest.raises(ValueError, match=r"'mega7B'; did you mean 'mega7.3B'\?; known sizes: ") as refused:
        ModelConfig.named("mega7B")
    assert str(refused.value).endswith(", ".join(SIZES))


@pytest.mark.parametrize("changes", [{}, {"swiglu": False, "share_emb": True, "num_heads": 2}])
def test_flops_of_the_linear_maps(changes):
    """PyTorch's count of all products with a weight is flops_per_token without CEMA and attention.

    Those two are products of no weight, and run in kernels that PyTorch does not count.
    """
    config = ModelConfig.named("tiny", **changes)
    model, counter = Megalodon(config), FlopCounterMode(display=False)
    rest = 2 * config.num_layers * (8 * config.model_dim * config.cema_ndim + 32.5 * (config.z_dim + config.value_dim))
    for backward in (False, True):
        with counter:
            logits, _ = model(torch.zeros(1, 64, dtype=torch.int64))
            if backward:
                logits.sum().backward()
        counts = counter.get_flop_counts()["Global"]
        counted = sum(v for op, v in counts.items() if str(op) in ("aten.mm", "aten.addmm")) / 64
        assert config.flops_per_token(backward) - (3 if backward else 1) * rest == counted


def test_flops_of_attention_are_the_mean_over_a_chunk():
    """A token sees on average (c + 1) / 2 tokens, each for a score over Z and a sum over V."""
    short, long = (ModelConfig.named("tiny", chunk_size=c) for c in (2, 102))
    difference = long.flops_per_token() - short.flops_per_token()
    assert difference == 2 * short.num_layers * 50 * (short.z_dim + short.value_dim)
