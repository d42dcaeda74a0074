"""The models Megalodon is compared with: of equal size, on their fast paths, and right with a cache."""

import sys

import pytest
import torch
import torch.nn.functional as F

from megalodon_lm import ModelConfig
from megalodon_lm.benchmark.peers import NAMES, missing, peer

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
PARAMETERS = 300_000
VOCABULARY = 32


@pytest.fixture(scope="module", params=NAMES)
def named(request):
    torch.manual_seed(0)
    module = peer(request.param)
    return module, module.build(PARAMETERS, VOCABULARY).eval()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_equal_to_one_percent(name):
    config = ModelConfig.named("bench22M")
    with torch.device("meta"):
        model = peer(name).build(config.num_parameters, config.vocab_size)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(config.num_parameters, rel=0.01)


def test_the_loss_is_that_of_the_next_token(named):
    module, model = named
    tokens = torch.randint(0, VOCABULARY, (2, 21))
    logits = model(tokens, use_cache=False).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(module.loss(model, tokens), expected)


@torch.inference_mode()
def test_a_cache_changes_no_logits(named):
    module, model = named
    tokens = torch.randint(0, VOCABULARY, (1, 21))  # transformers' RWKV steps mix up the rows of larger batches
    expected = model(tokens, use_cache=False).logits
    for kind in module.CACHES:
        logits, cache = module.prefill(model, tokens[:, :12], module.empty_cache(model, kind, 24))
        torch.testing.assert_close(logits, expected[:, 11])
        for at in range(12, 21):
            logits, cache = module.step(model, tokens[:, at : at + 1], cache)
            torch.testing.assert_close(logits, expected[:, at], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_made_up_cache_steps_like_a_read_one(named):
    module, model = named
    for kind in module.CACHES:
        cache = module.made_up_cache(model, kind, 40, 4, torch.float32)
        logits, cache = module.step(model, torch.zeros(1, 1, dtype=torch.int64), cache)
        assert logits.shape == (1, VOCABULARY)
        assert logits.isfinite().all()
        if hasattr(cache, "get_seq_length") and len(module.CACHES) > 1:
            assert int(cache.get_seq_length()) == 41


def test_mamba_trains_by_the_scan_of_mambapy(monkeypatch):
    import mambapy.pscan

    calls = []
    scan = mambapy.pscan.pscan
    monkeypatch.setattr(mambapy.pscan, "pscan", lambda *args: calls.append(args) or scan(*args))
    module = peer("mamba")
    model = module.build(PARAMETERS, VOCABULARY)
    module.loss(model, torch.zeros(1, 8, dtype=torch.int64)).backward()
    assert len(calls) == model.config.num_hidden_layers


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mambapy", None)
    monkeypatch.setattr("megalodon_lm.benchmark.peers.find_spec", lambda name: None if name == "mambapy" else object())
    assert missing("llama") == []
    with pytest.raises(ValueError, match=r"mamba needs mambapy; pip install 'megalodon-lm\[bench\]'"):
        peer("mamba")
    with pytest.raises(ValueError, match="unknown peer 'gpt'"):
        peer("gpt")
