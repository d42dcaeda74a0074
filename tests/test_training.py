import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.cli.train import Train
from megalodon_lm.data.prepare import prepare
from megalodon_lm.errors import InputError
from megalodon_lm.evaluation.comparison import Comparison
from megalodon_lm.ops import backend
from megalodon_lm.ops.cpu import elementwise_kernels, simd
from megalodon_lm.training import trainer as trainer_module
from megalodon_lm.training.recipe import Recipe, TrainingRecipe, bundled_recipes, read_recipe
from megalodon_lm.training.schedule import learning_rate
from megalodon_lm.training.trainer import Trainer

from .processes import wait_until

TEXT = b"the quick brown fox jumps over the lazy dog. " * 200


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return str(path)


def recipe(text, **training):
    return Recipe.from_dict(
        {
            "model": {"size": "tiny"},
            "data": {"train": [text], "validation": [text]},
            "training": {"length": 64, "batch_size": 2, "steps": 3, "warmup_steps": 1, **training},
        }
    )


def rates(**values):
    t = TrainingRecipe(learning_rate=1.0, **values)
    return [learning_rate(t, step, step / t.steps, t.warmup_steps / t.steps) for step in range(t.steps + 1)]


def test_learning_rate_is_pytorchs_warm_up_then_cosine():
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 20, 1.0, 19)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, 0.1)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, fall], [20])
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    assert rates(steps=40, warmup_steps=20, final_learning_rate=0.1)[:40] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 20, 39, 40, 100])
def test_learning_rate_reaches_its_peak_and_its_end(schedule, warmup):
    for part in (0.0, 0.2, 1.0):
        r = rates(steps=40, warmup_steps=warmup, schedule=schedule, decay_part=part, final_learning_rate=0.1)
        assert all(0 < rate <= 1 for rate in r)
        assert r[:warmup] == sorted(r[:warmup])
        assert r[warmup:] == sorted(r[warmup:], reverse=True)
        if warmup <= 40:
            assert max(r) == 1
        if warmup < 40 and schedule != "constant" and not (schedule == "wsd" and part == 0):
            assert r[40] == pytest.approx(0.1)


def test_linear_and_wsd_by_hand():
    common = dict(steps=10, warmup_steps=2, final_learning_rate=0.0)
    assert rates(schedule="linear", **common)[2:] == pytest.approx([1 - k / 8 for k in range(9)])
    assert rates(schedule="wsd", decay_part=0.4, **common) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_learning_rate_of_a_run_by_minutes_falls_from_the_time_its_warm_up_took(text, tmp_path):
    trainer = Trainer(
        recipe(text, minutes=1.0, warmup_steps=2, learning_rate=1.0, final_learning_rate=0.0), tmp_path / "run"
    )
    trainer.warmup_seconds = 20.0
    for step, seconds, rate in ((0, 0.0, 0.5), (1, 15.0, 1.0), (2, 20.0, 1.0), (3, 40.0, 0.5), (9, 60.0, 0.0)):
        trainer.step, trainer.seconds = step, seconds
        assert trainer.learning_rate == pytest.approx(rate, abs=1e-12)
    saved = trainer.checkpoint()
    assert saved.progress["warmup_seconds"] == 20.0


def test_trains_and_leaves_a_run_folder(text, tmp_path):
    trainer = Trainer(recipe(text, steps=30, learning_rate=5e-3), tmp_path / "run")
    seen = []
    assert trainer.train(seen.append)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["bits_per_token"] < 0.7 * lines[0]["bits_per_token"]
    assert lines[-1]["tokens"] == 30 * 128
    loaded = Megalodon.load(tmp_path / "run")
    for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert Recipe.load(tmp_path / "run" / "recipe.toml") == trainer.recipe


def test_carried_state_is_what_the_whole_document_gives(text, tmp_path):
    """With a learning rate of nearly nothing, the loss of the third step is that of its place in the document."""
    trainer = Trainer(recipe(text, learning_rate=1e-30, precision="float32", batch_size=1), tmp_path / "run")
    losses = []
    trainer.train(lambda m: losses.append(m.bits_per_token))
    sequence = trainer.batches.mixture.sequences[0]
    tokens = torch.from_numpy(sequence.read(0, len(sequence))[0])[None]
    logits, _ = trainer.model(tokens[:, :192])
    whole = F.cross_entropy(logits[0], tokens[0, 1:193], reduction="none").view(3, 64).mean(1) / math.log(2)
    torch.testing.assert_close(torch.tensor(losses), whole.detach(), rtol=1e-4, atol=0)


def test_used_run_folder_is_refused(text, tmp_path):
    (tmp_path / "precious").write_text("data")
    with pytest.raises(ValueError, match="not empty"):
        Trainer(recipe(text), tmp_path)
    assert (tmp_path / "precious").read_text() == "data"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainin": {}}, "did you mean 'training'"),
        ({"training": {"learning_rat": 1.0}}, "did you mean 'learning_rate'"),
        ({"model": {"sise": 1}}, "unknown key 'sise' in the model configuration; did you mean"),
        ({"model": {"size": "smal"}}, "did you mean 'small'"),
        ({"training": {"steps": "many"}}, "must be of type int"),
        ({"training": {"steps": 0}}, "must be at least 1"),
        ({"training": {"precision": "fp8"}}, "must be one of auto, bf16, float32"),
        ({"data": {"train": [1]}}, "list of strings"),
        ({"data": 3}, "must be a table"),
        ({"model": {"size": 5}}, r"model\.size = 5 must be the name"),
        ({"model": {"size": []}}, r"model\.size = \[\] must be the name"),
        ({"training": {"steps": 10**400}}, "must be at most"),
        ({"training": {"steps": 16**5000}}, "steps = a number of thousands of digits must be at most"),
        ({"training": {"learning_rate": 10**400}}, "learning_rate = 1000.* must be at most"),
        ({"training": {"batch_size": 10**9}}, "batch_size = 1000000000 must be at most 1048576"),
        ({"training": {"learning_rate": math.inf}}, "learning_rate = inf must be finite"),
        ({"training": {"clip": math.nan}}, "clip = nan must be finite"),
        ({"training": {"minutes": math.inf}}, "minutes = inf must be finite"),
        ({"training": {"beta1": 1.0}}, "beta1 = 1.0 must be at least 0 and below 1"),
        ({"training": {"beta2": 1}}, "beta2 = 1.0 must be at least 0 and below 1"),
        ({"training": {"average": 1.0}}, "average = 1.0 must be at least 0 and below 1"),
        ({"training": {"seed": -1}}, "seed = -1 must not be negative"),
        ({"training": {"schedule": "step"}}, "must be one of cosine, linear"),
        ({"model": {"size": "tiny"}, "training": {"begin_from": "a\0b"}}, "without the character 0"),
        ({"data": {"prompt": "\udcff"}}, "must be text"),
        ({"data": {"train": ["a\0b"]}}, "without the character 0"),
        ({"data": {"train": ["a", "b"], "weights": [math.nan, 1]}}, r"weights = \[nan, 1\] must be finite"),
        ({"data": {"train": ["a", "b"], "weights": [1e308, 1e308]}}, "their sum finite"),
        ({"data": {"train": ["a", "b"], "weights": [0, 1]}}, "must be positive"),
        ({"data": {"train": ["a", "b"], "weights": [True, 1]}}, "must be a list of numbers"),
        ({"data": {"section": 1}}, "section = 1 must be 0, or at least 2"),
        ({"data": {"section": -2}}, "section = -2 must be 0, or at least 2"),
    ],
)
def test_wrong_recipes_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Recipe.from_dict(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[data]\ntrain = ['caf\xe9']", "not valid TOML"),
        (b"x = " + 3000 * b"[", "not valid TOML"),
        (b"[training]\nsteps = " + 5000 * b"9", "not valid TOML"),
        (b"model = 5", "model = 5 must be a table"),
        (b"[training]\nsteps = 2020-01-01", "must be of type int"),
    ],
)
def test_wrong_recipe_files_are_refused(content, message, tmp_path):
    (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        Recipe.load(tmp_path / "r.toml", ["training.clip=2.0"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.steps=" + 3000 * "[", "nested too deep"),
        ("training.steps=" + 5000 * "9", "too large"),
        ("model=3", "unknown key ''"),
        ("training.steps", "must be like"),
    ],
)
def test_wrong_changes_are_refused(change, message, text):
    with pytest.raises(InputError, match=message):
        recipe(text).changed(change)


NUMBERS = st.floats(0, exclude_min=True, allow_infinity=False)
PARTS = st.floats(0, 1, exclude_max=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(
    st.lists(TEXTS, min_size=1), TEXTS, TEXTS, NUMBERS, NUMBERS | st.just(math.inf), NUMBERS | st.just(math.inf),
    PARTS, PARTS, st.integers(1, 1 << 53), st.booleans(),
)  # fmt: skip
def test_recipe_round_trips(tmp_path_factory, train, prompt, tokenizer, rate, clip, minutes, beta, average, steps, yes):
    given = Recipe(ModelConfig.named("tiny"))
    d, t = given.data, given.training
    d.train, d.prompt, d.tokenizer, d.weights = train, prompt, tokenizer, [1.0] * len(train)
    t.learning_rate, t.clip, t.checkpoint_minutes, t.beta1, t.average, t.steps = (
        rate,
        clip,
        minutes,
        beta,
        average,
        steps,
    )
    t.compile = yes
    given.check()
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(given.to_toml(), encoding="utf-8")
    assert Recipe.load(path) == given


COMPARISONS = [name for name in bundled_recipes() if name.startswith("compare_")]
OF_ENCODERS = [name for name in bundled_recipes() if name.startswith("classify_")]  # see test_classification.py


@pytest.mark.parametrize("name", sorted({*bundled_recipes()} - {*COMPARISONS, *OF_ENCODERS}))
def test_every_recipe_runs_two_steps_when_shrunk(name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"num_layers": 1, "model_dim": 32, "z_dim": 16, "value_dim": 32, "ffn_hidden_dim": 32,
             "norm_num_groups": 4, "chunk_size": 16}  # fmt: skip
    Megalodon(ModelConfig.named("tiny", **small)).save("runs/books")  # where fine-tuning begins
    loaded = Recipe.load(name)
    loaded.model = type(loaded.model).from_dict(loaded.model.to_dict() | small)
    t = loaded.training
    t.length, t.batch_size, t.minutes, t.steps, t.validate_steps = 32, 2, 0.0, 2, 0
    loaded.data.train = [text]
    if not loaded.data.tokenizer.startswith("bpe:"):
        loaded.data.tokenizer = "bytes"
    if name == "chat":
        turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Dracula. " * 9}]
        (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        prepare(["chats.jsonl"], Path("chats"), chats=True, workers=1)
        loaded.data.train = ["chats"]
    steps = []
    assert Trainer(loaded, tmp_path / "run").train(steps.append)
    assert len(steps) == 2


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_contender_of_every_comparison_runs_two_steps_when_shrunk(name, text, tmp_path, monkeypatch):
    values = read_recipe(name, tables=("compare",))
    for name in ("product_rate", "compile_kernels"):  # take longer than the steps
        monkeypatch.setattr(trainer_module, name, lambda *arguments: 1.0)
    assert Comparison(copy.deepcopy(values)).contenders
    model = values["model"]
    values["compare"]["equal_parameters"] = False  # so few cannot be had so exactly
    if "parameters" in model:
        model["parameters"] = 100_000
    else:
        model |= {"num_layers": 1, "model_dim": 32, "z_dim": 16, "value_dim": 32, "ffn_hidden_dim": 32,
                  "norm_num_groups": 4}  # fmt: skip
    values["training"] |= {"length": 32, "batch_size": 2, "steps": 2, "validate_steps": 2}
    values["data"]["train"] = [text]
    comparison = Comparison(values)
    for contender in comparison.contenders:
        steps = []
        assert Trainer(comparison.full(contender, 1.0, 0).recipe, tmp_path / contender).train(steps.append)
        assert len(steps) == 2


def test_an_interrupt_in_the_last_step_is_not_lost(text, tmp_path):
    """The run is whole and saved; what would come after it does not."""
    trainer = Trainer(recipe(text), tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        trainer.train(lambda metrics: os.kill(os.getpid(), signal.SIGINT) if metrics.step == 3 else None)
    assert trainer.saved_step == 3
    assert Megalodon.load(tmp_path / "run").config == trainer.recipe.model


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt("enough"), InputError("the disk is full"), ValueError("a fault of ours")]
)
def test_whatever_ends_a_run_leaves_a_report_and_is_told(error, text, tmp_path, monkeypatch):
    def end(trainer, *rest):
        trainer.train()
        raise error

    monkeypatch.setattr("megalodon_lm.cli.training.train_with_progress", end)
    path, run = tmp_path / "recipe.toml", tmp_path / "run"
    path.write_text(recipe(text).to_toml())
    with pytest.raises(type(error), match=str(error)):
        Train(path, run).run()
    assert "| steps | 3 |" in (run / "training.md").read_text()
    shutil.rmtree(run)
    monkeypatch.setattr("megalodon_lm.training.report.write_report", Mock(side_effect=InputError("cannot write")))
    with pytest.raises(type(error), match=str(error)):
        Train(path, run).run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_a_usable_checkpoint(number, text, tmp_path):
    """A real process, interrupted in the middle of a long run."""
    path = tmp_path / "long.toml"
    path.write_text(recipe(text, steps=10**6).to_toml())
    command = [sys.executable, "-m", "megalodon_lm", "train", str(path), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, process)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "the weights are saved" in " ".join(errors.split())
    assert "Traceback" not in errors
    Megalodon.load(tmp_path / "run")


def run_to_end(text, folder, **training):
    trainer = Trainer(recipe(text, steps=4, precision="float32", **training), folder)
    losses = []
    assert trainer.train(lambda metrics: losses.append(metrics.bits_per_token))
    return trainer, losses


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # inside torch.compile
def test_compiled_training_learns_the_same(text, tmp_path):
    _, plain = run_to_end(text, tmp_path / "plain")
    torch._dynamo.utils.counters.clear()
    trainer, compiled = run_to_end(text, tmp_path / "compiled", compile=True)
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of a text's beginning, and of what follows
    assert trainer.model.layers[0]._compiled_call_impl is not None
    assert Megalodon.load(tmp_path / "compiled").fingerprint() == trainer.model.fingerprint()


def test_compiling_without_a_compiler_is_refused_in_one_line(text, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        Trainer(recipe(text, compile=True), tmp_path / "run")


@simd.compiled
def _impossible(threads, num_tasks, args):
    args.no_such_thing()


def test_a_kernel_of_the_backward_pass_that_cannot_be_compiled_leaves_the_run_to_portable_operators(
    text, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(backend, "_failures", {})
    monkeypatch.setattr(elementwise_kernels, "norm_backward_on_team", _impossible)
    _, losses = run_to_end(text, tmp_path / "run")
    (record,) = caplog.records
    assert "_impossible" in record.message
    assert "portable" in record.message
    monkeypatch.setattr(backend, "_chosen", "portable")
    assert losses == run_to_end(text, tmp_path / "portable")[1]
