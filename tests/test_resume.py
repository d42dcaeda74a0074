"""Runs that are killed, damaged or short of disk, and go on."""

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalodon_lm import Megalodon
from megalodon_lm.cli.training import RunningMean, train_with_progress
from megalodon_lm.data.prepare import prepare
from megalodon_lm.errors import InputError
from megalodon_lm.training import trainer as trainer_module
from megalodon_lm.training.checkpoint import checkpoints
from megalodon_lm.training.compiling import compile_kernels
from megalodon_lm.training.manifest import CONTENTS, MANIFEST_FILE
from megalodon_lm.training.metrics import read_metrics
from megalodon_lm.training.recipe import Recipe
from megalodon_lm.training.schedule import accumulated
from megalodon_lm.training.trainer import Trainer

from .processes import HANGS, Nursery, megalodon
from .runs import TEXT, metrics, recipe, same_weights, steps


class Stopped(Exception):
    pass


def stop_after(step):
    def watch(metrics):
        if metrics.step == step:
            raise Stopped

    return watch


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"training": {"carry_state": False}},
        {"training": {"accumulate": 3, "ramp_steps": 6}},
        {"training": {"average": 0.9}},
        {"training": {"carry_state": False}, "data": {"order": "shuffled"}},
    ],
)
def test_a_run_that_goes_on_is_the_run_that_never_stopped(change, tmp_path):
    given = recipe(tmp_path, data=change.get("data"), **change.get("training", {}))
    assert Trainer(given, tmp_path / "whole").train()
    trainer = Trainer(given, tmp_path / "parts")
    with pytest.raises(Stopped):
        trainer.train(stop_after(7))
    assert steps(tmp_path / "parts") == list(range(1, 8))
    resumed = Trainer(given, tmp_path / "parts", resume="last")
    assert resumed.step == 4
    assert resumed.train()
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert steps(tmp_path / "parts") == list(range(1, 13))
    for whole, parts in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert whole["bits_per_token"] == parts["bits_per_token"]
        assert whole["tokens"] == parts["tokens"]


@pytest.mark.parametrize("place", ["validation", "reading"])
def test_an_error_outside_a_step_costs_nothing_of_what_was_learnt(place, tmp_path, monkeypatch):
    given = recipe(tmp_path, validate_steps=3, checkpoint_steps=0, average=0.9)
    assert Trainer(given, tmp_path / "whole").train(validate=lambda model: 1.0)
    trainer, left = Trainer(given, tmp_path / "parts"), iter(range(1) if place == "validation" else range(99))

    def validate(model):
        assert not model.training
        if next(left, None) is None:
            raise InputError("the text is gone")
        return 1.0

    if place == "reading":
        read, reads = trainer.batches.read, iter(range(8))

        def gone(cursor):
            if next(reads, None) is None:
                raise InputError("the text is gone")
            return read(cursor)

        monkeypatch.setattr(trainer.batches, "read", gone)
    with pytest.raises(InputError, match="the text is gone"):
        trainer.train(validate=validate)
    done = 6 if place == "validation" else 8
    assert trainer.model.training
    assert steps(tmp_path / "parts") == list(range(1, done + 1))
    resumed = Trainer(given, tmp_path / "parts", resume="last")
    assert resumed.step == done
    assert resumed.train(validate=lambda model: 1.0)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert steps(tmp_path / "parts") == list(range(1, 13))


def test_only_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    results = iter([3.0, 1.0, 2.0, 2.5, 2.0, 1.5])
    trainer = Trainer(recipe(tmp_path, validate_steps=2, keep_checkpoints=1), tmp_path / "run")
    trainer.train(validate=lambda model: next(results))
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000012", "step-00000004"]
    assert trainer.best == (1.0, 4)


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_average_of_weights_is_what_is_exported(decay, tmp_path):
    """The initial weights have no part in it, however short the run and slow the decay."""
    trainer = Trainer(recipe(tmp_path, average=decay, steps=5), tmp_path / "run")
    seen = []
    trainer.train(lambda m: seen.append({n: p.detach().double().clone() for n, p in trainer.model.named_parameters()}))
    shares = [decay ** (4 - i) for i in range(5)]
    exported = dict(Megalodon.load(tmp_path / "run").named_parameters())
    for name, weight in exported.items():
        expected = sum(s * weights[name] for s, weights in zip(shares, seen, strict=True)) / sum(shares)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_checkpoints_hold_of_the_state_only_what_goes_on(tmp_path):
    """Computed: of each row the statistics, CEMA's states, and the 32 tokens (of two steps of 48) in a chunk of 64."""
    trainer = Trainer(recipe(tmp_path, steps=2), tmp_path / "carried")
    trainer.train()
    stored = load_file(checkpoints(tmp_path / "carried")[0] / "training.safetensors")
    layers, d, n, z, v, groups = 2, 64, 8, 32, 128, 4
    norm = 8 + 2 * groups * 8
    expected = 2 * (layers * (norm + d * n * 2 * 4 + 32 * (z + v) * 4 + 8) + norm + 8)
    assert sum(t.nbytes for name, t in stored.items() if name.startswith("state.")) == expected

    free = Trainer(recipe(tmp_path, steps=2, carry_state=False), tmp_path / "free")
    free.train()
    stored = load_file(checkpoints(tmp_path / "free")[0] / "training.safetensors")
    assert stored
    assert not [name for name in stored if name.startswith("state.")]


def test_checkpoints_of_an_older_version_are_gone_on_with(tmp_path):
    """They held the whole cache of the State, and neither count averaged steps nor know when the warm-up ended."""
    given = recipe(tmp_path, average=0.9, steps=4)
    trainer = Trainer(given, tmp_path / "run")
    trainer.train()
    now = trainer.checkpoint()
    training = {name: t for name, t in now.training.items() if not name.startswith("state.")}
    training |= {f"state.{name}": t for name, t in trainer.state.tensors().items()}
    progress = {k: v for k, v in now.progress.items() if k not in ("averaged_steps", "warmup_seconds")}
    dataclasses.replace(now, training=training, progress=progress).write(tmp_path / "run", trainer.run.id)
    resumed = Trainer(given, tmp_path / "run", resume="last")
    assert resumed.average.steps == 4
    for name, t in trainer.state.tensors().items():
        assert torch.equal(resumed.state.tensors()[name], t)


def test_compiling_kernels_changes_nothing_and_is_not_on_the_clock(tmp_path, monkeypatch):
    given = recipe(tmp_path, steps=2)
    trainer = Trainer(given, tmp_path / "run")
    trainer.model.train()
    before = torch.get_rng_state(), trainer.model.fingerprint()
    compile_kernels(trainer.model, trainer.passes, trainer.device, trainer.subject.trials(), given.training.carry_state)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert trainer.model.fingerprint() == before[1]
    assert all(p.grad is None for p in trainer.model.parameters())
    hours, plain = [0.0], time.perf_counter
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: plain() + hours[0])

    def slow(*arguments):
        hours[0] += 3600.0

    monkeypatch.setattr(trainer_module, "compile_kernels", slow)
    trainer.train()
    assert hours == [3600.0]
    assert trainer.seconds < 3600


def test_batches_of_a_step_grow():
    t = recipe_training(accumulate=5, ramp_steps=8)
    assert [accumulated(t, step) for step in range(10)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def recipe_training(**values):
    from megalodon_lm.training.recipe import TrainingRecipe

    return TrainingRecipe(**values)


def test_accumulated_batches_give_the_mean_of_their_gradients(tmp_path):
    trainer = Trainer(
        recipe(tmp_path, model={"dropout": 0.0}, steps=1, accumulate=3, carry_state=False), tmp_path / "run"
    )
    cursor, gradients = trainer.cursor, []
    for _ in range(3):
        batch = trainer.batches.read(cursor)
        cursor = batch.cursor
        loss, _ = trainer.model(batch.inputs, targets=batch.targets, document_starts=batch.starts)
        gradients.append(torch.autograd.grad(loss, list(trainer.model.parameters())))
    expected = sum((sum(g) / 3).square().sum() for g in zip(*gradients, strict=True)) ** 0.5
    seen = []
    trainer.train(seen.append)
    assert seen[0].gradient_norm == pytest.approx(expected.item(), rel=1e-5)
    assert seen[0].tokens == 3 * 96


BREAK = {
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "flipped": lambda path, other: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "deleted": lambda path, other: path.unlink(),
    "swapped": lambda path, other: shutil.copyfile(other, path),
}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("run", 0), ("other", 1)):
        Trainer(recipe(folder, seed=seed, steps=8), folder / name).train()
    return folder


CASES = [(file, how) for file in (*CONTENTS, MANIFEST_FILE) for how in BREAK]
CASES.remove(("config.json", "swapped"))  # the same in both runs


@pytest.mark.parametrize(("file", "how"), CASES)
def test_broken_checkpoint_is_refused_by_name_and_the_last_good_one_used(file, how, two_runs, tmp_path):
    shutil.copytree(two_runs / "run", tmp_path / "run")
    given = recipe(two_runs, steps=12)
    name = "step-00000008"
    broken = tmp_path / "run" / "checkpoints" / name / file
    BREAK[how](broken, two_runs / "other" / "checkpoints" / name / file)
    with pytest.raises(ValueError, match=rf"{name}/{file}.*--resume auto"):
        Trainer(given, tmp_path / "run", resume="last")
    trainer = Trainer(given, tmp_path / "run", resume="auto")
    assert trainer.step == 4
    assert len(trainer.notes) == 1
    assert file in trainer.notes[0]
    assert trainer.train()
    assert steps(tmp_path / "run") == list(range(1, 13))


def lines(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery("megalodon_lm.training.report.write_report = lambda *arguments: None")
    yield nursery
    nursery.close()


def chats(folder):
    rng = random.Random(2)
    turns = [[{"role": role, "content": "".join(rng.choices("abc ", k=rng.randrange(1, 60)))}
              for role in ("user", "assistant")] for _ in range(300)]  # fmt: skip
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    prepare([str(folder / "chats.jsonl")], folder / "chats", chats=True, workers=1)
    return [str(folder / "chats")]


def two_sources(folder):
    texts = ["".join(random.Random(seed).choices("xyz\n", k=700 * seed)) for seed in range(1, 8)]
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(folder / "more.jsonl")], folder / "more", workers=1)
    return [str(folder / "text.txt"), str(folder / "more")]


KINDS = {
    "stream": {},
    "shuffled": {"data": {"order": "shuffled"}, "carry_state": False},
    "mixture": {"data": {"train": two_sources, "weights": [2.0, 1.0]}},
    "chats": {"data": {"train": chats}},
    "averaged": {"average": 0.9, "validate_steps": 7, "validate_bytes": 500},
    "muon": {"optimizer": "muon", "accumulate": 3, "ramp_steps": 60, "data": {"section": 500}},
}


def wait_for(aim, rng, run, goal, process):
    """Until the moment to kill: while a run begins, in a step, or while a checkpoint is written."""
    deadline = time.monotonic() + HANGS
    if aim == "beginning":
        time.sleep(rng.uniform(0, 2))
        return
    while time.monotonic() < deadline and lines(run) <= goal and Path(f"/proc/{process}").exists():
        time.sleep(0.002)
    while aim == "checkpoint" and time.monotonic() < deadline and Path(f"/proc/{process}").exists():
        if list((run / "checkpoints").glob(".step-*")):
            time.sleep(rng.uniform(0, 0.02))
            return
    time.sleep(rng.uniform(0, 0.03))


@pytest.mark.parametrize(
    ("kind", "kills", "length"),
    [("stream", 3, 60), *(pytest.param(kind, 25, 800, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_killed_at_random_moments_the_run_ends_the_same(kind, kills, length, nursery, tmp_path):
    """Real processes. Beginnings, steps, checkpoints every other step, and the loader's thread are hit as they come."""
    recipe(tmp_path)  # its text
    values = {**KINDS[kind], "data": dict(KINDS[kind].get("data", {}))}
    if callable(values["data"].get("train")):
        values["data"]["train"] = values["data"]["train"](tmp_path)
    given = recipe(tmp_path, steps=length, checkpoint_steps=2, keep_checkpoints=3, **values)
    (tmp_path / "r.toml").write_text(given.to_toml())
    whole, run = tmp_path / "whole", tmp_path / "parts"

    def start(folder):
        (tmp_path / "errors.txt").touch()
        return nursery.start(
            ["train", tmp_path / "r.toml", "--out", folder, "--resume", "auto"],
            (os.devnull, os.devnull, tmp_path / "errors.txt"),
        )

    def errors():
        return (tmp_path / "errors.txt").read_text()[-2000:]

    start(whole)
    assert nursery.ended() == 0, errors()
    rng, killed = random.Random(kills), 0
    for number in range(kills):
        process = start(run)
        aim = ("step", "checkpoint", "beginning")[number % 3]
        wait_for(aim, rng, run, ((number + rng.random()) * 0.9 * length) // kills, process)
        with contextlib.suppress(ProcessLookupError):  # it came to its end
            os.kill(process, signal.SIGKILL)
        code = nursery.ended()
        assert code in (0, -signal.SIGKILL), errors()
        killed += code != 0
    assert killed > 0.9 * kills
    start(run)
    assert nursery.ended() == 0, errors()
    assert same_weights(whole, run)
    moments = [load_file(checkpoints(folder)[0] / "training.safetensors") for folder in (whole, run)]
    assert moments[0].keys() == moments[1].keys()
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    assert steps(run) == list(range(1, length + 1))
    assert [m["bits_per_token"] for m in metrics(run)] == [m["bits_per_token"] for m in metrics(whole)]
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def test_full_disk_ends_in_one_line_and_the_last_checkpoint_can_be_used(nursery, tmp_path):
    """A limit on the size of files stands for the full disk: the system refuses in the middle of writing."""
    given = recipe(tmp_path, steps=8)
    (tmp_path / "r.toml").write_text(given.to_toml())
    Trainer(given, tmp_path / "run").train()
    (tmp_path / "r.toml").write_text(recipe(tmp_path, steps=12).to_toml())
    size = (tmp_path / "run" / "model.safetensors").stat().st_size
    streams = [os.devnull, os.devnull, tmp_path / "errors.txt"]
    streams[2].touch()
    nursery.start(["train", "r.toml", "--out", "run", "--resume", "last"], streams, tmp_path, size // 2)
    assert nursery.ended() == 2
    errors = streams[2].read_text()
    assert "Traceback" not in errors
    assert "cannot write the checkpoint" in errors
    trainer = Trainer(recipe(tmp_path, steps=12), tmp_path / "run", resume="last")
    assert trainer.step == 8
    assert trainer.train()
    assert steps(tmp_path / "run") == list(range(1, 13))
    assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "says"),
    [([], "cannot write run/metrics.jsonl: File too large"),
     (["--tensorboard"], "cannot write events for TensorBoard into run: File too large")],
)  # fmt: skip
def test_a_disk_full_of_records_is_told_by_the_name_of_the_file(options, says, nursery, tmp_path):
    (tmp_path / "r.toml").write_text(recipe(tmp_path, steps=200, checkpoint_steps=0).to_toml())
    streams = [os.devnull, os.devnull, tmp_path / "errors.txt"]
    streams[2].touch()
    nursery.start(["train", "r.toml", "--out", "run", *options], streams, tmp_path, 6000)
    assert nursery.ended() == 2
    errors = streams[2].read_text().splitlines()
    assert errors[-1] == f"megalodon: error: {says}"
    assert options or not [line for line in errors if "Traceback" in line]  # of TensorBoard's own thread
    assert len(read_metrics(tmp_path / "run")) > 3


def test_loss_and_speed_shown_after_a_resume_are_those_of_its_steps(tmp_path, monkeypatch):
    shown = []

    @contextlib.contextmanager
    def bar(title, total):
        yield lambda done, note="": shown.append(note)

    monkeypatch.setattr("megalodon_lm.cli.training.progress_bar", bar)
    train_with_progress(Trainer(recipe(tmp_path, steps=4), tmp_path / "run"))
    shown.clear()
    train_with_progress(Trainer(recipe(tmp_path, steps=6), tmp_path / "run", resume="last"))
    assert shown[0] == "compiling kernels"
    fifth, sixth = metrics(tmp_path / "run")[4:]
    assert shown[1].startswith(f"step 5  {fifth['bits_per_token']:.3f} bits/token  {fifth['tokens_per_second']:,.0f} t")
    assert f" {(fifth['bits_per_token'] + sixth['bits_per_token']) / 2:.3f} bits/token" in shown[2]


def test_running_mean_leaves_out_what_is_not_finite():
    mean = RunningMean()
    assert math.isnan(mean.add(math.nan))
    assert [mean.add(x) for x in (4.0, math.inf, 2.0, math.nan, 0.0)] == [4, 4, 3, 3, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"num_layers": 1}}, r"differs from that of the run in model\.num_layers"),
        ({"length": 32}, r"differs .* in training\.length"),
        ({"data": {"order": "shuffled"}, "carry_state": False}, r"differs .* data\.order"),
    ],
)
def test_going_on_with_another_recipe_is_refused(change, message, tmp_path):
    Trainer(recipe(tmp_path), tmp_path / "run").train()
    with pytest.raises(ValueError, match=message):
        Trainer(recipe(tmp_path, **change), tmp_path / "run", resume="last")


def test_going_on_with_another_text_is_refused(tmp_path):
    given = recipe(tmp_path)
    Trainer(given, tmp_path / "run").train()
    (tmp_path / "text.txt").write_bytes(TEXT[::-1])
    with pytest.raises(ValueError, match="text is not the one the run was begun with"):
        Trainer(given, tmp_path / "run", resume="last")


@pytest.mark.parametrize("left", ["run.json", ".run.json.half"])
def test_a_run_killed_at_its_very_beginning_begins_again(left, tmp_path):
    Trainer(recipe(tmp_path), tmp_path / "run")
    for name in ("recipe.toml", "tokenizer_record.json"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "run.json").rename(tmp_path / "run" / left)
    assert Trainer(recipe(tmp_path), tmp_path / "run", resume="auto").step == 0


def test_a_run_killed_between_its_last_checkpoint_and_the_export_still_exports(tmp_path):
    given, run = recipe(tmp_path, steps=6, checkpoint_steps=2), tmp_path / "run"
    Trainer(given, run).train()
    last = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    shutil.copyfile(run / "checkpoints" / "step-00000004" / "model.safetensors", run / "model.safetensors")
    assert Trainer(given, run, resume="auto").train()
    assert (run / "model.safetensors").read_bytes() == last
    assert Trainer(given, run, resume="auto").train()
    assert not list(run.glob(".*.new"))


def test_a_run_goes_on_beyond_its_end(tmp_path):
    Trainer(recipe(tmp_path), tmp_path / "run").train()
    longer = Trainer(recipe(tmp_path, steps=16), tmp_path / "run", resume="last")
    assert longer.train()
    assert steps(tmp_path / "run") == list(range(1, 17))
    assert Recipe.load(tmp_path / "run" / "recipe.toml").training.steps == 16


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda folder: None, ["--resume", "last"], "there is no run to go on with"),
        (lambda folder: (folder / "run").write_text("a file"), [], "cannot create the run folder"),
        (lambda folder: (folder / "text.txt").unlink(), [], "no such file"),
        (lambda folder: (folder / "run").mkdir() or (folder / "run" / "x").touch(), [], "not empty"),
    ],
)
def test_unusable_places_end_in_one_line(make, arguments, message, tmp_path):
    (tmp_path / "r.toml").write_text(recipe(tmp_path).to_toml())
    make(tmp_path)
    ended = megalodon("train", "r.toml", "--out", "run", *arguments, cwd=tmp_path)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_fine_tuning_begins_with_the_weights_of_a_model(tmp_path):
    trained = Trainer(recipe(tmp_path), tmp_path / "first")
    trained.train()
    tuned = Trainer(recipe(tmp_path, begin_from=str(tmp_path / "first")), tmp_path / "second")
    assert tuned.model.fingerprint() == trained.model.fingerprint()
    assert tuned.step == 0
    with pytest.raises(ValueError, match=r"differs from the recipe in model\.num_layers"):
        Trainer(recipe(tmp_path, model={"num_layers": 1}, begin_from=str(tmp_path / "first")), tmp_path / "third")
