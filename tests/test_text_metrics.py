"""Metrics of texts, against cases worked by hand."""

import math

import pytest

from megalodon_lm.evaluation.text_metrics import Rouge, exact_match, f1, geometric_mean, mean, normalised, rouge


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, an\tanimal.", "cat animal"),
        ("a.m. theatre", "am theatre"),  # punctuation goes first, and articles are whole words
        ("THE", ""),
        ("state-of-the-art", "stateoftheart"),
        ("“quoted”", "“quoted”"),  # only ASCII punctuation goes
        ("1,000.5", "10005"),
    ],
)
def test_normalisation(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("said", "references", "expected"),
    [
        ("The Count!", ["count"], 1),
        ("his castle in the mountains", ["castle mountains"], 2 * (2 / 4) * 1 / (2 / 4 + 1)),  # precision 2/4, recall 1
        ("ham ham", ["ham eggs"], 2 * 0.5 * 0.5 / 1),  # a word counts as often as in both
        ("ham ham", ["ham ham eggs"], 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("no", ["Yes", "No"], 1),  # the best reference
        ("unanswerable", ["Unanswerable"], 1),
        ("the", ["the"], 0),  # nothing is left of either
        ("", ["Unanswerable"], 0),
        ("", [""], 0),  # as in SCROLLS; SQuAD 2 would say 1
        ("the count", [""], 0),
        ("Yes, it does.", ["Yes"], 2 * (1 / 3) / (1 / 3 + 1)),
    ],
)
def test_f1(said, references, expected):
    assert f1(said, references) == pytest.approx(expected)


def test_exact_match():
    assert exact_match(" The (B) answer. ", ["x", "b answer"]) == 1
    assert exact_match("not mentioned", ["Mentioned"]) == 0
    assert exact_match("Not Mentioned.", ["Not mentioned"]) == 1


def test_rouge():
    """ "the cat sat on the mat" against "the cat lay on a mat": 4 words, 1 pair, "the cat on mat" in order."""
    assert rouge("the cat sat on the mat", ["the cat lay on a mat"]) == pytest.approx((4 / 6, 1 / 5, 4 / 6))
    assert rouge("On the mat: CATS", ["cat on mat"]) == pytest.approx((2 * 2 / (4 + 3), 0, 2 * 2 / (4 + 3)))  # no stems
    best = rouge("a b c d", ["a b x y", "d c b a"])  # each kind from its best reference
    assert best == pytest.approx((1, 1 / 3, 2 / 4))
    assert rouge("", ["a"]) == rouge("a", [""]) == rouge("", [""]) == (0, 0, 0)


def test_means():
    assert mean([0, 1]) == pytest.approx((0.5, 0.5))
    assert mean([0.3]) == (0.3, None)
    rouges = [Rouge(0.5, 0.2, 0.4), Rouge(0.3, 0.0, 0.2)]
    value, error = geometric_mean(rouges)
    assert value == pytest.approx((0.4 * 0.1 * 0.3) ** (1 / 3))
    shares = [value / 3 * (0.5 / 0.4 + 0.2 / 0.1 + 0.4 / 0.3), value / 3 * (0.3 / 0.4 + 0.2 / 0.3)]
    assert error == pytest.approx(math.dist(shares, [value] * 2) / math.sqrt(2))
    assert geometric_mean([Rouge(1, 0, 1)] * 2) == (0, 0)
