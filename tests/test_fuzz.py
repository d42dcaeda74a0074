"""A user's mistake, a damaged file or a full disk never ends in a traceback, nor does it hang.

Each case runs a command in a forked child, in a folder of its own that holds a model, a bookmark, a tokenizer, texts, a
prepared corpus and a run. A failure prints the seed of its case: pytest -m slow tests/test_fuzz.py --fuzz-seed 123
runs that one alone.
"""

import dataclasses
import gzip
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import get_args

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.cli.commands import COMMANDS, Command
from megalodon_lm.cli.main import main
from megalodon_lm.training.recipe import DataRecipe, TrainingRecipe

from .processes import HANGS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("always::megalodon_lm.errors.InputNote"),  # what commands say in one line
]
SECONDS = 20  # until a case is interrupted; it must end then
FINE = (0, 2, 130, 141)

RECIPE = """
[model]
size = "tiny"
num_layers = 1
model_dim = 16
z_dim = 8
value_dim = 16
ffn_hidden_dim = 16
cema_ndim = 2
chunk_size = 16
[data]
train = ["corpus", "text.txt"]
validation = ["text.txt"]
prompt = "Once"
[training]
length = 16
batch_size = 2
steps = 2
warmup_steps = 1
validate_steps = 1
validate_bytes = 50
"""
WORDS = RECIPE.replace('"corpus", ', "").replace("[training]", 'tokenizer = "tokenizer.json"\n[training]')
WORDS = WORDS.replace("[data]", "vocab_size = 270\n[data]")
CLASSES = """
[model]
size = "encoder_tiny"
[data]
train = ["pictures.npz"]
validation = ["pictures.npz"]
[training]
steps = 2
batch_size = 4
warmup_steps = 1
validate_steps = 1
"""
ODD = [
    "", " ", "-", "--", "-1", "0", "1", "2", "1.5", "1e308", "-1e308", "1e400", "nan", "inf", "-inf", "true", "None",
    "[]", "{}", "[", "99999999999999999999", "4294967296", "0x10", "\u0663", "\u00e9\n", "\x1b[31m", "[/b]", "{x}",
    "%s", os.fsdecode(b"\xff"), "a" * 300, "a" * 5000, ".", "..", "missing", "missing/x", "folder", "loop", "text.txt",
    "text.txt/x", "empty.txt", "model", "model/config.json", "model/model.safetensors", "run", "run/metrics.jsonl",
    "corpus", "book.state", "tokenizer.json", "lines.jsonl", "recipe.toml", "noise.bin", "/dev/null", "/dev/full",
    "bytes", "bpe:300", "bpe:x", "bundled:nothing", "auto", "cuda", "cpu", "tiny", "x.png", "x.json", "x.foo",
]  # fmt: skip
ODD_TOML = [
    "0", "1", "-1", "3", "1e308", "-0.0", "nan", "inf", "-inf", "true", '""', '"x"', "[]", "[1]", '["text.txt"]', "{}",
    "1979-05-27", "9223372036854775807", "99999999999999999999", "0xffffffffffffffffffff", '"\\u0000"', '["\\u0000"]',
    '"model"', '"missing"', '"tokenizer.json"', '"bpe:270"', '["missing"]', '["folder"]', '["empty.txt"]', '["corpus"]',
    '["text.txt", "text.txt"]', "[1.0, 2.0]", "[nan, 1.0]", "[[[]]]", '"stop"', '"shuffled"', '"constant"',
    "2000000000",
]  # fmt: skip
FITTING = {
    int: ["0", "1", "2", "3", "7", "16", "-1", "270", "2000000000", "9223372036854775807"],
    float: ["0.0", "0.5", "1.0", "1e-300", "1e308", "-1.0", "inf", "nan", "2"],
    bool: ["true", "false"],
    str: ['""', '"x"', '"model"', '"bpe:270"', '"linear"', '"wsd"', '"skip"', '"rewind"', '"bf16"', '"muon"', '"bert"'],
    list: [v for v in ODD_TOML if v.startswith("[")],
}
"""Of the type that a setting has."""
ODD_JSON = [None, True, 0, -1, 1.5, 1e400, float("nan"), 10**30, "", "x", [], [1], {}, {"x": 1}, 2**31, "\u0000"]

USUAL = {
    "quickstart": ["--minutes", "0.001", "--evaluate-bytes", "1500", "--out", "new"],
    "tokenizer": ["train", "text.txt", "--out", "new.json", "--vocab-size", "270"],
    "prepare": ["text.txt", "lines.jsonl", "--out", "new", "--workers", "1"],
    "train": ["recipe.toml", "--out", "new"],
    "read": ["model", "text.txt", "--save", "new.state"],
    "generate": ["model", "--prompt", "Once", "--max-tokens", "3"],
    "chat": ["model", "--max-tokens", "3"],
    "state": ["show", "book.state"],
    "evaluate": ["perplexity", "model", "text.txt", "--contexts", "8", "0"],
    "compare": ["compare_tiny", "--out", "runs", "--report", "new"],
    "classify": ["train", "classes.toml", "--out", "new"],
    "bench": ["--quick", "--model", "tiny", "--peers", "itself", "--measures", "decode", "--lengths", "16"],
    "info": ["model"],
    "plan": ["--model", "tiny", "--context", "64", "--gpus", "2"],
    "convert": ["model", "--to", "official", "--out", "new"],
}
"""A command line of each command that succeeds, and takes little."""
USES = {
    "model/": [
        ["generate", "model", "--prompt", "Once", "--max-tokens", "2"], ["info", "model"],
        ["info", "model", "--layers"], ["read", "model", "text.txt", "--save", "n"],
        ["generate", "model", "--state", "book.state", "--max-tokens", "2"],
        ["evaluate", "perplexity", "model", "text.txt", "--contexts", "0"], ["chat", "model", "--max-tokens", "2"],
        ["train", "recipe.toml", "--out", "new", "--set", "training.begin_from=model"],
        ["convert", "model", "--to", "official", "--out", "new"], ["plan", "--model", "model", "--context", "64"],
    ],
    "book.state": [
        ["state", "show", "book.state"], ["generate", "model", "--state", "book.state", "--max-tokens", "2"],
        ["read", "model", "text.txt", "--state", "book.state", "--save", "book.state"],
        ["chat", "model", "--state", "book.state", "--max-tokens", "2"],
    ],
    "tokenizer.json": [
        ["prepare", "text.txt", "--tokenizer", "tokenizer.json", "--out", "new", "--workers", "1"],
        ["train", "words.toml", "--out", "new"], ["train", "words.toml", "--out", "run", "--resume", "last"],
    ],
    "corpus/": [
        ["train", "recipe.toml", "--out", "new"], ["prepare", "text.txt", "--out", "corpus", "--workers", "1"],
    ],
    "run/": [
        ["train", "words.toml", "--out", "run", "--resume", "last", "--set", "training.steps=3"],
        ["train", "words.toml", "--out", "run", "--resume", "auto", "--set", "training.steps=3"],
        ["generate", "run", "--prompt", "Once", "--max-tokens", "2"], ["info", "run", "--layers"],
        ["train", "words.toml", "--out", "run"], ["chat", "run", "--max-tokens", "2"],
    ],
    "text.txt": [
        ["read", "model", "text.txt", "--save", "n.state"], ["train", "recipe.toml", "--out", "new"],
        ["prepare", "text.txt", "--out", "new", "--workers", "1"], ["evaluate", "compressors", "text.txt"],
        ["tokenizer", "train", "text.txt", "--out", "new.json", "--vocab-size", "270"],
        ["generate", "model", "--prompt-file", "text.txt", "--max-tokens", "2"],
        ["evaluate", "perplexity", "model", "text.txt", "--contexts", "0", "--json", "new.json"],
    ],
    "lines.jsonl": [
        ["prepare", "lines.jsonl", "--out", "new", "--workers", "1"],
        ["read", "model", "lines.jsonl", "--save", "n.state"],
        ["tokenizer", "train", "lines.jsonl", "--out", "new.json", "--vocab-size", "270"],
        ["prepare", "lines.jsonl", "--out", "new", "--workers", "1", "--chats"],
    ],
    "text.txt.gz": [
        ["prepare", "text.txt.gz", "--out", "new", "--workers", "1"],
        ["read", "model", "text.txt.gz", "--save", "n.state"],
    ],
    "lines.jsonl.zst": [["prepare", "lines.jsonl.zst", "text.txt", "--out", "new", "--workers", "1"]],
    "table.parquet": [
        ["prepare", "table.parquet", "lines.jsonl", "--out", "new", "--workers", "1"],
        ["tokenizer", "train", "table.parquet", "--out", "new.json", "--vocab-size", "270"],
        ["read", "model", "table.parquet", "--save", "n.state"],
    ],
    "pictures.npz": [["classify", "train", "classes.toml", "--out", "new"]],
    "classes/": [
        ["classify", "evaluate", "classes", "pictures.npz"], ["classify", "predict", "classes", "noise.bin"],
        ["classify", "train", "classes.toml", "--out", "classes", "--resume", "auto", "--set", "training.steps=3"],
    ],
    "recipe.toml": [
        ["train", "recipe.toml", "--out", "new"], ["info", "recipe.toml"],
        ["plan", "--model", "recipe.toml", "--context", "64"],
    ],
}  # fmt: skip
"""What reads each file or folder."""


def call(arguments, seconds=SECONDS, largest_file=None):
    """Run a command in a forked child: its exit code, and all it printed. It is interrupted when its time is over."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setpgid(0, 0)
            os.dup2(os.open("lines.jsonl" if os.path.isfile("lines.jsonl") else os.devnull, os.O_RDONLY), 0)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.close(reader)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", 1)  # noqa: SIM115
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
            main(arguments)
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(writer)
    printed, began, interrupted = b"", time.monotonic(), False
    while True:
        if select.select([reader], [], [], 0.2)[0]:
            piece = os.read(reader, 1 << 16)
            printed += piece
            if not piece:
                break
        took = time.monotonic() - began
        if took > seconds and not interrupted:
            interrupted = True
            os.kill(child, signal.SIGINT)
        if took > seconds + HANGS:
            os.killpg(child, signal.SIGKILL)
            break
    os.close(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, printed.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder that each case gets a copy of."""
    world = tmp_path_factory.mktemp("world")
    before = Path.cwd()
    os.chdir(world)
    torch.set_num_threads(1)
    (world / "text.txt").write_text("Once upon a time the shark swam, and caf\u00e9 it was.\n" * 8, encoding="utf-8")
    (world / "text.txt.gz").write_bytes(gzip.compress((world / "text.txt").read_bytes()))
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes."}]
    (world / "lines.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i}", "messages": chat}) + "\n" for i in range(9))
    )
    (world / "empty.txt").touch()
    (world / "noise.bin").write_bytes(random.Random(0).randbytes(3000))
    (world / "folder").mkdir()
    (world / "loop").symlink_to("loop")
    (world / "recipe.toml").write_text(RECIPE)
    (world / "words.toml").write_text(WORDS)
    (world / "classes.toml").write_text(CLASSES)
    numpy.savez("pictures.npz", images=numpy.arange(768, dtype=numpy.uint8).reshape(12, 8, 8), labels=[0, 1, 2] * 4)
    table = pyarrow.table({"text": ["Once upon a time", "the shark swam", "\u00e9"] * 9})
    pyarrow.parquet.write_table(table, "table.parquet", row_group_size=5)
    (world / "lines.jsonl.zst").write_bytes(zstandard.compress((world / "lines.jsonl").read_bytes()))
    shape = dict(num_layers=1, model_dim=16, z_dim=8, value_dim=16, ffn_hidden_dim=16, cema_ndim=2, chunk_size=16)
    torch.manual_seed(0)
    Megalodon(ModelConfig.named("tiny", **shape)).save("model")
    for command in (  # in this process, so that the children have all modules and kernels
        ["prepare", "text.txt", "--out", "corpus", "--workers", "1"],
        ["tokenizer", "train", "text.txt", "--out", "tokenizer.json", "--vocab-size", "270"],
        ["read", "model", "text.txt", "--save", "book.state"],
        ["generate", "model", "--prompt", "Once", "--max-tokens", "3"],
        ["evaluate", "perplexity", "model", "text.txt", "--contexts", "8", "0"],
        ["train", "words.toml", "--out", "run", "--set", "training.checkpoint_steps=1"],
        ["classify", "train", "classes.toml", "--out", "classes"],
    ):
        main(command)
    yield world
    os.chdir(before)


def damage(path, rng):
    """Harm a file in one of many ways; what was done."""
    raw = path.read_bytes()
    ways = ["truncate", "empty", "flip", "append", "insert", "noise", "other", "unreadable"]
    ways += ["folder", "gone", "broken link", "loop"]
    if path.suffix in (".json", ".jsonl", ".state", ".safetensors"):
        ways += ["value"] * 6
    way = rng.choice(ways)
    if way in ("folder", "gone", "broken link", "loop"):
        path.unlink()
        if way == "folder":
            path.mkdir()
        elif way != "gone":
            path.symlink_to(path.name if way == "loop" else "nowhere")
        return way
    if way == "unreadable":  # but to the superuser
        path.chmod(0)
        return way
    at = rng.randrange(len(raw) + 1)
    if way == "truncate":
        raw = raw[:at]
    elif way == "empty":
        raw = b""
    elif way == "flip" and raw:
        for _ in range(rng.choice([1, 1, 20])):
            at = rng.randrange(min(len(raw), rng.choice([100, 1000, len(raw)])))
            raw = raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
    elif way == "append":
        raw += rng.randbytes(rng.choice([1, 100]))
    elif way == "insert":
        raw = raw[:at] + rng.choice([b"\0", b"\n", b"\xff", b"{", b"[" * 5000, b"9" * 5000, b'"']) + raw[at:]
    elif way == "noise":
        raw = rng.randbytes(rng.choice([1, 7, 8, 100, 5000]))
    elif way == "other":
        raw = rng.choice([p for p in sorted(Path().rglob("*")) if p.is_file()]).read_bytes()
    elif way == "value":
        raw = with_another_value(raw, path.suffix, rng)
    path.write_bytes(raw)
    return way


def with_another_value(raw, suffix, rng):
    """JSON, or a safetensors header, with one value replaced or left out."""
    head, body, end = b"", raw, b""
    if suffix in (".state", ".safetensors"):
        size = int.from_bytes(raw[:8], "little")
        body, end = raw[8 : 8 + size], raw[8 + size :]
    elif suffix == ".jsonl":
        body, newline, end = raw.partition(b"\n")
        end = newline + end
    try:
        tree = json.loads(body)
    except ValueError:
        return raw
    spots = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            spots.append((node, key))
            walk(node[key])

    walk(tree)
    if not spots or rng.random() < 0.05:
        tree = rng.choice(ODD_JSON)
    else:
        node, key = rng.choice(spots)
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = rng.choice(ODD_JSON)
    body = json.dumps(tree).encode("utf-8", "surrogatepass")
    if suffix in (".state", ".safetensors"):
        head = len(body).to_bytes(8, "little")
    return head + body + end


def command_line(rng):
    """A command that works, with values and options changed, left out and put in."""
    name, kind = rng.choice([(a[1].name, a[0]) for a in map(get_args, get_args(Command))])
    if name == "bench" and rng.random() < 0.8:
        name, kind = "info", None
    arguments = list(USUAL[name])
    options = [f.name for f in dataclasses.fields(kind)] if kind else ["layers", "json"]
    if name == "evaluate":
        options = ["contexts", "norm_statistics", "window_first", "window_every", "precision", "json", "plot", "device"]
    for _ in range(rng.choice([1, 1, 2, 3])):
        way = rng.choice(["value", "option", "option", "drop", "swap"])
        if way == "value" and arguments:
            arguments[rng.randrange(len(arguments))] = rng.choice(ODD)
        elif way == "option" and options:
            arguments += [f"--{rng.choice(options).replace('_', '-')}", rng.choice(ODD)][: rng.choice([1, 2, 2, 2])]
        elif way == "drop" and arguments:
            del arguments[rng.randrange(len(arguments))]
        elif arguments:
            rng.shuffle(arguments)
    if name == "bench":
        arguments += ["--lengths", rng.choice(["0", "x"])]  # it must not get to measuring
    return [rng.choice(ODD) if rng.random() < 0.02 else name, *arguments]


def recipe_text(rng):
    """A recipe, harmed as a text or in its values."""
    text = RECIPE
    for _ in range(rng.choice([1, 1, 2, 3])):
        if rng.random() < 0.3:
            at, width = rng.randrange(len(text)), rng.choice([0, 1, 10])
            text = (
                text[:at]
                + rng.choice(["", "[", "]", '"', "=", "\n", "\0", "#", "9" * 400, ".", "\ud7ff"])
                + text[at + width :]
            )
            continue
        table = rng.choice(["model", "data", "training"])
        kind = {"model": ModelConfig, "data": DataRecipe, "training": TrainingRecipe}[table]
        keys = [f.name for f in dataclasses.fields(kind) if f.name != "compile"]  # which takes a minute
        key = rng.choice([*keys, "size"] if table == "model" else keys)
        values = ODD_TOML if rng.random() < 0.3 else FITTING[type(getattr(kind(), key, ""))]
        lines = [line for line in text.split("\n") if not line.startswith(f"{key} =")]
        where = lines.index(f"[{table}]") + 1 if f"[{table}]" in lines else len(lines)
        text = "\n".join([*lines[:where], f"{key} = {rng.choice(values)}", *lines[where:]])
    return text


def case(seed):
    """Prepare the present folder for a case.

    Returns:
        The command, the largest file it may write or None, and what was done.
    """
    rng = random.Random(seed)
    kind = "full disk" if seed % 16 == 15 else ("command line", "recipe", "file")[seed % 3]
    if kind == "command line":
        return command_line(rng), None, kind
    if kind == "recipe":
        Path("recipe.toml").write_text(recipe_text(rng), encoding="utf-8")
        return ["train", "recipe.toml", "--out", "new"], None, kind
    if kind == "full disk":
        usual = [[name, *USUAL[name]] for name in ("tokenizer", "prepare", "train", "read")]
        command = rng.choice([USES["run/"][1], *usual])
        return command, rng.choice([0, 10, 300, 1000, 5000, 20_000]), kind
    place = rng.choice(sorted(USES))
    files = [Path(place)] if not place.endswith("/") else sorted(p for p in Path(place).rglob("*") if p.is_file())
    path = rng.choice(files)
    return rng.choice(USES[place]), None, f"{damage(path, rng)}: {path}"


def faults(code, printed):
    """What is wrong with how a command ended."""
    if code not in FINE:
        yield f"exit code {code}"
    for sign in ("Traceback", "this is a fault of megalodon", "Exception ignored"):
        if sign in printed:
            yield sign


def test_every_command_is_tried():
    assert set(USUAL) == set(COMMANDS)


@pytest.mark.slow
def test_nothing_ends_in_a_traceback(world, tmp_path, request):
    only = request.config.getoption("--fuzz-seed")
    found = []
    for seed in [only] if only is not None else range(1050):
        folder = tmp_path / str(seed) / "place"  # a folder of its own around it, for ".."
        shutil.copytree(world, folder, symlinks=True)
        os.chdir(folder)
        command, largest, done = case(seed)
        code, printed = call(command, largest_file=largest)
        if only is not None:
            print(command, done, code, printed)
        if wrong := list(faults(code, printed)):
            found.append(f"seed {seed}, {done}: {command} {wrong}\n{printed[-1500:]}")
        os.chdir(world)
        shutil.rmtree(folder.parent)
    assert not found, "\n".join([f"{len(found)} failures", *found])
