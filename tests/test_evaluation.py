import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalodon_lm.evaluation import perplexity
from megalodon_lm.evaluation.perplexity import bits_per_byte, by_position, compressors, score


@pytest.mark.parametrize("context", [None, 100, 64, 1000])
def test_score_equals_one_forward_pass_a_window(tiny, context, monkeypatch):
    """Whatever rows and pieces the windows are read in."""
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 128)
    monkeypatch.setattr(perplexity, "_PIECE", 48)
    tokens = torch.randint(0, 256, (250,), generator=torch.Generator().manual_seed(0))
    actual = score(tiny, tokens, 256, context)
    expected = []
    for window in tokens.split(context or 250):
        logits, _ = tiny(torch.cat([torch.tensor([256]), window[:-1]])[None])
        expected.append(F.cross_entropy(logits[0], window, reduction="none"))
    np.testing.assert_allclose(actual, torch.cat(expected).detach().numpy(), atol=1e-4)


def test_uniform_model_needs_the_logarithm_of_the_vocabulary():
    losses = np.full(1000, np.log(256))
    assert bits_per_byte(losses, 1000) == pytest.approx(8)
    assert bits_per_byte(losses, 500) == pytest.approx(16)


def test_positions_fall_into_buckets_that_cover_the_window():
    losses = np.tile(np.arange(10) * np.log(2), 3)
    assert by_position(losses, 10) == pytest.approx({1: 0, 2: 1, 4: 2.5, 8: 5.5, 10: 8.5})


def test_compressors_on_the_validation_text():
    from megalodon_lm.data.books import bundled

    found = compressors(bundled("validation")["dracula"])
    assert found == pytest.approx({"gzip": 2.952, "xz": 2.420, "bzip2": 2.125}, abs=0.002)
