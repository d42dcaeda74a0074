"""Commands that several ranks carry out together: the same figures and bookmarks as one process, told once."""

import contextlib
import gzip
import io
import json
import os
import random
import signal
import threading
import time

import pytest
import torch

from megalodon_lm import ByteTokenizer
from megalodon_lm.cli.main import main
from megalodon_lm.generation.context import Context
from megalodon_lm.parallel.leading import Leading

from .ranks import run_ranks

TEXT = bytes(random.Random(2).choices(b"abcdefgh \n", k=3003))
READ_ON = 901
"""Bytes of a second text."""


class Left(BaseException):
    """A rank has ended its process."""


def carry_out(rank, *commands):
    """Exit code, standard output and standard error of each command, by a rank of those started together."""
    os.environ |= {"WORLD_SIZE": str(torch.distributed.get_world_size()), "RANK": str(rank)}
    found, leave = [], os._exit

    def left(code):
        raise Left(code)

    os._exit = left
    for words in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(list(words))
            except Left as ended:
                found.append((ended.args[0], out.getvalue(), err.getvalue()))
    os._exit = leave
    return found


def piped(folder, name, content):
    """A pipe, and what writes into it when it is opened for reading."""
    os.mkfifo(folder / name)
    writer = threading.Thread(target=(folder / name).write_bytes, args=(content,), daemon=True)
    writer.start()
    return str(folder / name)


def inputs(folder):
    """The text in a file, packed, through a pipe; another one; and very short ones."""
    folder.mkdir()
    (folder / "text.txt").write_bytes(TEXT)
    (folder / "text.txt.gz").write_bytes(gzip.compress(TEXT))
    (folder / "more.txt").write_bytes(TEXT[:READ_ON])
    (folder / "short").mkdir()
    for length in (1, 2, 3, 65):
        (folder / "short" / f"{length}.txt").write_bytes(TEXT[:length])
    return folder


def commands(folder, model):
    """Each with what it writes."""
    common = ("--precision", "float32", "--quiet")
    text, packed = str(folder / "text.txt"), str(folder / "text.txt.gz")
    pipe, other = (piped(folder, name, TEXT) for name in ("pipe", "other"))
    first, second = str(folder / "first.state"), str(folder / "second.state")
    evaluate = ("evaluate", "perplexity", model)
    return [
        ("read", model, packed, "--save", first, *common),
        ("read", model, str(folder / "more.txt"), "--state", first, "--save", second, *common),
        ("read", model, pipe, "--save", str(folder / "piped.state"), *common),
        ("read", model, str(folder / "short"), "--save", str(folder / "short.state"), *common),
        (*evaluate, packed, "--contexts", "64", "0", "--json", str(folder / "packed.json"), *common),
        (*evaluate, other, text, "--contexts", "1000", "0", "--json", str(folder / "piped.json"), *common),
        (*evaluate, str(folder / "short"), "--contexts", "0", "--json", str(folder / "short.json"), *common),
        (*evaluate, text, "--norm-statistics", "windowed", "--contexts", "0", "--json", str(folder / "windowed.json"),
         *common),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(saved, tmp_path_factory):
    """The folder of what one process found."""
    folder = inputs(tmp_path_factory.mktemp("alone") / "data")
    for words in commands(folder, str(saved)):
        main(list(words))
    return folder


def figures(path):
    """Every number in a file, by its place."""

    def flat(value, name=""):
        if isinstance(value, dict):
            return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}").items()}
        return {name: value} if isinstance(value, int | float) else {}

    return flat(json.loads(path.read_text()))


@pytest.mark.parametrize("ranks", [2, 3])
def test_figures_and_bookmarks_are_those_of_one_process(ranks, alone, saved, tiny, tmp_path):
    folder = inputs(tmp_path / "data")
    found = run_ranks(carry_out, ranks, *commands(folder, str(saved)))
    for first, *others in zip(*found, strict=True):
        assert first[0] == 0, first
        assert first[1], first
        assert first[2] == "", first
        assert all(other == (0, "", "") for other in others), others
    for path in sorted(alone.glob("*.json")):
        assert figures(folder / path.name) == pytest.approx(figures(path), abs=1e-6, rel=1e-6), path.name
    tokenizer = ByteTokenizer()
    for path in sorted(alone.glob("*.state")):
        one, many = (Context.load(p, tiny, tokenizer, "float32") for p in (path, folder / path.name))
        assert one.position == many.position
        assert one.scored == many.scored
        assert many.loss() == pytest.approx(one.loss(), abs=1e-6)
        for name, t in one.finish()[1].tensors().items():
            torch.testing.assert_close(many.finish()[1].tensors()[name], t, atol=1e-6, rtol=1e-5)
        assert (folder / path.name).stat().st_size == pytest.approx(path.stat().st_size, abs=100)


def interrupted(rank, words, pipe):
    """A text that comes through a pipe, whose writer interrupts the reader, and leaves the pipe open."""
    if rank == 0:
        reader = os.getpid()

        def write():
            with open(pipe, "wb") as file:
                file.write(TEXT)
                file.flush()
                os.kill(reader, signal.SIGTERM)
                threading.Event().wait(60)

        threading.Thread(target=write, daemon=True).start()
    return carry_out(rank, words)[0]


def test_an_interrupted_reading_is_saved_once_and_others_end_quietly(saved, tiny, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    book = tmp_path / "book.state"
    words = ["read", str(saved), str(tmp_path / "pipe"), "--save", str(book), "--precision", "float32"]
    first, other = run_ranks(interrupted, 2, words, str(tmp_path / "pipe"))
    assert first[0] == 130
    assert "interrupted within" in first[2]
    assert other == (0, "", "")
    assert Context.load(book, tiny, ByteTokenizer()).position >= 1


def test_an_interrupt_waits_for_the_end_of_a_call():
    """The others are in the middle of it then; afterwards they are told that there is nothing more."""
    told, done = [], []

    class Alone(Leading):
        def _tell(self, call):
            told.append(call)

    def reader(tokens, state):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        done.append(tokens)
        return tokens, state

    leading = Alone(reader, None)
    with pytest.raises(KeyboardInterrupt):
        leading(torch.zeros(1, 3, dtype=torch.int64))
    assert len(told) == len(done) == 1
    leading.dismiss()
    assert told[1:] == [None]


def test_what_cannot_be_read_is_said_by_one_rank(saved, tmp_path):
    words = ["read", str(saved), str(tmp_path / "none.txt"), "--save", str(tmp_path / "book.state")]
    first, other = run_ranks(carry_out, 2, words)
    assert first[0][0] == 2
    assert "none.txt" in first[0][2]
    assert other[0] == (0, "", "")
