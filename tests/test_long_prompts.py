"""The suite of long prompts itself: who reads what is hidden is always right, and who guesses is right by chance."""

import json
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from megalodon_lm import ByteTokenizer, Megalodon
from megalodon_lm.cli.main import main
from megalodon_lm.data.books import bundled
from megalodon_lm.errors import InputError
from megalodon_lm.evaluation.long_prompts import LONG_TASKS
from megalodon_lm.evaluation.long_prompts_run import LongRun, Tally
from megalodon_lm.evaluation.read_once import Reader, Score, Work
from megalodon_lm.evaluation.recall_prose import Prose
from megalodon_lm.evaluation.results import Results

BYTES = ByteTokenizer()
BOOK = bundled("validation")["dracula"][20_000:120_000]
PROSE = Prose([BOOK], BYTES)


class Solver:
    """In the place of a Reader: finds the answer in the text of the prompt, with no look at the answers."""

    tokenizer, model = BYTES, SimpleNamespace(config=None)

    def __init__(self):
        self.work, self.longest = Work(), 0

    def read(self, tokens, after=""):
        return after + BYTES.decode(tokens)

    def each(self, texts, after=""):
        return ((number, self.read(text, after)) for number, text in enumerate(texts))

    def write(self, contexts, max_tokens, stop):
        said = [f" {', '.join(self.solved(text))}." for text in contexts]
        assert all(len(BYTES.encode(each)) <= max_tokens for each in said)
        return said

    def score(self, text, choices):
        answer = self.solved(text)[0]
        return [Score(float(BYTES.decode(choice).strip() == answer), False) for choice in choices]

    def solved(self, text):
        first, *_, last = text.split("\n\n")
        question = last if "?" in last else first
        if match := re.search(r"place where the (.+) is hidden", question):
            place = re.search(rf"The {match[1]} is hidden in the (\w+)\.", text)[1]
            return [re.search(rf"The {place} belongs to the (\w+)\.", text)[1]]
        if match := re.search(r"variables have the value (\d+)", question):
            known, chain = {match[1]}, re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text)
            for name, value in chain:
                known |= {name} if value in known else set()
            return [name for name, value in chain if name in known]
        if match := re.search(r"Which (\d+) words", question):
            body = max(text.split("\n\n"), key=len)
            return [word for word, _ in Counter(body.split()).most_common(int(match[1]))]
        keys = [key for key in re.findall(r"secret number of the (\w+ \w+) is", text) if key in question]
        return [n for key in dict.fromkeys(keys) for n in re.findall(rf"number of the {key} is (\d+)\.", text)]


@pytest.mark.parametrize("question", ["after", "before"])
@pytest.mark.parametrize("task", LONG_TASKS)
def test_who_reads_what_is_hidden_is_always_right(task, question):
    for length in (1024, 20_000):
        run = LongRun(task, PROSE, length, samples=2, question=question)
        found = run.result(Solver())
        assert {name: score.value for name, score in found.scores.items()} == dict.fromkeys(found.scores, 1.0)
        assert found.notes["contained_interval"][1] == 1.0
        assert found.task == f"{task} {length}" + (", question before" if question == "before" else "")
        depths = [place["depth"] for place in found.notes["depths"]]
        assert depths == ([0, 0.25, 0.5, 0.75, 1] if "chosen" in found.scores else [None])


def test_who_guesses_is_right_by_chance():
    random = np.random.default_rng(0)

    class Guesser(Solver):
        def score(self, text, choices):
            return [Score(score, False) for score in random.random(len(choices))]

        def write(self, contexts, max_tokens, stop):
            return [" ".join(random.choice(["123456", "word", "baron"], 5)) for _ in contexts]

    run = LongRun("multi-key", PROSE, 2048, samples=80)
    found = run.result(Guesser())
    low, high = found.notes["chosen_interval"]
    assert low < 1 / 8 < high
    assert found.scores["contained"].value == 0
    assert found.samples == 400


@pytest.mark.parametrize("task", LONG_TASKS)
def test_documents_are_as_long_as_asked_for_and_come_from_the_seed(task):
    for length in (1024, 30_000, 150_000):  # the last is longer than the text
        run = LongRun(task, PROSE, length, (0.5,), 1)
        [document] = run.documents(0)
        assert 0.85 * length < len(document.tokens) <= length
        assert np.array_equal(document.tokens, next(iter(run.documents(0))).tokens)
        other = LongRun(task, PROSE, length, (0.5,), 1, seed=1)
        assert not np.array_equal(document.tokens, next(iter(other.documents(0))).tokens)
        text = BYTES.decode(document.tokens)
        for question in document.questions:
            assert all(answer in text for answer in question.answers)
            assert len(set(question.choices)) == len(question.choices) in (0, 8)


def test_needles_stand_at_their_depth_and_prose_around_them_is_that_of_the_book():
    depths = (0.0, 0.3, 1.0)
    run = LongRun("multi-key", PROSE, 30_000, depths)
    [document] = run.documents(0)
    text = BYTES.decode(document.tokens)
    for question, depth in zip(document.questions, depths, strict=True):
        assert abs(text.index(f" {question.answers[0]}.") / len(text) - depth) < 0.02
        assert question.depth == depth
    needle = r" The secret number of the \w+ \w+ is \d{6}\."
    assert len(re.findall(needle, text)) == 16
    assert re.sub(needle, "", text) in BOOK.decode() * 2


def test_questions_share_a_reading(tiny):
    """Documents of many needles are read once; the question before them makes of each its own."""
    after = LongRun("multi-key", PROSE, 2048, (0.0, 1.0), 1)
    found = after.result(reader := Reader(tiny, BYTES))
    assert found.notes == after.result(Alone(tiny, BYTES)).notes
    assert found.tokens_computed == reader.work.computed < found.tokens_reread / 6
    before = LongRun("multi-key", PROSE, 2048, (0.0, 1.0), 1, question="before").result(Reader(tiny, BYTES))
    assert before.tokens_computed > 1.5 * found.tokens_computed


class Alone(Reader):
    """Reads everything anew."""

    def read(self, tokens, after=()):
        return np.array([*after, *tokens], np.int64)

    def each(self, texts, after=()):
        return ((number, super(Alone, self).read(self.read(text, after))) for number, text in enumerate(texts))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "needel"}, "did you mean 'needle'"),
        ({"length": 100}, "at least 512"),
        ({"samples": 0}, "at least 1"),
        ({"depths": (0.5, 0.5)}, "must differ"),
        ({"depths": (1.5,)}, "from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        LongRun(**{"task": "needle", "prose": PROSE, "length": 1024} | changes)


def test_too_many_needles_are_refused():
    with pytest.raises(InputError, match="too few for 16 sentences"):
        LongRun("multi-key", PROSE, 512, tuple(np.linspace(0, 1, 16))).documents(0)


def test_figures():
    assert Tally(1, 4).figures()["share"] == 0.25


def test_the_command(saved, tmp_path, capsys):
    """As docs/evaluation.md shows it."""
    text, out = tmp_path / "text.txt", tmp_path / "long.json"
    text.write_bytes(BOOK[:5000])
    arguments = ["evaluate", "long", str(saved), "--tasks", "needle", "variables", "--lengths", "1024"]
    main([*arguments, "--samples", "1", "--depths", "0.5", "--text", str(text), "--out", str(out), "--quiet"])
    shown = capsys.readouterr().out
    assert "tokens computed" in shown
    assert "95 %" in shown
    assert [task.task for task in Results.load(out).tasks] == ["needle 1024", "variables 1024"]
    assert json.loads(out.read_text())["tasks"][0]["notes"]["depths"][0]["depth"] == 0.5
    assert json.loads(out.read_text())["settings"]["seed"] == 0
    assert Results.load(out).model["fingerprint"] == Megalodon.load(saved).fingerprint()
    main(["evaluate", "report", str(out), str(out)])
    assert "variables 1024" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "--depths", "2"])
    assert "from 0 to 1" in capsys.readouterr().err
