"""Trials of recall: models learn from the sequences, finished trials are kept, and the command shows them."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.architectures import ARCHITECTURES, build
from megalodon_lm.cli.recall import Recall
from megalodon_lm.errors import InputError
from megalodon_lm.evaluation import recall_trials
from megalodon_lm.evaluation.intervals import wilson
from megalodon_lm.evaluation.recall import ask
from megalodon_lm.evaluation.recall_report import summarise
from megalodon_lm.evaluation.recall_tasks import VOCAB_SIZE, AssociativeRecall, find_task
from megalodon_lm.evaluation.recall_trials import Trial, carry_out, carry_out_all, contenders, train
from megalodon_lm.training.recipe import TrainingRecipe

from .processes import Nursery, megalodon, wait_until

QUICK = ["--set", "num_layers=1", "--chunk-size", 16, "--pairs", 2, "--distances", 1, 0, "--train-distances", 0,
         "--steps", 2, "--batch-size", 2, "--sequences", 3, "--architectures", "megalodon", "gecko"]  # fmt: skip


def small_config(**changes):
    sizes = dict(vocab_size=VOCAB_SIZE, num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32,
                 cema_ndim=4, chunk_size=16, norm_num_groups=2, swiglu=True)  # fmt: skip
    return ModelConfig(**sizes | changes)


def trial(seed=0, **changes):
    recipe = TrainingRecipe(steps=2, batch_size=2, warmup_steps=1, precision="float32", seed=seed)
    return Trial(**dict(name="small", config=small_config(), task=AssociativeRecall(2, 16), train_distances=(0, 1),
                        test_distances=(1, 0), test_rows=3, training=recipe) | changes)  # fmt: skip


def test_answers_are_counted_by_definition():
    """An answer is the likeliest of all tokens after the whole sequence before it."""
    torch.manual_seed(0)
    model, task = Megalodon(small_config()), AssociativeRecall(3, 16)
    for distance in (0, 2):
        found = ask(model, task, distance, 400, (1, 2), "float32")
        tokens, targets, learnt, _ = task.sequences(400, distance, (1, 2))
        right = model(tokens)[0].argmax(-1) == targets
        assert right[learnt].any()
        assert (found.right, found.answers) == (int(right[learnt].sum()), 1200)
        assert found.accuracy == found.right / 1200
        assert found.interval == wilson(found.right, 1200)


def test_the_bytes_are_those_of_what_is_used_where_the_queries_begin():
    """At distance 0 the pairs' keys and values lie in the cache; where a chunk has just begun nothing does."""
    model, task = Megalodon(small_config()), AssociativeRecall(3, 16)
    c = model.config
    cached = 4 * 6 * (c.z_dim + c.value_dim)
    same, later = (ask(model, task, distance, 2, (0,), "float32") for distance in (0, 2))
    assert same.state_bytes - later.state_bytes == cached
    assert model.state_bytes() - later.state_bytes == 4 * 16 * (c.z_dim + c.value_dim)


@pytest.mark.slow
def test_a_small_model_learns_to_recall_within_a_chunk():
    """In seconds; 96 % when this was written."""
    task = AssociativeRecall(2, 16)
    recipe = TrainingRecipe(steps=200, batch_size=64, learning_rate=1e-2, warmup_steps=20, precision="float32")
    torch.manual_seed(0)
    model = Megalodon(small_config(model_dim=64, z_dim=32, value_dim=64))
    assert ask(model, task, 0, 200, (1,), "float32").accuracy < 0.1
    loss = train(model, task, (0,), recipe)
    assert ask(model, task, 0, 200, (1,), "float32").accuracy > 0.9
    assert loss < 0.5


@pytest.mark.slow
def test_a_small_model_learns_to_copy_within_a_chunk():
    """100 % when this was written."""
    task = find_task("copying", 2, 16)
    recipe = TrainingRecipe(steps=600, batch_size=64, learning_rate=1e-2, warmup_steps=20, precision="float32")
    torch.manual_seed(0)
    model = Megalodon(small_config(model_dim=64, z_dim=32, value_dim=64, num_layers=2))
    train(model, task, (0,), recipe)
    assert ask(model, task, 0, 200, (1,), "float32").accuracy > 0.95


def test_only_answers_are_learnt():
    """The loss of a step is that of the answers alone; the first one is of the shortest distance."""
    torch.manual_seed(0)
    model, task = Megalodon(small_config()), AssociativeRecall(2, 16)
    recipe = TrainingRecipe(steps=1, batch_size=4, precision="float32", seed=4)
    tokens, targets, learnt, _ = task.sequences(4, 1, (recall_trials.TRAINING, 4, 0))
    logits, _ = model(tokens)
    expected = torch.nn.functional.cross_entropy(logits[learnt], targets[learnt]).item()
    assert train(model, task, (2, 1), recipe) == pytest.approx(expected, rel=1e-5)


def test_all_distances_are_learnt_from_and_no_others():
    class Recorded(AssociativeRecall):
        def sequences(self, rows, distance, seed):
            seen.append((distance, tuple(seed)))
            return super().sequences(rows, distance, seed)

    seen = []
    recipe = TrainingRecipe(steps=60, batch_size=1, precision="float32", seed=3)
    train(Megalodon(small_config()), Recorded(6, 16), (0, 1, 3, 2), recipe)
    distances = [distance for distance, _ in seen]
    assert {d: distances.count(d) > 5 for d in sorted(distances)} == {1: True, 2: True, 3: True}, "0 does not fit"
    assert len({seed for _, seed in seen}) == 60
    assert set(distances[:10]) == {1}, "distances grow"
    assert set(distances[10:20]) == {1, 2}
    assert set(distances[20:]) == {1, 2, 3}


def test_a_loss_that_is_not_finite_ends_the_training():
    model = Megalodon(small_config())
    with torch.no_grad():
        model.embed.weight[:] = math.nan
    seen = []
    assert math.isnan(train(model, AssociativeRecall(2, 16), (0,), trial().training, lambda *step: seen.append(step)))
    assert not seen


def test_trials_are_kept_gone_on_with_and_told_apart(tmp_path, monkeypatch):
    carried_out = []

    def counted(trial, *rest):
        carried_out.append(trial)
        if len(carried_out) == 2:
            raise KeyboardInterrupt
        return carry_out(trial, *rest)

    monkeypatch.setattr(recall_trials, "carry_out", counted)
    trials = [trial(seed) for seed in range(3)]
    done = []
    with pytest.raises(KeyboardInterrupt):
        done.extend(carry_out_all(trials, tmp_path / "new" / "folder"))
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 1
    found = list(carry_out_all(trials, tmp_path / "new" / "folder"))
    assert [t.training.seed for t in carried_out] == [0, 1, 1, 2]
    again = list(carry_out_all(trials, tmp_path / "new" / "folder"))
    assert len(carried_out) == 4
    assert [r.figures() for r in again] == [r.figures() for r in found]
    assert found[0].recalled == carry_out(trials[0]).recalled, "a seed means one result"
    with pytest.raises(InputError, match="is a trial with other settings; name another folder"):
        list(carry_out_all([trial(test_rows=4)], tmp_path / "new" / "folder"))
    (tmp_path / trials[0].file_name).write_text('{"model": 3}')
    with pytest.raises(InputError, match="is no trial of recall"):
        list(carry_out_all(trials, tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot make the folder"):
        list(carry_out_all(trials, tmp_path / "file"))


def test_a_rate_is_chosen_on_sequences_that_are_not_reported():
    def made(name, rate, seed, right, choice, optimizer="adamw"):
        recipe = dataclasses.replace(trial(seed).training, learning_rate=rate, optimizer=optimizer)
        result = carry_out(trial())
        recalled = tuple(dataclasses.replace(r, right=right, answers=10) for r in result.recalled)
        return dataclasses.replace(result, trial=trial(training=recipe, name=name), recalled=recalled, choice=choice)

    results = [made("a", 1e-3, 0, 9, 0.5), made("a", 1e-3, 1, 10, 0.4), made("a", 2e-3, 0, 7, 0.2),
               made("a", 2e-3, 1, 4, 0.8), made("b", 1e-3, 0, 0, None)]  # fmt: skip
    first, second = summarise(results)
    assert first.figures()["learning_rate"] == 2e-3, "what was reported would say 1e-3"
    assert first.by_distance[1] == (11 / 20, *wilson(11, 20), 0.4, 0.7)
    assert first.pairs_held[1] == pytest.approx(2 * (11 / 20 - 1 / 2) / (1 / 2))
    assert second.by_distance[1] == (0, *wilson(0, 10), 0, 0)
    assert second.pairs_held[1] == 0
    assert first.figures()["seeds"] == [0, 1]
    assert first.figures()["optimizer"] == "adamw"
    of_muon = [made("a", 2e-3, seed, 0, 0.6, "muon") for seed in (0, 1)]
    assert summarise([*results, *of_muon])[0].results == tuple(of_muon), "by the choice, at the same rate"


def test_the_sequences_of_a_choice_are_used_for_nothing_else(monkeypatch):
    seen = []

    class Recorded(AssociativeRecall):
        def sequences(self, rows, distance, seed):
            found = super().sequences(rows, distance, seed)
            seen.append((seed[0], distance, tuple(map(tuple, found.tokens.tolist()))))
            return found

    result = carry_out(trial(task=Recorded(2, 16)))
    assert [(use, distance) for use, distance, _ in seen if use] == [(2, 0), (2, 1), (1, 0), (1, 1)]
    rows = [row for _, _, rows in seen for row in rows]
    assert len(set(rows)) == len(rows)
    assert 0 <= result.choice <= 1


def test_trials_of_the_version_before_are_read_or_refused(tmp_path):
    """They had one task, its chunks were the model's, and the rate was chosen by what is reported."""
    new, other = trial(), trial(training=dataclasses.replace(trial().training, learning_rate=1e-3))
    (result,) = carry_out_all([new], tmp_path)
    figures = result.figures()
    del figures["choice"], figures["settings"]["task"], figures["task"], figures["question"]
    assert new.file_name == "small-2-pairs-rate-0.002-seed-0.json"
    (tmp_path / new.file_name).write_text(json.dumps(figures))
    (again,) = carry_out_all([new], tmp_path)
    assert again.recalled == result.recalled
    assert summarise([again])[0].by_distance == summarise([result])[0].by_distance
    with pytest.raises(InputError, match="of an older version, which measured nothing to choose a learning rate by"):
        list(carry_out_all([new, other], tmp_path))
    with pytest.raises(InputError, match="is a trial with other settings"):
        list(carry_out_all([trial(task=AssociativeRecall(2, 32))], tmp_path))


def test_the_optimizer_is_part_of_a_trial(tmp_path):
    """Muon's own rate is that of the rest; files of AdamW are named and read as before there was another."""
    plain, muon = Recall(optimizers=["adamw", "muon"], pairs=[2], architectures=["megalodon"], steps=2)._trials()
    assert (muon.training.matrix_learning_rate, muon.training.learning_rate) == (8e-3, 8e-3)
    assert (plain.file_name, muon.file_name) == (
        "megalodon-2-pairs-rate-0.008-seed-0.json", "megalodon-2-pairs-muon-rate-0.008-seed-0.json"
    )  # fmt: skip
    assert "optimizer" not in plain.settings()["training"]
    weights = {}
    for optimizer in ("adamw", "muon"):
        new = trial(training=dataclasses.replace(trial().training, optimizer=optimizer, matrix_learning_rate=0.5))
        torch.manual_seed(0)
        model = build(new.config)
        train(model, new.task, (0,), new.training)
        weights[optimizer] = model.state_dict()
        (result,) = carry_out_all([new], tmp_path)
        assert next(carry_out_all([new], tmp_path)).figures() == result.figures()
    moved = {name for name, w in weights["muon"].items() if not torch.allclose(w, weights["adamw"][name], atol=1e-2)}
    assert any(name.endswith("wz.weight") for name in moved)
    assert not any(name.endswith("bias") for name in moved)


@pytest.mark.parametrize(("name", "question"), [("copying", "after"), ("induction", "before")])
def test_every_task_is_learnt_and_asked_by_the_same_trial(name, question, tmp_path):
    new = trial(task=find_task(name, 2, 16, question))
    (result,) = carry_out_all([new], tmp_path)
    assert result.recalled == carry_out(new).recalled
    assert {r.answers for r in result.recalled} == {3 * new.task.answers}
    assert name in new.file_name
    assert ("before" in new.file_name) == (question == "before")
    assert next(carry_out_all([new], tmp_path)).figures() == result.figures()


def test_contenders():
    base = ModelConfig.named("tiny")
    plain = ModelConfig.named("tiny", vocab_size=VOCAB_SIZE)
    assert contenders(base, [], {}, "tiny") == {"tiny": plain}
    for name, config in contenders(base, list(recall_trials.VARIANTS), {}, "tiny").items():
        changed = {k for k, v in config.to_dict().items() if v != base.to_dict()[k]}
        assert changed == {"vocab_size", *recall_trials.VARIANTS[name]}
        build(config)
    only = contenders(base, ["gecko", "megalodon"], {"gecko": {"chunk_size": 32}}, "tiny")
    assert [config.chunk_size for config in only.values()] == [32, 64]
    with pytest.raises(InputError, match="no architecture 'megalodo'; did you mean 'megalodon'"):
        contenders(base, ["megalodo"], {}, "tiny")
    with pytest.raises(InputError, match="choices are given for 'memory', which is not compared"):
        contenders(base, ["gecko"], {"memory": {"chunk_size": 32}}, "tiny")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - recall_trials.VARIANTS.keys()))
def test_every_architecture_takes_part_at_equal_parameters(name):
    """Trained for a step, asked at three distances of a chunk of its task; its state is counted."""
    base = ModelConfig.named("tiny")
    config = contenders(base, [name], {}, "tiny")[name]
    wanted = dataclasses.replace(base, vocab_size=VOCAB_SIZE).num_parameters
    assert config.num_parameters == pytest.approx(wanted, rel=0.01)
    assert getattr(config, "chunk_size", 64) == base.chunk_size == 64  # attention sees as far back as everyone's
    result = carry_out(trial(config=config, task=AssociativeRecall(2, 8), test_distances=(0, 1, 3)))
    assert math.isfinite(result.loss)
    assert [r.answers for r in result.recalled] == [6] * 3
    assert all(0 < r.state_bytes <= result.state_bytes for r in result.recalled)


def test_what_has_no_sequences():
    with pytest.raises(InputError, match="22 pairs have no sequences of the train distances"):
        trial(task=AssociativeRecall(22, 64), train_distances=(0,))
    with pytest.raises(InputError, match=r"training.steps = 0 must be at least 1"):
        trial(training=TrainingRecipe(steps=0))


def test_the_command(tmp_path):
    """It trains, says what came out, goes on where it was, and is interrupted without loss."""
    result = megalodon("evaluate", "recall", *QUICK, "--out", "found", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "found" / "recall.json").read_text())
    assert [s["model"] for s in figures["summary"]] == ["megalodon", "gecko"]
    assert list(figures["trials"][0]["accuracy_by_distance"]) == ["0", "1"]
    for picture in ("recall.png", "pairs.png"):
        assert (tmp_path / "found" / picture).stat().st_size > 10_000
    assert "50.0% (mqar, 2 pairs)" in result.stdout
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "found").glob("*seed*")}
    more = ["--seeds", 0, 1, "--task", "mqar", "copying", "--question", "after", "before"]
    again = megalodon("evaluate", "recall", *QUICK, "--out", "found", *more, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    assert len(list((tmp_path / "found").glob("*seed*"))) == 8 * len(before)


def test_what_is_finished_is_shown_and_no_more(tmp_path):
    """Of the trials asked for, two are there; a folder without any says so."""
    made = megalodon("evaluate", "recall", *QUICK, "--out", "found", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    before = {p.name for p in (tmp_path / "found").iterdir()}
    first = (tmp_path / "found" / "recall.json").read_bytes()
    more = [*QUICK, "--optimizers", "adamw", "muon", "--seeds", 0, 1, "--finished", "--out"]
    again = megalodon("evaluate", "recall", *more, "found", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert {p.name for p in (tmp_path / "found").iterdir()} == before
    assert (tmp_path / "found" / "recall.json").read_bytes() == first
    none = megalodon("evaluate", "recall", *more, "none", cwd=tmp_path)
    assert none.returncode == 2
    assert "none holds none of these 8 trials; without --finished they are made" in none.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--pairs", 40], "40 pairs take 80 tokens"),
        (["--set", "num_layer=3"], "did you mean 'num_layers'"),
        (["--set", "num_layers"], "'num_layers' must be like model_dim=128"),
        (["--set", "gecko.num_layer=3"], "did you mean 'num_layers'"),
        (["--set", "lama.num_layers=3"], "choices are given for 'lama', which is not compared"),
        (["--architectures", "gekko"], "no architecture 'gekko'"),
        (["--model", "tinny"], "did you mean 'tiny'"),
        (["--learning-rates", "nan"], "training.learning_rate = nan must be finite"),
        (["--distances", -1], "no sequences of the test distances"),
        (["--seeds"], "need at least one value each"),
        (["--device", "foo"], "device 'foo'"),
    ],
)
def test_what_the_command_refuses(options, says, tmp_path):
    result = megalodon("evaluate", "recall", "--out", "new", *options, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert says in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_done(tmp_path):
    """Ctrl-C in the third trial or a later one: those before are kept and shown."""
    nursery = Nursery()
    streams = [tmp_path / name for name in ("in", "out", "err")]
    for path in streams:
        path.touch()
    command = ["evaluate", "recall", *QUICK, "--seeds", *range(10_000), "--out", "found"]
    number = nursery.start(command, streams, tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("found/*seed*"))) >= 2, nursery.process)
    os.kill(number, signal.SIGINT)
    assert nursery.ended() == 130
    nursery.close()
    figures = json.loads((tmp_path / "found" / "recall.json").read_text())
    assert len(list(tmp_path.glob("found/*seed*"))) - len(figures["trials"]) in (0, 1), "one may be just written"
    assert "Answers that are right" in streams[1].read_text()


def test_a_kill_loses_no_finished_trial_and_changes_none(tmp_path):
    """Killed at once in the second trial or a later one; gone on with, all is as if nothing had happened."""
    nursery = Nursery()
    command = ["evaluate", "recall", *QUICK, "--out", "killed", "--seeds"]
    number = nursery.start([*command, *range(100)], cwd=tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("killed/megalodon*"))) >= 1, nursery.process)
    os.kill(number, signal.SIGKILL)
    assert nursery.ended() == -signal.SIGKILL
    nursery.close()
    killed = tmp_path / "killed"
    kept = {p.name: p.stat().st_mtime_ns for p in killed.glob("megalodon*")}
    again = Recall(set=["num_layers=1"], chunk_size=16, pairs=[2], distances=[1, 0], train_distances=[0], steps=2,
                   batch_size=2, sequences=3, architectures=["megalodon", "gecko"], seeds=[0, 1, 2])  # fmt: skip
    found, whole = (list(carry_out_all(again._trials(), folder)) for folder in (killed, tmp_path / "whole"))
    assert kept == {name: (killed / name).stat().st_mtime_ns for name in kept}
    assert kept.keys() & {r.trial.file_name for r in found}
    assert [r.recalled for r in found] == [r.recalled for r in whole]
    assert [(r.loss, r.choice) for r in found] == [(r.loss, r.choice) for r in whole]
