"""Reading and writing: the same tokens however the text came in, wherever it was cut, and whoever sits beside it."""

import copy
import io
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from megalodon_lm import ByteTokenizer, Megalodon, ModelConfig, State
from megalodon_lm.data.subword import SubwordTokenizer
from megalodon_lm.errors import InputError
from megalodon_lm.generation import context as context_module
from megalodon_lm.generation.context import Context, bookmark_bytes, describe, unit_length
from megalodon_lm.generation.engine import DecodingEngine
from megalodon_lm.generation.generator import Generator
from megalodon_lm.generation.sampling import Sampling, sample
from megalodon_lm.state_file import OLDER_FORMAT, StateFile
from megalodon_lm.training.recipe import Recipe
from megalodon_lm.training.trainer import Trainer

from .reading import GREEDY, SEEDED, TEXT, in_blocks, written
from .test_tokenizers import FILES


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(context_module, "MAX_PIECE_LENGTH", 128)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("size", [1, 100, 3000])
def test_any_source_in_any_blocks_gives_the_same_tokens(generator, short_pieces, tmp_path, sampling, size):
    text = TEXT[: 300 if size == 1 else None]
    string = text.decode("utf-8", "ignore")
    text = string.encode()
    path = tmp_path / "text.txt"
    path.write_bytes(text)
    sources = [text, string, path, io.BytesIO(text), in_blocks(text, size), in_blocks(string, size)]
    found = [written(generator, generator.read(source), sampling) for source in sources]
    assert all(tokens == found[0] for tokens in found[1:])


@pytest.mark.parametrize("begins", [True, False])
def test_a_text_begins_as_those_the_model_learnt_from(generator, begins):
    """And if it is empty, there is still something to go on from."""

    class Told(ByteTokenizer):
        pass

    Told.begins = begins
    other = Generator(generator.model, Told(), generator.precision)
    assert other.read(b"ab").position == 2 + begins
    assert other.read([b"ab", b"c"]).position == generator.read([b"ab", b"c"]).position - (not begins)
    assert other.read(b"").last == Told.begin
    assert written(other, other.read(b""), GREEDY) == written(generator, generator.read(b""), GREEDY)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("sampling", [GREEDY, pytest.param(SEEDED, marks=pytest.mark.slow)], ids=["greedy", "seeded"])
def test_a_bookmark_goes_on_as_if_the_text_had_been_read_in_one_go(generator, short_pieces, tmp_path, sampling, every):
    whole = generator.read(TEXT)
    expected, loss = written(generator, whole.fork(), sampling), whole.loss()
    rng = random.Random(0)
    for number, at in enumerate([0, 1, len(TEXT), *(rng.randrange(len(TEXT)) for _ in range(10))]):
        sizes = (64, 999, 1 << 20)
        for size in sizes if every else sizes[number % 3 :][:1]:
            first = generator.read(in_blocks(TEXT[:at], size))
            first.save(tmp_path / "book.state", generator.tokenizer)
            context = Context.load(tmp_path / "book.state", generator.model, generator.tokenizer)
            generator.read(in_blocks(TEXT[at:], size), context)
            assert context.position == len(TEXT) + 1
            assert context.loss() == loss
            assert written(generator, context, sampling) == expected


def test_a_bookmark_goes_on_in_another_process(generator, tmp_path):
    generator.model.save(tmp_path / "model")
    (tmp_path / "rest.txt").write_bytes(TEXT[4500:])
    generator.read(TEXT[:4500]).save(tmp_path / "book.state", generator.tokenizer)
    code = f"""
from pathlib import Path
from megalodon_lm import ByteTokenizer, Megalodon
from megalodon_lm.generation.context import Context
from megalodon_lm.generation.generator import Generator
from megalodon_lm.generation.sampling import Sampling
from megalodon_lm.state_file import StateFile
generator = Generator(Megalodon.load("model").eval(), ByteTokenizer())
context = Context.load("book.state", generator.model, generator.tokenizer)
generator.read(Path("rest.txt"), context)
print([delta.token for delta in generator.stream([context], {SEEDED!r})])
left_open = generator.stream([context], {SEEDED!r})  # to the exit, which must be a clean one
next(left_open)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.strip() == str(written(generator, generator.read(TEXT), SEEDED))


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_batch_equals_single_runs_token_by_token(generator, sampling):
    rng = random.Random(1)
    lengths = [1, 5000, 4096, 4095, 64, 63, *(rng.randrange(1, 5000) for _ in range(10))]
    contexts = [generator.read(TEXT[:n]) for n in lengths]
    alone = [written(generator, context.fork(), sampling) for context in contexts]
    together = [[] for _ in contexts]
    for delta in generator.stream(contexts, sampling):
        together[delta.row].append(delta.token)
    assert together == alone


def test_forks_go_their_own_ways_and_leave_the_trunk_alone(generator):
    trunk = generator.read(TEXT[:1000])
    position = trunk.position
    forks = [trunk.fork() for _ in range(3)]
    texts = generator.write(forks, SEEDED, seeds=[3, 4, 5])
    assert len(set(texts)) == 3
    assert trunk.position == position
    assert generator.write([trunk.fork()], SEEDED)[0] == texts[0]


def test_what_was_written_is_part_of_the_context(generator, short_pieces):
    context = generator.read(TEXT[:1000])
    tokens = written(generator, context, SEEDED)
    assert context.position == 1001 + len(tokens)
    again = Context(generator.model)
    again.read(np.concatenate([generator.tokenizer.encode(TEXT[:1000], begin=True), tokens]))
    assert written(generator, context, SEEDED) == written(generator, again, SEEDED)


def test_leaving_early_keeps_what_was_written_so_far(generator):
    context = generator.read(TEXT[:100])
    stream = generator.stream([context], SEEDED)
    next(stream), next(stream)
    stream.close()
    assert context.position == 103


def test_loss_is_that_of_the_model(generator, short_pieces):
    context = generator.read(TEXT[:2000])
    tokens = torch.from_numpy(generator.tokenizer.encode(TEXT[:2000], begin=True))
    with torch.no_grad():
        logits, _ = generator.model(tokens[None])
    nats = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[1:], reduction="none")
    assert context.scored == 1920
    assert context.loss(complete=False) == pytest.approx(nats[:1920].mean().item(), rel=2e-3)
    assert context.loss() == pytest.approx(nats.mean().item(), rel=2e-3)
    assert context.scored == 1920


def scripted(generator, text, monkeypatch, last=ByteTokenizer.end):
    """Let the model say this text, or these tokens."""
    ids = iter([*(text.encode() if isinstance(text, str) else text), last])
    monkeypatch.setattr(
        "megalodon_lm.generation.generator.sample", lambda logits, *_: torch.tensor([next(ids)] * len(logits))
    )


@pytest.mark.parametrize(
    ("stop", "expected", "reason"),
    [
        ((), "abcabdéf", "end"),
        (("abd",), "abc", "stop"),
        (("abd", "ca"), "ab", "stop"),
        (("f!",), "abcabdéf", "end"),
        (("é",), "abcabd", "stop"),
    ],
)
def test_stop_strings_never_show_even_in_part(generator, monkeypatch, stop, expected, reason):
    scripted(generator, "abcabdéf", monkeypatch)
    shown, deltas = "", list(generator.stream([generator.read("x")], Sampling(max_tokens=50, stop=stop)))
    for delta in deltas:
        shown += delta.text
        assert expected.startswith(shown)
    assert (shown, deltas[-1].finish_reason) == (expected, reason)


@pytest.mark.parametrize("last", [ByteTokenizer.begin, ByteTokenizer.end])
def test_a_text_ends_where_training_ended_it(generator, monkeypatch, last):
    """Behind a document of plain text comes the begin token of the next one, behind a message the end token."""
    scripted(generator, "abc", monkeypatch, last)
    context = generator.read("x")
    deltas = list(generator.stream([context], Sampling(max_tokens=50)))
    assert ("".join(delta.text for delta in deltas), deltas[-1].finish_reason) == ("abc", "end")
    assert context.position == 5


def test_a_model_trained_on_whole_documents_ends_them(tmp_path):
    """It learns a poem by heart and says it to its end, not on into nothing."""
    poem = "Roses are red.\n"
    documents = tmp_path / "poems"
    documents.mkdir()
    for number in range(8):
        (documents / f"{number}.txt").write_text(poem)
    recipe = Recipe.from_dict(
        {
            "model": {"size": "tiny"},
            "data": {"train": [str(documents)]},
            "training": {"length": 32, "batch_size": 1, "steps": 80, "warmup_steps": 5, "learning_rate": 1e-2,
                         "precision": "float32"},
        }
    )  # fmt: skip
    trainer = Trainer(recipe, tmp_path / "run")
    trainer.train()
    generator = Generator(trainer.model.eval(), trainer.tokenizer, "float32")
    deltas = list(generator.stream([generator.read("Ro")], Sampling(max_tokens=100, temperature=0)))
    assert ("".join(delta.text for delta in deltas), deltas[-1].finish_reason) == (poem[2:], "end")


def test_special_tokens_that_end_nothing_are_never_drawn(monkeypatch):
    """Padding, and rows of the vocabulary that the tokenizer does not know."""
    torch.manual_seed(0)
    generator = Generator(Megalodon(ModelConfig.named("tiny", vocab_size=320)).eval(), ByteTokenizer())
    seen = []

    def watched(logits, *arguments):
        seen.append(logits)
        return sample(logits, *arguments)

    monkeypatch.setattr("megalodon_lm.generation.generator.sample", watched)
    generator.write([generator.read("x")], SEEDED)
    logits = torch.cat(seen)
    assert logits[:, ByteTokenizer.pad :].isneginf().all()
    assert logits[:, : ByteTokenizer.pad].isfinite().all()


@pytest.mark.parametrize("kind", ["metaspace, always", "end of word", "word pieces", "byte fallback"])
def test_what_is_written_joins_the_prompt(kind, monkeypatch):
    """Spaces between words belong to no token alone in these vocabularies."""
    tokenizer = SubwordTokenizer(FILES[kind]())
    generator = Generator(Megalodon(ModelConfig.named("tiny", vocab_size=tokenizer.vocab_size)).eval(), tokenizer)
    prompt, rest = "the sea", " and the dog"
    tokens = tokenizer.encode(prompt + rest)[len(tokenizer.encode(prompt)) :].tolist()
    scripted(generator, tokens, monkeypatch, tokenizer.end)
    assert generator.write([generator.read(prompt)], GREEDY) == [rest]
    scripted(generator, tokens, monkeypatch, tokenizer.end)
    assert generator.write([generator.read(prompt)], GREEDY, fresh=True) == [rest.lstrip()]
    scripted(generator, tokens, monkeypatch, tokenizer.end)
    assert generator.write([generator.read("")], GREEDY) == [rest.lstrip()]


def test_the_limit_on_tokens_shows_what_was_held_back(generator, monkeypatch):
    scripted(generator, "abcabdef", monkeypatch)
    deltas = list(generator.stream([generator.read("x")], Sampling(max_tokens=5, stop=("abd",))))
    assert "".join(delta.text for delta in deltas) == "abcab"
    assert deltas[-1].finish_reason == "length"


def test_writing_nothing_is_allowed_and_reading_nothing_is_not(generator):
    assert generator.write([generator.read("x")], Sampling(max_tokens=0)) == [""]
    assert generator.write([], SEEDED) == []
    with pytest.raises(ValueError, match="nothing was read"):
        Context(generator.model).finish()


@pytest.mark.parametrize("name", ["tiny", "bench22M", "mega200M", "paper7B"])
def test_size_of_a_bookmark_is_known_beforehand(name, tmp_path):
    """That of the 7B too: a real state of its configuration, in bf16, with a full chunk of tokens to read again."""
    config = ModelConfig.named(name)
    with torch.device("meta"):
        model = Megalodon(config)
    state = model.empty_state(1, "cpu", torch.bfloat16)  # its cache is never touched, so it takes no memory
    waiting = torch.zeros(unit_length(config), dtype=torch.int64)
    StateFile(state.used(), "fingerprint", waiting).write(tmp_path / "a.state")
    file = StateFile.read(tmp_path / "a.state")
    assert sum(t.nbytes for t in (*file.tensors.values(), file.tokens)) == bookmark_bytes(model)
    names = 100 * len(state.tensors()) + 2000
    assert bookmark_bytes(model) < (tmp_path / "a.state").stat().st_size < bookmark_bytes(model) + names


def test_bad_bookmarks_are_refused_by_name(generator, tmp_path):
    path = tmp_path / "book.state"
    context = generator.read(TEXT[:5000])
    context.save(path, generator.tokenizer)
    said = describe(path)
    assert said["position"] == 5001
    assert said["nats per token"] == pytest.approx(context.loss(complete=False))
    whole = path.read_bytes()
    assert len(whole) < 64_000  # no attention cache

    def load(model=generator.model):
        return Context.load(path, model, generator.tokenizer)

    rng = random.Random(0)
    for _ in range(20):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(ValueError, match=r"book\.state"):
            load()
    for _ in range(40):
        at = rng.randrange(8, len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"book\.state"):
            load()
    path.write_bytes(whole)
    other = Megalodon(ModelConfig.named("tiny")).eval()
    with pytest.raises(ValueError, match="another model"):
        load(other)
    generator.model(torch.zeros(1, 3, dtype=torch.int64))[1].save(path)
    with pytest.raises(ValueError, match="bare state"):
        load()
    with pytest.raises(ValueError, match="no state file"):
        Context.load(tmp_path / "missing", generator.model, generator.tokenizer)


def test_a_bookmark_of_another_tokenizer_is_refused(generator, tmp_path):
    class Other(ByteTokenizer):
        fingerprint = "other"

    generator.read(TEXT[:50]).save(tmp_path / "book.state", Other())
    with pytest.raises(ValueError, match="another tokenizer"):
        Context.load(tmp_path / "book.state", generator.model, generator.tokenizer)


def test_a_bookmark_is_no_bare_state(generator, tmp_path):
    """Loaded as one it would lose the tokens that wait."""
    for length in (50, 5000):
        generator.read(TEXT[:length]).save(tmp_path / "book.state", generator.tokenizer)
        with pytest.raises(InputError, match=r"book\.state is a bookmark.*Context\.load"):
            State.load(tmp_path / "book.state", generator.model)


def test_a_bookmark_of_the_older_format_goes_on(generator, tmp_path, monkeypatch):
    """It holds the state at 4,096 tokens and all that came then, and the sampled fingerprint of the model."""
    tokens = generator.tokenizer.encode(TEXT, begin=True)
    context = Context(generator.model)
    context.read(tokens[:4097])
    notes = {"tokenizer": generator.tokenizer.fingerprint, "scored": "4096", "nats": repr(context.nats)}
    monkeypatch.setattr("megalodon_lm.state_file.FORMAT", OLDER_FORMAT)
    rest = torch.from_numpy(tokens[4096:])
    StateFile(context._state.used(), generator.model.sampled_fingerprint(), rest, notes).write(tmp_path / "old.state")
    monkeypatch.undo()
    loaded = Context.load(tmp_path / "old.state", generator.model, generator.tokenizer)
    whole = generator.read(TEXT)
    assert (loaded.position, loaded.loss()) == (whole.position, whole.loss())
    assert written(generator, loaded, GREEDY) == written(generator, whole, GREEDY)


@pytest.mark.parametrize("portable", [False, True])
def test_a_model_can_be_trained_from_what_was_read_or_written(generator, portable):
    width = 72 if portable else 64
    model = Megalodon(ModelConfig.named("tiny", model_dim=width)).eval()
    context = Context(model)
    context.read(np.arange(100))
    _, state = context.finish()
    engine = DecodingEngine(model, state)
    assert engine.fused != portable
    engine.step(torch.tensor([1]))
    for entry in (state, engine.state()):
        logits, _ = model(torch.arange(20)[None], entry)
        logits.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        model.zero_grad()


def test_a_context_and_a_state_say_in_a_line_what_they_are(generator):
    context = generator.read(TEXT[:1000])
    assert re.fullmatch(
        r"<Context of 1,001 tokens, \d\.\d{3} nats a token, 0\.\d MB, read by a Megalodon of 2 layers, width 64 and "
        r"chunks of 64>",
        repr(context),
    )
    _, state = context.finish()
    assert re.fullmatch(
        r"<State of 1 row at position 1,001, 0\.\d MB on cpu, made by a Megalodon of 2 layers, width 64 and "
        r"chunks of 64>",
        repr(state),
    )
    empty = State.cat([generator.model.empty_state()] * 2 + [state])
    assert "3 rows at position 0, 1,001" in repr(empty)


def test_a_model_that_is_not_finite_says_so(generator, short_pieces):
    broken = copy.deepcopy(generator.model)
    with torch.no_grad():
        broken.output.output.weight[5] = float("nan")
    spoilt = Generator(broken, generator.tokenizer)
    with pytest.raises(InputError, match="logits are not finite"):
        spoilt.write([spoilt.read("x")], GREEDY)
    with pytest.raises(InputError, match="loss is not finite"):
        spoilt.read(TEXT)
    assert Context(generator.model).loss() is None


KILLED_WRITER = """
import os, sys, torch
from megalodon_lm import ByteTokenizer, Megalodon
from megalodon_lm.generation.generator import Generator
generator = Generator(Megalodon.load("model").eval(), ByteTokenizer())
contexts = [generator.read("old " * n) for n in (100, 200)]
for _ in sys.stdin:
    child = os.fork()
    while child == 0:
        for context in contexts:
            context.save("book.state", generator.tokenizer)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_during_save_leaves_the_old_or_the_new_bookmark(generator, tmp_path, kills):
    generator.model.save(tmp_path / "model")
    generator.read("old " * 100).save(tmp_path / "book.state", generator.tokenizer)
    rng, found = random.Random(0), set()
    writers = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path, text=True
    )
    for _ in range(kills):
        print(file=writers.stdin, flush=True)
        child = int(writers.stdout.readline())
        time.sleep(0.002 + rng.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        assert writers.stdout.readline() == "gone\n"
        found.add(Context.load(tmp_path / "book.state", generator.model, generator.tokenizer).position)
    writers.communicate()
    assert found <= {401, 801}


def test_warming_up_changes_nothing(tiny):
    generator = Generator(tiny, ByteTokenizer(), "float32")
    alone = generator.write([generator.read("a prompt")], Sampling(max_tokens=5))
    with ThreadPoolExecutor(1) as thread:
        warm = thread.submit(generator.warm_up)
        assert generator.write([generator.read("a prompt")], Sampling(max_tokens=5)) == alone
    warm.result()
    assert generator.write([generator.read("a prompt")], Sampling(max_tokens=5)) == alone


def test_texts_can_be_continued_as_they_are(generator):
    assert generator.write(["Once", generator.read("upon")], GREEDY) == [
        generator.write([generator.read(text)], GREEDY)[0] for text in ("Once", "upon")
    ]
    with pytest.raises(InputError, match="as a list"):
        generator.write("Once", GREEDY)
    with pytest.raises(InputError, match="seeds"):
        generator.write(["Once", "upon"], GREEDY, seeds=[1])
    context = generator.read("x")
    with pytest.raises(InputError, match="given twice"):
        generator.write([context, context], GREEDY)
