"""A chat holds what was said, whatever comes in."""

import errno
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megalodon_lm import ByteTokenizer, Context
from megalodon_lm.cli.chat import Chat
from megalodon_lm.data.chat import Message, encode_chat
from megalodon_lm.errors import InputError
from megalodon_lm.generation.generator import Generator

from .processes import HANGS

PATIENCE = 10  # seconds of silence after which what was sent is taken for lost


@pytest.fixture
def talk(saved, monkeypatch, capsys, tmp_path):
    """Talks with the untrained model in this process; what was printed, and said on the side, a list of lines each."""
    monkeypatch.chdir(tmp_path)

    def run(typed, folder=saved, **options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        Chat(folder, **{"max_tokens": 3, "precision": "float32", **options}).run()
        printed = capsys.readouterr()
        return printed.out.splitlines(), printed.err.splitlines()

    return run


def positions(lines):
    return [int(match[1]) for match in re.finditer(r"^(\d+) tokens read", "\n".join(lines), re.MULTILINE)]


def test_a_byte_that_is_no_text_does_not_end_it(talk):
    out, _ = talk(b"caf\xe9\n/stats\n\xff\xfe\n/stats\n")
    first, second = positions(out)
    assert (first, second) == (1 + 6 + 1 + 3, first + 6 + 1 + 3)  # U+FFFD is three bytes


def test_wrong_commands_name_the_nearest_and_a_space_makes_text(talk):
    _, err = talk(b"/sav x\n/exit\n/xyzzy\n/save\n/fork a\tb\n")
    assert err[-5:] == [
        "no command /sav; did you mean '/save'?; /help lists the commands",
        "no command /exit; did you mean '/quit'?; /help lists the commands",
        "no command /xyzzy; /help lists the commands",
        "/save needs a name; /help lists the commands",
        "/fork needs a name; /help lists the commands",
    ]
    out, _ = talk(b" /sav x\n/stats\n/help\n")
    assert positions(out) == [1 + 6 + 1 + 3]
    assert any(line.startswith("/load NAME") for line in out)


def test_what_cannot_be_saved_or_loaded_is_one_line(talk, saved, tmp_path, monkeypatch):
    target = tmp_path / "model"
    shutil.copytree(saved, target)
    before = (target / "config.json").read_bytes()
    lines = [f"/save {target}/config.json", f"/save {target}", "/save no/x.state", f"/load {target}/config.json",
             "/load nothing", f"/load {target}", "/save good.state", "/stats"]  # fmt: skip
    out, err = talk("\n".join(["hello", *lines]).encode(), folder=target)
    assert len(err) == 2 + 6, err
    assert (target / "config.json").read_bytes() == before
    assert positions(out) == [1 + 6 + 3]
    assert out[-2] == "saved 10 tokens in good.state"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "saved 1 tokens" in talk(b"/save ~/home.state\n")[0][0]
    assert (tmp_path / "home.state").exists()


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device", "x.state")


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(talk, monkeypatch):
    stream, calls = Generator.stream, []

    def failing(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise InputError("the logits are not\nfinite")
        if len(calls) == 3:
            raise KeyboardInterrupt
        return stream(self, *arguments, **options)

    monkeypatch.setattr(Generator, "stream", failing)
    monkeypatch.setattr(Context, "save", full_disk)
    out, err = talk(b"one\n/stats\ntwo\n/stats\nthree\n/stats\n/save x.state\nfour\n/stats\n")
    assert positions(out)[:3] == [1 + 4 + 3] * 3
    assert positions(out)[3] == 8 + 5 + 3
    assert err[-3] == "the logits are not finite"
    assert err[-2].startswith("interrupted; the conversation is as it was")
    assert "No space left" in err[-1]


def test_roles_follow_the_record_and_read_what_chats_are_made_of(talk, saved, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    (folder / "run.json").write_text(json.dumps({"id": "x", "chats": True}))
    read, written = [], Context.read
    monkeypatch.setattr(Context, "read", lambda self, tokens: (read.append(tokens), written(self, tokens))[1])
    _, err = talk(b"Who?\n", folder=folder, system="Be brief.")
    tokens = np.concatenate(read)
    chat = [Message("system", "Be brief."), Message("user", "Who?"), Message("assistant", "")]
    expected, _ = encode_chat(chat, ByteTokenizer())
    assert tokens[: len(expected) - 1].tolist() == expected[:-1].tolist()
    assert tokens[-1] == ByteTokenizer.end
    assert len(tokens) <= len(expected) + 3
    assert not any("trained" in line for line in err)
    read.clear()
    talk(b"Who?\n", folder=folder, system="Be brief.", roles="no")
    assert ByteTokenizer().decode(np.concatenate(read)).startswith("Be brief.\n\nWho?\n")


@pytest.mark.parametrize(("record", "said"), [({"chats": False}, "on plain text"), ({}, "does not tell"), ([], "tell")])
def test_a_model_that_never_saw_a_chat_says_so(record, said, talk, saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    (folder / "run.json").write_text(json.dumps(record))
    assert said in talk(b"/quit\n", folder=folder)[1][0]
    assert len(talk(b"/quit\n", folder=folder, roles="no")[1]) == 1


@pytest.mark.parametrize("options", [{"top_k": -1}, {"min_p": 2.0}, {"top_p": 0.0}])
def test_sampling_is_checked(options, talk):
    with pytest.raises(InputError, match=next(iter(options))):
        talk(b"", **options)
    assert len(talk(b"hello\n", top_k=1, min_p=0.5)[0]) >= 1


@pytest.mark.skipif(os.name == "nt", reason="needs a terminal")
def test_in_a_terminal_an_interrupt_clears_the_line_and_a_second_one_leaves(saved):
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "megalodon_lm.cli.main", "chat", str(saved)]
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end)
    seen = b""

    def until(text, count=1, send=lambda: None):
        nonlocal seen
        late = time.monotonic() + HANGS
        send()
        while seen.count(text) < count:
            assert time.monotonic() < late, seen
            if select.select([terminal], [], [], PATIENCE)[0]:
                seen += os.read(terminal, 4096)
            else:
                send()

    def interrupt():
        """Sent again after a silence: one that comes between the prompt and the wait for a key is noticed then only.

        Python holds it back until something wakes that wait, and raises one KeyboardInterrupt for both.
        """
        process.send_signal(signal.SIGINT)

    try:
        until(b"> ")
        assert b"loading" in seen
        os.write(terminal, b"not sent")
        until(b"not sent")
        until(b"/save FILE keeps it", 1, interrupt)
        until(b"> ", 2)
        os.write(terminal, b"/stats\n")
        until(b"tokens read")
        assert b"1 tokens read" in seen, "the line was cleared"
        until(b"> ", 3)
        until(b"/save FILE keeps it", 2, interrupt)
        until(b"> ", 4)
        until(b"megalodon: interrupted", 1, interrupt)
        assert process.wait() == 130
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
        os.close(end)
