"""ListOps: the generator by its rules, and labels by an evaluator of its own."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from megalodon_lm.data import listops
from megalodon_lm.errors import InputError

FILE = Path(__file__).parent.parent.parent / "shared" / "data" / "listops" / "listops_d20.tsv"


def value(tokens):
    """Recursive descent, with NumPy's median: nothing of what is tested."""

    def read(at):
        if not tokens[at].startswith("["):
            return int(tokens[at]), at + 1
        name, arguments, at = tokens[at], [], at + 1
        while tokens[at] != "]":
            found, at = read(at)
            arguments.append(found)
        functions = {
            "[MIN": min,
            "[MAX": max,
            "[MED": lambda a: int(np.median(a)),
            "[SM": lambda a: int(np.sum(a) % 10),
        }
        return functions[name](arguments), at + 1

    result, end = read(0)
    assert end == len(tokens)
    return result


def shape(tokens):
    """The depth, and the arguments of each list."""
    depth, deepest, arguments, counts = 0, 0, [0], []
    for token in tokens:
        if token.startswith("["):
            arguments[-1] += 1
            arguments.append(0)
            depth += 1
            deepest = max(deepest, depth)
        elif token == "]":
            counts.append(arguments.pop())
            depth -= 1
        else:
            arguments[-1] += 1
    return deepest, counts


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_labels_are_those_of_an_independent_evaluator(count):
    for tokens, label in islice(listops.generate(7), count):
        assert value(tokens) == label


def test_statistics_are_those_of_the_official_rules():
    expressions = [tokens for tokens, _ in islice(listops.generate(3), 150)]
    assert all(500 < len(tokens) < 2000 for tokens in expressions)
    shapes = [shape(tokens) for tokens in expressions]
    assert max(deepest for deepest, _ in shapes) == 9  # digits stand at depth 10
    arguments = Counter(n for _, counts in shapes for n in counts)
    assert set(arguments) == set(range(2, 11))
    operators = Counter(token for tokens in expressions for token in tokens if token in listops.OPERATORS)
    total = operators.total()
    assert total > 10_000
    assert all(abs(n / total - 0.25) < 0.02 for n in operators.values())
    digits = Counter(token for tokens in expressions for token in tokens if token.isdigit())
    assert all(abs(n / digits.total() - 0.1) < 0.01 for n in digits.values())
    # Long expressions have more lists than a quarter; far below the greatest depth the share is that of the rule.
    assert 0.15 < (total - 150) / (digits.total() + total - 150) < 0.25


def test_a_seed_says_which():
    first, again, other = (list(islice(listops.generate(seed), 5)) for seed in (1, 1, 2))
    assert first == again != other
    assert len({tuple(tokens) for tokens, _ in first}) == 5


def test_short_ones_can_be_asked_for():
    for tokens, _ in islice(listops.generate(0, 4, 40, max_depth=3, max_args=3), 50):
        deepest, counts = shape(tokens)
        assert 4 < len(tokens) < 40
        assert deepest <= 2
        assert max(counts) <= 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7),
        ("[MED 1 2 ]", 1),
        ("[MED 9 1 5 ]", 5),
        ("[SM 9 9 [MAX 0 3 ] ]", 1),
        ("( ( ( [MIN 6 ) 3 ) ] )", 3),
    ],
)
def test_values(text, expected):
    assert listops.evaluate(listops.parse(text)) == expected == value(listops.parse(text))


@pytest.mark.parametrize("text", ["", "1 2", "[MAX 1", "[MAX ]", "]", "[FOO 1 ]", "12"])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(InputError, match="ListOps"):
        listops.evaluate(text.split())


def test_files_are_read_with_and_without_parentheses_in_both_orders(tmp_path):
    path, (tokens, label) = tmp_path / "x.tsv", next(listops.generate(0))
    for text in (listops.official(tokens), " ".join(tokens)):
        for lines in ([f"{text}\t{label}"], ["Source\tTarget", f"{text}\t{label}"], [f"{label}\t{text}"]):
            path.write_text("\n".join(lines) + "\n")
            assert listops.read(path) == ([tokens], [label])
    for wrong, message in (("", "is empty"), ("1 2 3", "line 1"), ("[FOO 1 ]\t1", "no token"), ("\xff", "line 1")):
        path.write_text(wrong)
        with pytest.raises(InputError, match=message):
            listops.read(path)
    with pytest.raises(InputError, match="No such file"):
        listops.read(tmp_path / "none")


@pytest.mark.skipif(not FILE.exists(), reason="the test set of its authors is not here")
def test_all_labels_of_the_authors_file():
    expressions, labels = listops.read(FILE)
    assert len(labels) == 8000
    assert [listops.evaluate(tokens) for tokens in expressions] == labels
    lines = FILE.read_text().splitlines()
    assert all(line.endswith(listops.official(tokens)) for line, tokens in zip(lines, expressions, strict=True))
