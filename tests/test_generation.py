import math

import pytest
import torch
import torch.nn.functional as F

from megalodon_lm import ByteTokenizer, Generator
from megalodon_lm.errors import InputError
from megalodon_lm.generation.sampling import Draws, Sampling, sample


def test_greedy_generation_takes_the_most_likely_token(tiny):
    generator = Generator(tiny, ByteTokenizer(), "float32")
    prompt = generator.tokenizer.encode(b"the sea", begin=True)
    settings = Sampling(max_tokens=20, temperature=0)
    written = [delta.token for delta in generator.stream(["the sea"], settings)]
    logits, _ = tiny(torch.tensor([[*prompt, *written]]))
    likely = logits[0, len(prompt) - 1 : -1, : ByteTokenizer.pad].argmax(-1)  # padding is never drawn
    assert likely.tolist() == written


PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.3]])


def drawn(**settings):
    """Which of four tokens come up in 4,000 draws, and how often."""
    draws = Draws([0]).next().new_tensor(range(4000)) / 4000
    found = sample(PROBABILITIES.log().expand(4000, 4), Sampling(**settings), draws)
    return {token: count / 4000 for token, count in enumerate(found.bincount(minlength=4).tolist()) if count}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        ({"top_k": 2}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_p": 0.65}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_p": 0.75}, {1: 4 / 9, 2: 2 / 9, 3: 3 / 9}),
        ({"min_p": 0.45}, {1: 4 / 9, 2: 2 / 9, 3: 3 / 9}),
        ({"min_p": 0.55}, {1: 4 / 7, 3: 3 / 7}),
        ({"temperature": 0}, {1: 1.0}),
        ({"temperature": 0.5}, {0: 1 / 30, 1: 16 / 30, 2: 4 / 30, 3: 9 / 30}),
    ],
)
def test_sampling_draws_what_the_settings_say(settings, expected):
    assert drawn(**settings) == pytest.approx(expected, abs=1e-3)


def counted(logits, **settings):
    """Which tokens come up in 1,000 even draws from these logits."""
    draws = torch.arange(1000, dtype=torch.float64) / 1000
    return set(sample(torch.tensor([logits]).expand(1000, -1), Sampling(**settings), draws).tolist())


@pytest.mark.parametrize(
    ("logits", "settings", "expected"),
    [
        ([1.0, 2.0, 2.0, 0.0], {"top_k": 1}, {1}),
        ([2.0, 2.0, 2.0, 2.0], {"top_k": 3}, {0, 1, 2}),
        ([2.0, 2.0, 2.0, 2.0], {"top_k": 9}, {0, 1, 2, 3}),
        ([0.0, 3.0, 3.0, -40.0], {"top_p": 0.4}, {1}),
        ([2.0, 2.0, 2.0, 2.0], {"top_p": 0.5}, {0, 1}),
        ([0.0, 3.0, 3.0, 2.9], {"min_p": 1.0}, {1, 2}),
    ],
)
def test_equal_logits_are_counted_one_by_one(logits, settings, expected):
    """top_k = 1 is one token, top_p as few as hold the probability; min_p leaves out what is less likely alone."""
    assert counted(logits, **settings) == expected


@pytest.mark.parametrize("penalty", [1e308, 1e-320])
@pytest.mark.parametrize("temperature", [0, 1e-308, 1.0, 1e308, float("inf")])
def test_extreme_settings_still_draw_a_token(penalty, temperature):
    logits = torch.tensor([[2.0, -1.0, 0.0, -0.9]])
    settings = Sampling(temperature=temperature, repetition_penalty=penalty)
    for written in ([True] * 4, [True, True, False, False], [False] * 4):
        token = sample(logits, settings, torch.tensor([0.999], dtype=torch.float64), torch.tensor([written]))
        assert 0 <= token.item() < 4
        token = sample(F.pad(logits, (0, 1), value=-math.inf), settings, torch.tensor([0.999]).double())
        assert 0 <= token.item() < 4  # one that is left out stays so


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_refused(value, temperature):
    logits = torch.tensor([[0.0, 1.0], [value, 1.0]])
    with pytest.raises(InputError, match="not finite"):
        sample(logits, Sampling(temperature=temperature), torch.zeros(2, dtype=torch.float64))


def test_any_whole_number_is_a_seed():
    assert Draws([2**70, -1]).next().tolist() == Draws([0, 2**64 - 1]).next().tolist()


def test_repetition_penalty_bears_on_written_tokens_alone():
    logits = torch.tensor([[2.0, -1.0, 1.5, -0.9]])
    written = torch.tensor([[True, True, False, False]])
    greedy = Sampling(temperature=0, repetition_penalty=2.0)
    assert sample(logits, greedy, torch.zeros(1), written).item() == 2
    assert sample(logits, greedy, torch.zeros(1), ~written).item() == 0


def test_draws_of_a_row_do_not_depend_on_its_neighbours():
    together, alone = Draws([3, 4, 5]), Draws([4])
    for _ in range(5):
        assert together.next()[1] == alone.next()[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 2}, {"min_p": -0.1},
        {"repetition_penalty": 0}, {"max_tokens": -1}, {"stop": ("x", "")}, {"temperature": float("nan")},
        {"top_k": 1.5}, {"max_tokens": float("nan")}, {"seed": 0.5}, {"stop": "abc"},
    ],
)  # fmt: skip
def test_settings_outside_their_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))) as told:
        Sampling(**settings)
    assert (settings == {"stop": "abc"}) == ("must be a list" in str(told.value))
