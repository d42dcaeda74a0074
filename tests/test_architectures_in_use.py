"""Every architecture is trained, gone on with, read, kept, forked, written and talked with by the same code."""

import json

import numpy as np
import pytest
import torch

from megalodon_lm import ByteTokenizer, Context, Generator
from megalodon_lm.architectures import load
from megalodon_lm.cli.conversation import Conversation
from megalodon_lm.data.chat import Message, encode_chat
from megalodon_lm.data.prepare import prepare
from megalodon_lm.errors import InputError
from megalodon_lm.evaluation.by_context import measure
from megalodon_lm.evaluation.norm_statistics import NormSchedule
from megalodon_lm.generation.engine import DecodingEngine
from megalodon_lm.generation.sampling import Sampling
from megalodon_lm.state_file import StateFile
from megalodon_lm.training.optimizer import build_optimizer
from megalodon_lm.training.recipe import Recipe, TrainingRecipe
from megalodon_lm.training.trainer import Trainer

from .processes import megalodon
from .reading import TEXT, in_blocks
from .runs import metrics, same_weights
from .test_architectures import EVERY, made, values

GREEDY = Sampling(max_tokens=6, temperature=0)


def reader(name):
    return Generator(made(name, torch.float32), ByteTokenizer(), "float32")


def tokens_of(generator, context, sampling=GREEDY):
    return [delta.token for delta in generator.stream([context], sampling)]


@pytest.mark.parametrize("name", EVERY)
def test_a_text_is_read_kept_and_gone_on_with(name, tmp_path):
    """However it came in, bit for bit; and forks leave what they came from as it was."""
    generator, text = reader(name), TEXT[:1200]
    whole = generator.read(text)
    expected = tokens_of(generator, whole.fork())
    assert whole.position == 1201
    for at in (1, 700):
        first = generator.read(in_blocks(text[:at], 97))
        first.save(tmp_path / "a.state", generator.tokenizer)
        context = Context.load(tmp_path / "a.state", generator.model, generator.tokenizer, "float32")
        generator.read(text[at:], context)
        assert context.loss() == whole.loss()
        fork = context.fork()
        assert tokens_of(generator, fork) == expected
        assert (fork.position, context.position) == (1207, 1201)
        assert tokens_of(generator, context) == expected
    assert len(StateFile.read(tmp_path / "a.state").tokens) <= 512


@pytest.mark.parametrize("name", EVERY)
def test_steps_give_what_reading_at_once_gives(name):
    """Of many rows, at different places, as of one."""
    model, tokenizer = made(name, torch.float32), ByteTokenizer()
    generator = reader(name)
    contexts = [generator.read(TEXT[:n]) for n in (3, 45, 20)]
    written = generator.write([context.fork() for context in contexts], GREEDY)
    alone = [generator.write([context.fork()], GREEDY)[0] for context in contexts]
    assert written == alone
    tokens = torch.from_numpy(tokenizer.encode(TEXT[:60], begin=True))[None]
    with torch.no_grad():
        whole, _ = model(tokens)
        _, state = model(tokens[:, :50])
        engine = DecodingEngine(model, state, "float32")
        for at in range(50, 60):
            torch.testing.assert_close(engine.step(tokens[:, at])[0], whole[0, at], atol=2e-4, rtol=0)
        assert engine.state().position.tolist() == [60]


def recipe(folder, name, **training):
    """Six steps on documents that are shorter than a step, packed, with one that is longer."""
    for number, (begin, end) in enumerate([(0, 300), (300, 317), (317, 340), (340, 600)]):
        (folder / f"{number}.txt").write_bytes(TEXT[begin:end])
    return Recipe.from_dict({
        "model": values(name),
        "data": {"train": [str(folder / f"{n}.txt") for n in range(4)], "validation": [str(folder / "0.txt")]},
        "training": {"length": 40, "batch_size": 2, "steps": 6, "warmup_steps": 2, "checkpoint_steps": 2,
                     "precision": "float32", "average": 0.5, **training},
    })  # fmt: skip


class Killed(Exception):
    pass


def kill(metrics):
    if metrics.step == 5:
        raise Killed


@pytest.mark.parametrize("name", EVERY)
def test_a_run_that_goes_on_is_the_run_that_never_stopped(name, tmp_path):
    """Carried states, packed documents, moments and averages go on to the last bit."""
    given = recipe(tmp_path, name)
    whole = Trainer(given, tmp_path / "whole")
    assert whole.train()
    assert whole.state is not None
    with pytest.raises(Killed):
        Trainer(given, tmp_path / "parts").train(kill)
    resumed = Trainer(Recipe.load(tmp_path / "parts" / "recipe.toml"), tmp_path / "parts", resume="last")
    assert resumed.step == 4
    assert resumed.train()
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    losses = [[record["bits_per_token"] for record in metrics(tmp_path / run)] for run in ("whole", "parts")]
    assert losses[0] == losses[1]
    for part, t in whole.state.used().items():
        assert torch.equal(t, resumed.state.used()[part]), part
    assert load(tmp_path / "parts").config == given.model


@pytest.mark.parametrize("name", EVERY)
def test_a_trained_model_is_trained_further_asked_and_evaluated(name, tmp_path):
    """On chats, by Muon, with recomputed activations; a base of another architecture is refused."""
    made(name, torch.float32).save(tmp_path / "base")
    ByteTokenizer().save(tmp_path / "base")
    chat = [Message("user", "Who is he?"), Message("assistant", "Dracula.")]
    line = json.dumps({"messages": [message._asdict() for message in chat]})
    (tmp_path / "a.jsonl").write_text(f"{line}\n" * 20)
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "chats", chats=True, workers=1)
    table = {
        "data": {"train": [str(tmp_path / "chats")]},
        "training": {"begin_from": str(tmp_path / "base"), "length": 64, "steps": 2, "warmup_steps": 1,
                     "optimizer": "muon", "activation_checkpointing": True, "precision": "float32"},
    }  # fmt: skip
    trainer = Trainer(Recipe.from_dict(table), tmp_path / "run")
    assert trainer.recipe.model == made(name, torch.float32).config
    assert trainer.train()
    model = load(tmp_path / "run")
    model.eval()
    conversation = Conversation(Generator(model, ByteTokenizer(), "float32"), GREEDY, roles=True)
    conversation.turn("Who is he?")
    tokens, _ = encode_chat(chat[:1], ByteTokenizer())
    assert conversation.context.position > len(tokens)
    curve = measure(model, lambda: [[TEXT[:300]]], ByteTokenizer(), [16, 0], "float32")
    assert all(np.isfinite(list(curve.bits_per_byte.values())))
    other = next(n for n in EVERY if made(n).config.architecture != trainer.recipe.model.architecture)
    with pytest.raises(InputError, match="and the recipe asks for a"):
        Trainer(Recipe.from_dict({**table, "model": values(other)}), tmp_path / "other")


@pytest.mark.parametrize("name", EVERY)
def test_decay_passes_over_what_a_module_spares(name):
    model = made(name, torch.float32)
    optimizer = build_optimizer(model, TrainingRecipe(decay_cema=False), "float32")
    spared = {p for m in model.modules() for p in (getattr(m, n) for n in getattr(m, "spared", ())) if p is not None}
    found = {p for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert found == spared


def test_statistics_of_norms_are_replaced_where_there_are_some():
    with pytest.raises(InputError, match="no statistics of norms"):
        measure(made("leaky", torch.float32), lambda: [[b"abc"]], ByteTokenizer(), [0], "float32", NormSchedule())


def test_commands_know_no_architecture(tmp_path):
    """A real process that was told of none: `info` of a configuration file, with a size to be found."""
    (tmp_path / "a.toml").write_text('architecture = "gecko"\nparameters = 200_000\nvocab_size = 259\n')
    told = megalodon("info", "a.toml", "--json", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert abs(json.loads(told.stdout)["parameters"] / 200_000 - 1) <= 0.01
