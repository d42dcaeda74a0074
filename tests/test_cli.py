"""The commands as real processes."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megalodon_lm import ModelConfig
from megalodon_lm.cli.commands import parse

from .processes import megalodon

ROOT = Path(__file__).parent.parent


def refused(*arguments, cwd=None, says):
    result = megalodon(*arguments, cwd=cwd)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.strip()
    assert re.search(says, line), line
    assert line.count("\n") == 0


COMMANDS = ("quickstart", "tokenizer", "prepare", "train", "read", "generate", "chat", "evaluate", "bench", "info")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command):
    result = megalodon(command, "--help")
    assert result.returncode == 0
    assert len(result.stdout) > 400


def test_quickstart_end_to_end(tmp_path):
    result = megalodon("quickstart", "--minutes", 0.03, "--evaluate-bytes", 2000, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "run"
    report = json.loads((folder / "report.json").read_text())
    assert report["parameters"] == ModelConfig.load(folder / "config.json").num_parameters
    assert report["train_bytes"] > 0
    assert set(report["baselines"]) == {"gzip", "xz", "bzip2"}
    assert 0 < report["bits_per_byte"] < 12
    assert report["bits_per_byte_by_context"].keys() >= {"8", "128", "512"}
    assert report["total_seconds"] > report["train_seconds"] > 0
    assert {p.name for p in folder.iterdir()} == {
        ".lock", "checkpoints", "config.json", "metrics.jsonl", "model.safetensors", "recipe.toml", "report.json",
        "report.md", "report.png", "run.json", "tokenizer_record.json",
    }  # fmt: skip
    refused("quickstart", "--out", "run", cwd=tmp_path, says="not empty")
    written = megalodon("generate", folder, "--prompt", "Once", "--max-tokens", 5)
    assert written.returncode == 0
    assert written.stdout.startswith("Once")


def test_from_text_to_a_model(tmp_path):
    """The way of docs/training.md: tokenizer, shards, training with validation and samples, and use."""
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"Once upon a time {i} the shark swam. " * 200)
    recipe = """
[model]
size = "tiny"
vocab_size = 300
[data]
train = ["corpus"]
tokenizer = "tokenizer.json"
validation = ["texts/0.txt"]
prompt = "Once"
[training]
length = 64
steps = 500
validate_steps = 2
validate_bytes = 1000
warmup_steps = 1
"""
    (tmp_path / "my.toml").write_text(recipe)
    for command in (
        ["tokenizer", "train", "texts", "--out", "tokenizer.json", "--vocab-size", 300],
        ["prepare", "texts", "--tokenizer", "tokenizer.json", "--out", "corpus", "--workers", 1],
        ["train", "my.toml", "--out", "run", "--set", "training.steps=4", "--tensorboard"],
    ):
        result = megalodon(*command, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["validation"] is None for r in records] == [True, False, True, False]
    assert (run / "samples.txt").read_text().count("Once") >= 2
    assert {"training.md", "training.png", "tokenizer.json", "checkpoints"} <= {p.name for p in run.iterdir()}
    assert any(p.name.startswith("events.out.tfevents") for p in run.iterdir())
    layers = json.loads(megalodon("info", run, "--layers", "--json").stdout)
    assert len(layers) == 2
    assert all(0 < layer["decay"] < 1 and layer["half_life"] > 0 for layer in layers)
    assert megalodon("generate", run, "--prompt", "Once upon", "--max-tokens", 5).stdout.startswith("Once upon")
    assert (
        "bits per byte" in megalodon("evaluate", "perplexity", run, "texts/1.txt", "--contexts", 0, cwd=tmp_path).stdout
    )
    refused("train", "my.toml", "--set", "training.stepz=3", cwd=tmp_path, says="did you mean 'steps'")
    refused("train", "my.toml", "--resume", "last", cwd=tmp_path, says="needs --out")
    refused("info", "tiny", "--layers", says="needs a model folder")


def test_generate_reads_a_file_and_standard_input(saved, tmp_path):
    (tmp_path / "prompt.txt").write_text("A prompt")
    options = ("--max-tokens", 8, "--seed", 3)
    by_file = megalodon("generate", saved, "--prompt-file", tmp_path / "prompt.txt", *options)
    by_stdin = megalodon("generate", saved, "--prompt-file", "-", *options, input="A prompt")
    by_option = megalodon("generate", saved, "--prompt", "A prompt", *options)
    assert "A prompt" + by_file.stdout == "A prompt" + by_stdin.stdout == by_option.stdout
    assert len(by_file.stdout) > 1


def test_a_bookmark_from_command_to_command(saved, tmp_path):
    """Read, look, read on, write several continuations, save one and go on from it."""
    (tmp_path / "one.txt").write_text("The first half, ")
    options = ("--max-tokens", 8, "--seed", 3)
    read = megalodon("read", saved, "one.txt", "--save", "a.state", cwd=tmp_path)
    assert read.returncode == 0, read.stderr
    assert "17 tokens" in read.stdout
    said = json.loads(megalodon("state", "show", "a.state", "--json", cwd=tmp_path).stdout)
    assert (said["position"], said["tokenizer"]) == (17, "bytes-259")
    megalodon(
        "read", saved, "-", "--state", "a.state", "--save", "b.state", cwd=tmp_path, input="and the second half of it."
    )
    whole = megalodon("generate", saved, "--prompt", "The first half, and the second half of it.", *options)
    parted = megalodon("generate", saved, "--state", "b.state", "--save", "c.state", *options, cwd=tmp_path)
    assert whole.stdout == "The first half, and the second half of it." + parted.stdout
    assert json.loads(megalodon("state", "show", "c.state", "--json", cwd=tmp_path).stdout)["position"] == 51
    forks = megalodon(
        "generate", saved, "--state", "b.state", "--samples", 2, "--save", "d.state", *options, cwd=tmp_path
    )
    assert forks.stdout.startswith(f"--- seed 3\n{parted.stdout}--- seed 4\n")
    assert (tmp_path / "d.1.state").read_bytes()
    assert (tmp_path / "d.2.state").read_bytes()


def test_interrupted_reading_keeps_what_was_read(saved, tmp_path):
    command = [sys.executable, "-m", "megalodon_lm", "read", saved, "-", "--save", tmp_path / "a.state"]
    reader = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    reader.stdin.write("word " * 40_000)
    reader.stdin.flush()  # returns when the pipe holds the last of it: the rest has been taken from there, and read
    reader.send_signal(signal.SIGINT)
    out, _ = reader.communicate()
    assert reader.returncode == 130
    assert re.search(r"a\.state: [\d,]+ tokens", out)
    said = json.loads(megalodon("state", "show", tmp_path / "a.state", "--json").stdout)
    assert said["position"] > 50_000  # all but what the pipe and one read of it hold


def test_chat_forks_saves_and_comes_back(saved, tmp_path):
    lines = ["Hello there", "/fork x", "More", "/save b.state", "/load x", "More", "/stats", "/nonsense"]
    lines += ["/load b.state", "/stats", "/quit", "not read"]
    result = megalodon("chat", saved, "--max-tokens", 12, input="\n".join(lines), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = re.findall(r"(\d+) tokens read", result.stdout)
    assert first == second, "the same words from the same point give the same answer"
    said = json.loads(megalodon("state", "show", tmp_path / "b.state", "--json").stdout)
    assert str(said["position"]) == second
    assert "no command /nonsense" in result.stderr


def test_evaluate_perplexity_writes_its_figures(saved, tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 50)
    out = tmp_path / "figures.json"
    result = megalodon("evaluate", "perplexity", saved, tmp_path / "text.txt", "--contexts", 16, 0, 9999,
                       "--norm-statistics", "both", "--json", out, "--plot", tmp_path / "figures.png")  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(out.read_text())
    for norms in ("cumulative", "windowed"):
        assert list(figures[norms]["bits_per_byte_by_context"]) == ["16", "550"]
    assert figures["cumulative"] != figures["windowed"]
    assert (tmp_path / "figures.png").stat().st_size > 10_000
    assert "largest change" in result.stdout


def test_info_prints_json():
    found = json.loads(megalodon("info", "mega7.3B", "--json").stdout)
    assert found["parameters"] == 7_385_817_088
    assert found["state_bytes"] > 0
    assert found["flops_per_token"] > 2 * (7_385_817_088 - 32_000 * 4096) * 0.99


def test_bad_input_ends_in_one_line(saved, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "wrong.toml").write_text("[training]\nlearning_rat = 1.0\n")
    (tmp_path / "broken.toml").write_text("[training\n")
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    (truncated / "config.json").write_bytes((saved / "config.json").read_bytes())
    (truncated / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-100])
    refused("info", "mega7B", says="unknown size 'mega7B'.*did you mean")
    refused("train", "missing.toml", cwd=tmp_path, says="cannot read the recipe missing.toml")
    refused("train", "wrong.toml", cwd=tmp_path, says="did you mean 'learning_rate'")
    refused("train", "broken.toml", cwd=tmp_path, says="not valid TOML")
    refused("generate", tmp_path, says="config.json is missing")
    refused("generate", truncated, says="model.safetensors.*truncated")
    refused("evaluate", "perplexity", saved, "missing.txt", cwd=tmp_path, says="no such file: missing.txt")
    refused("evaluate", "perplexity", saved, tmp_path / "empty.txt", says="is empty")
    refused("generate", saved, "--temperature", "-1", says="temperature")
    refused("generate", saved, "--state", tmp_path / "none.state", says="no state file")
    refused("state", "show", tmp_path / "empty.txt", says="not a readable state file")
    refused("read", saved, tmp_path / "missing.txt", "--save", tmp_path / "a.state", says="no such file")
    refused("read", saved, "bundled:validation", "--save", tmp_path / "none" / "a.state", says="cannot write")
    refused("evaluate", "perplexity", saved, "--window-length", "9", says="at most first = 8")
    assert not (tmp_path / "runs").exists()


def test_readme_shows_the_two_commands_first():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL)
    commands = [line.strip() for block in blocks for line in block.splitlines()]
    assert commands[:2] == ["pip install . && megalodon quickstart", 'pip install ".[test]" && pytest']


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_documented_commands_and_links_exist(page):
    """Every `megalodon ...` line parses, and every relative link leads somewhere."""
    text = (ROOT / page).read_text()
    for line in re.findall(r"^\s*(?:\$ )?megalodon (.+)", text, re.MULTILINE):
        arguments = shlex.split(line, comments=True)
        ends = [at for at, word in enumerate(arguments) if word in ("|", ">", "&&")]
        if not arguments[0].startswith("--"):
            assert parse(arguments[: min(ends, default=None)]), line
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), link
