"""What holds for every architecture of the registry."""

import pytest

from megalodon_lm import ModelConfig
from megalodon_lm.architectures import ARCHITECTURES, build, config_of, load, load_config
from megalodon_lm.config import GECKO
from megalodon_lm.errors import InputError

BYTES = 259


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("parameters", [100_000, 1_500_000, 20_000_000])
def test_a_wanted_number_of_parameters_is_met(name, parameters):
    config = config_of({"architecture": name, "parameters": parameters, "vocab_size": BYTES})
    assert abs(config.num_parameters / parameters - 1) <= 0.01
    assert config.vocab_size == BYTES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_is_saved_and_loaded(name, tmp_path):
    model = build(config_of({"architecture": name, "parameters": 100_000, "vocab_size": BYTES}))
    assert sum(p.numel() for _, p in model.named_parameters()) == model.config.num_parameters
    model.save(tmp_path)
    assert load_config(tmp_path) == load_config(tmp_path / "config.json") == model.config
    again = load(tmp_path)
    assert type(again) is type(model)
    assert again.fingerprint() == model.fingerprint()
    (tmp_path / "config.json").unlink()
    assert load(tmp_path).config == model.config


def test_a_megalodon_is_what_has_no_name():
    assert config_of({}) == ModelConfig()
    assert "architecture" not in ModelConfig().to_dict()
    assert config_of({"architecture": "gecko", "num_layers": 3}) == ModelConfig(num_layers=3, **GECKO)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "lama"}, "unknown architecture 'lama'"),
        ({"architecture": 3}, "unknown architecture 3"),
        ({"parameters": 0, "vocab_size": BYTES}, "parameters = 0 must be"),
        ({"parameters": 1_000_000}, "needs vocab_size"),
        ({"parameters": 1_000_000, "vocab_size": 32_000}, "nearest is 2,"),
        ({"parameters": 1_000_000, "vocab_size": BYTES, "model_dim": 64}, "model_dim = 64 follows from parameters"),
        ({"parameters": 1_000_000, "vocab_size": BYTES, "num_heads": "2"}, "num_heads = '2' must be of type int"),
    ],
)
def test_what_cannot_be_had_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        config_of(values)
