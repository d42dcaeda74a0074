"""The boundary of the commands: what they refuse, and how whatever goes wrong ends."""

import errno
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import megalodon_lm
from megalodon_lm import ByteTokenizer, Generator, Megalodon
from megalodon_lm.cli import commands
from megalodon_lm.cli.main import main
from megalodon_lm.errors import InputError


class Raising:
    def __init__(self, error):
        self.error = error

    def run(self):
        raise self.error


def raised(call):
    with pytest.raises((RuntimeError, ValueError)) as found:
        call()
    return found.value


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InputError("of two\nlines"), 2, "megalodon: error: of two lines\n"),
        (ValueError("inner"), 1, "megalodon: ValueError: inner; this is a fault of megalodon"),
        (KeyError("x"), 1, "megalodon: KeyError: 'x'; this is a fault of megalodon"),
        (KeyboardInterrupt(), 130, "megalodon: interrupted\n"),
        (BrokenPipeError(), 141, ""),
        (MemoryError(), 2, "megalodon: error: not enough memory; lower training.batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "not enough memory; lower"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "not enough memory; lower"),
        (RuntimeError("could not create a primitive"), 2, "not enough memory; lower"),
        (raised(lambda: torch.empty(2**62, 2)), 2, "not enough memory; lower"),
        (raised(lambda: np.empty((2**62, 2))), 2, "not enough memory; lower"),
        (RuntimeError("sizes differ"), 1, "this is a fault of megalodon"),
        (OSError(errno.ENOSPC, "No space left on device", "x.state"), 2, "error: x.state: No space left on device\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "own.bin"), 1, "this is a fault of megalodon"),
    ],
)
def test_whatever_goes_wrong_ends_in_one_line(error, code, says, run, monkeypatch):
    monkeypatch.setattr(commands, "parse", lambda arguments: Raising(error))
    found, out, said = run()
    assert (found, out) == (code, "")
    assert says in said
    assert said.count("\n") == (said != "")


def test_the_debug_switch_shows_where(monkeypatch):
    monkeypatch.setattr(commands, "parse", lambda arguments: Raising(ValueError("inner")))
    monkeypatch.setenv("MEGALODON_DEBUG", "1")
    with pytest.raises(ValueError, match="inner"):
        main([])


def test_an_interrupt_while_modules_are_imported(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "megalodon_lm.cli.commands")
    monkeypatch.delattr("megalodon_lm.cli.commands")

    def interrupted(name, *rest):
        if name.startswith("megalodon_lm"):
            raise KeyboardInterrupt

    finder = type("Finder", (), {"find_spec": staticmethod(interrupted)})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    assert run("info") == (130, "", "megalodon: interrupted\n")


def test_the_version(run):
    assert run("--version") == (0, f"megalodon {megalodon_lm.__version__}\n", "")


def test_a_mistyped_command_names_the_nearest(refused):
    assert "no command 'qickstart'; did you mean 'quickstart'?; commands: quickstart, " in refused("qickstart")
    assert "did you mean 'train'" in refused("trian", "x")


def test_closed_full_and_broken_streams():
    command = [sys.executable, "-m", "megalodon_lm"]
    closed = ["sh", "-c", '"$@" <&- >&-', "sh", *command, "--version"]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        for run, output, code, says in (
            ([*command, "--version"], full, 2, "megalodon: error: No space left on device\n"),
            (closed, None, 0, ""),
            ([*command, "--version"], writer, 141, ""),
            ([*command, "info", "tiny"], writer, 141, ""),
        ):
            ended = subprocess.run(run, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
            assert (ended.returncode, ended.stderr) == (code, says)
    os.close(writer)


@pytest.mark.parametrize("device", ["cuda:99", "foo", "", "meta", "mps", "cpu:1"])
def test_devices_that_are_not_there(device, saved, tmp_path, refused):
    (tmp_path / "a.txt").write_text("words")
    for command in (
        ["generate", saved],
        ["read", saved, tmp_path / "a.txt", "--save", tmp_path / "a.state"],
        ["evaluate", "perplexity", saved, tmp_path / "a.txt"],
        ["train", "quickstart", "--out", tmp_path / "run"],
        ["quickstart", "--out", tmp_path / "run"],
    ):
        assert f"device {device!r}" in refused(*command, "--device", device)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model.size=5", "model.size = 5 must be the name of a size"),
        ("model.size=[1]", "model.size = [1] must be the name of a size"),
        ("model.chunk_size=1e12", "chunk_size = 1000000000000.0 must be of type int"),
        ("model.chunk_size=1000000000000", "chunk_size = 1000000000000 must be at most 2,147,483,647"),
        ("model.chunk_size=2000000000", "needs at least .* of memory; lower the sizes"),
        ("model.num_layers=1000000000", "num_layers = 1000000000 must be at most 10,000"),
        ("model.model_dim=2147483647", "norm_num_groups = 8 must divide model_dim = 2147483647; 1 does"),
        ("training.batch_size=1048576", "this training needs at least .* GB"),
        ("training.length=1000000000000000", "this training needs at least .* GB"),
        ("model.dropout=" + "[" * 3000, "is not valid TOML: it is nested too deep"),
        ("model.rope_base=0x" + "f" * 5000, "a number is too large, of more than 64 bits"),
        ("model=5", "unknown key ''"),
        ("training. steps=0", "training.steps = 0 must be at least 1"),
    ],
)
def test_changes_of_a_recipe_that_cannot_be(change, says, tmp_path, refused):
    (tmp_path / "r.toml").write_text('[model]\nsize = "small"\n')
    said = refused("train", tmp_path / "r.toml", "--out", tmp_path / "run", "--set", change)
    assert re.search(says if ".*" in says else re.escape(says), said), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"x = " + b"[" * 3000, "is not valid TOML: it is nested too deep"),
        (b"\xff\xfe", "is not valid TOML: it is not UTF-8 at byte 0"),
        (b"\x00" * 2_000_000, "has more than 1,048,576 bytes"),
        (b"x = " + b"1" * 5000, "a number is too large"),
        (b"x = 0x" + b"f" * 5000, "a number is too large, of more than 64 bits"),
        (b"model = 5", "model = 5 must be a table, [model]"),
        (None, "cannot read the recipe"),
    ],
)
def test_files_that_are_no_recipe(content, says, tmp_path, refused):
    path = tmp_path / "r.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    assert says in refused("train", path, "--out", tmp_path / "run")


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_size": -1}, {"chunk_size": 10**12}, {"chunk_size": "64"}, {"chunk_size": True}, {"num_layers": 10**9},
        {"norm_eps": float("nan")}, {"vocab_size": 2**31 - 1}, {"model_dim": 2**30, "norm_num_groups": 1},
        {"rope_base": float("inf")}, {"num_layers": None}, {"init_mode": []},
    ],
)  # fmt: skip
def test_configurations_that_no_model_can_have(changes, saved, tmp_path, refused):
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    config = json.loads((saved / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused("generate", tmp_path, "--prompt", "x")


def test_nothing_but_a_file_of_its_own_kind_is_written_over(saved, tmp_path, refused, run):
    text, model = tmp_path / "a.txt", tmp_path / "model"
    text.write_text("some words")
    model.mkdir()
    for path in saved.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    before = {path: path.read_bytes() for path in [text, *model.iterdir()]}
    for path in before:
        for command in (
            ["generate", model, "--prompt", "x", "--save", path],
            ["read", model, text, "--save", path],
            ["evaluate", "perplexity", model, text, "--json", path],
            ["bench", "--json", path],
            ["tokenizer", "train", text, "--out", path],
        ):
            assert f"cannot write {path}: it is" in refused(*command)
        assert "ends in .png" in refused("evaluate", "perplexity", model, text, "--plot", path)
    (tmp_path / "a.1.state").write_text("kept")
    assert "a.1.state: it is not a bookmark" in refused(
        "generate", model, "--samples", 2, "--save", tmp_path / "a.state"
    )
    context = Generator(Megalodon.load(model).eval(), ByteTokenizer()).read("words")
    with pytest.raises(InputError, match="is not a bookmark"):
        context.save(model / "config.json", ByteTokenizer())
    assert {path: path.read_bytes() for path in before} == before
    link = tmp_path / "link.state"
    link.symlink_to(tmp_path / "b.state")
    for prompt in "once", "twice":
        assert run("read", model, text, "--save", link)[0] == 0, prompt
    assert link.is_symlink()
    for _ in range(2):
        figures = tmp_path / "f.json"
        assert run("evaluate", "perplexity", model, text, "--contexts", 0, "--json", figures)[0] == 0


def test_no_tokenizer_is_learnt_from_nothing(tmp_path, refused):
    (tmp_path / "a.jsonl").write_text('{"body": "in another field"}\n')
    said = refused("tokenizer", "train", tmp_path / "a.jsonl", "--out", tmp_path / "tokenizer.json")
    assert re.search(r"there is no text in .*a\.jsonl; .*a\.jsonl, line 1: no text in the field 'text', left out", said)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_device_is_written_to_and_not_replaced(saved, tmp_path, run):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "a.txt").write_text("some words")
    arguments = ("evaluate", "perplexity", saved, tmp_path / "a.txt", "--contexts", 0, "--json", pipe)
    assert run(*arguments)[0] == 0
    assert json.loads(os.read(reader, 1 << 16))["bytes"] == 10
    os.close(reader)
    assert pipe.is_fifo()


def test_no_loss_is_shown_before_there_is_one(saved, tmp_path, run):
    (tmp_path / "a.txt").write_text("some words")
    _, out, said = run("read", saved, tmp_path / "a.txt", "--save", tmp_path / "a.state")
    assert "nats a token" in out
    assert "nan" not in out + said


def test_reading_needs_a_text(saved, tmp_path, refused):
    assert "no text given" in refused("read", saved, "--save", tmp_path / "a.state")


def test_results_go_to_standard_output_unbroken_and_progress_aside(saved, tmp_path, run):
    folder = tmp_path / "a long name of a folder that holds a text [bold]" / "[/and another one, longer than a line]"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("some words " * 5)
    code, out, said = run("evaluate", "perplexity", saved, folder / "a.txt", "--contexts", 16, 0)
    assert code == 0
    assert "bits per byte" in out
    assert "largest change" in out
    assert "cumulative norm statistics: 100 %" in said
    code, out, said = run("evaluate", "perplexity", saved, folder / "a.txt", "--contexts", 16, 0, "--quiet")
    assert (code, said) == (0, "")
    (folder / "b.jsonl").write_text('{"text": "words"}\n{\n')
    out = folder / "out"
    code, printed, said = run("prepare", folder / "b.jsonl", "--out", out, "--workers", 1)
    assert code == 0
    assert f"1 faults, listed in {out / 'faults.jsonl'}\n" in said
    assert printed.endswith(f"; {out}\n")


def test_a_text_that_the_output_cannot_show_is_finished(saved, tmp_path, monkeypatch):
    """With an output of cp1252, what it has no sign for becomes a question mark."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    main(["generate", str(saved), "--prompt", "鮫 é", "--max-tokens", "20", "--save", str(tmp_path / "a.state")])
    assert sys.stdout.buffer.getvalue().startswith(b"? \xe9")
    assert (tmp_path / "a.state").exists()


def test_a_prompt_is_the_bytes_that_were_given(saved, run):
    assert run("generate", saved, "--prompt", os.fsdecode(b"a\xffb"), "--max-tokens", 0)[0] == 0


def test_generated_text_as_json(saved, tiny, run):
    """Each token's log-probability is that of the whole text read at once."""
    arguments = ("generate", saved, "--prompt", "Once", "--max-tokens", 6, "--json", "--precision", "float32")
    code, out, _ = run(*arguments, "--samples", 2, "--seed", 3)
    found = json.loads(out)
    assert (code, found["prompt"], [s["seed"] for s in found["samples"]]) == (0, "Once", [3, 4])
    for sample in found["samples"]:
        tokens = torch.tensor([[256, *b"Once", *sample["tokens"]]])
        with torch.no_grad():
            scores = tiny(tokens)[0].double().log_softmax(-1)[0, 4:-1]
        expected = [row[token].item() for row, token in zip(scores, sample["tokens"], strict=True)]
        assert sample["logprobs"] == pytest.approx(expected, abs=1e-4)
        assert sample["finish_reason"] == "length"
        assert sample["text"] == bytes(t for t in sample["tokens"] if t < 256).decode("utf-8", "replace")
    alone = json.loads(run(*arguments, "--seed", 4)[1])
    assert alone["samples"] == found["samples"][1:]
    nothing = json.loads(run("generate", saved, "--max-tokens", 0, "--json")[1])
    assert nothing["samples"] == [{"seed": 0, "text": "", "tokens": [], "logprobs": [], "finish_reason": "length"}]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--evaluate-bytes", 1], ", the training length"),
        (["--minutes", "nan"], "--minutes nan must be positive and finite"),
        (["--minutes", "inf"], "--minutes inf must be positive and finite"),
    ],
)
def test_what_the_quickstart_cannot_do(options, says, tmp_path, refused):
    assert says in refused("quickstart", "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "name", "values"),
    [
        ("train r.toml --set a=1 b=2 --out o --set c=3", "set", ["a=1", "b=2", "c=3"]),
        ("train --set=a=1 r.toml --set=b=2", "set", ["a=1", "b=2"]),
        ("evaluate recall --train_distances 1 --quiet --train-distances 2 4", "train_distances", [1, 2, 4]),
        ("evaluate perplexity m text --contexts 16 --contexts 32", "contexts", [16, 32]),
        ("bench --lengths 64 --quick --lengths 128", "lengths", (64, 128)),
        ("generate m --stop a --prompt p --stop b c", "stop", ("a", "b", "c")),
    ],
)
def test_an_option_of_several_values_may_be_given_more_than_once(line, name, values):
    command = commands.parse(line.split())
    assert getattr(getattr(command, "task", command), name) == values
