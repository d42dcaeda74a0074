import pytest
import torch

from megalodon_lm import generate
from megalodon_lm.generation import stream
from megalodon_lm.generation.sampling import sample


def test_reading_in_pieces_changes_nothing(tiny, monkeypatch):
    tokens = torch.randint(0, 256, (2, 200), generator=torch.Generator().manual_seed(0))
    whole, _ = stream.read(tiny, tokens)
    monkeypatch.setattr(stream, "PIECE", 33)
    pieces, state = stream.read(tiny, tokens)
    torch.testing.assert_close(pieces, whole, atol=2e-4, rtol=0)
    assert state.position.tolist() == [200, 200]


def test_greedy_generation_takes_the_most_likely_token(tiny):
    prompt = torch.randint(0, 256, (1, 50), generator=torch.Generator().manual_seed(0))
    written = torch.stack(list(generate(tiny, prompt, 20, temperature=0, precision="float32")), 1)
    logits, _ = tiny(torch.cat([prompt, written], 1))
    assert torch.equal(logits[:, 49:-1].argmax(-1), written)


def test_seed_decides(tiny):
    prompt = torch.zeros(1, 3, dtype=torch.int64)
    runs = [torch.cat(list(generate(tiny, prompt, 30, seed=s))).tolist() for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_top_k_and_top_p_keep_the_most_likely():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, top_k=2, generator=generator).tolist()) == {1, 3}
    assert set(sample(logits, top_p=0.65, generator=generator).tolist()) == {1, 3}
    assert set(sample(logits, generator=generator).tolist()) == {0, 1, 2, 3}
    counts = sample(logits, generator=generator).bincount() / 4000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.4, 0.2, 0.3]), atol=0.03, rtol=0)


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_settings_outside_their_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        sample(torch.zeros(1, 3), **settings)


def test_empty_prompt_is_refused(tiny):
    with pytest.raises(ValueError, match="prompt is empty"):
        stream.read(tiny, torch.zeros(1, 0, dtype=torch.int64))
