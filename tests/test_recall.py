"""Associative recall: what the sequences are, that models learn from them, and that finished trials are kept."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.errors import InputError
from megalodon_lm.evaluation import recall_trials
from megalodon_lm.evaluation.recall import SYMBOLS, VOCAB_SIZE, RecallTask, ask
from megalodon_lm.evaluation.recall_report import summarise
from megalodon_lm.evaluation.recall_trials import Trial, carry_out, carry_out_all, train, vary
from megalodon_lm.training.recipe import TrainingRecipe

from .processes import Nursery, megalodon, wait_until

KEYS, VALUES, FILLER = range(SYMBOLS), range(SYMBOLS, 2 * SYMBOLS), range(2 * SYMBOLS, 3 * SYMBOLS)
QUICK = ["--set", "num_layers=1", "chunk_size=16", "--pairs", 2, "--distances", 1, 0, "--train-distances", 0,
         "--steps", 2, "--batch-size", 2, "--sequences", 3, "--variants", "megalodon", "gecko"]  # fmt: skip


def small_config(**changes):
    sizes = dict(vocab_size=VOCAB_SIZE, num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32,
                 cema_ndim=4, chunk_size=16, norm_num_groups=2, swiglu=True)  # fmt: skip
    return ModelConfig(**sizes | changes)


def trial(seed=0, **changes):
    recipe = TrainingRecipe(steps=2, batch_size=2, warmup_steps=1, precision="float32", seed=seed)
    return Trial(**dict(name="small", config=small_config(), pairs=2, train_distances=(0, 1), test_distances=(1, 0),
                        test_rows=3, training=recipe) | changes)  # fmt: skip


@pytest.mark.parametrize(
    ("pairs", "distance"),
    [(8, 0), (8, 1), (8, 4), (8, 16), (8, 64), (32, 1), (32, 4), (32, 64), (21, 0), (1, 0), (1, 2)],
)
def test_each_query_comes_exactly_so_many_chunks_after_its_key(pairs, distance):
    """Token by token: every key's value stands behind it, its query `distance` chunks later, filler all between."""
    chunk = 64
    tokens, targets, learnt = RecallTask(pairs, chunk).sequences(5, distance, (3,))
    for row, target, counts in zip(tokens.tolist(), targets.tolist(), learnt.tolist(), strict=True):
        place, value_of, asked = {}, {}, []
        for at, (token, answer, is_query) in enumerate(zip(row, target, counts, strict=True)):
            if token in KEYS and token not in place:
                assert not is_query
                place[token], value_of[token] = at, row[at + 1]
            elif token in KEYS:
                assert is_query
                assert at // chunk - place[token] // chunk == distance
                assert answer == value_of[token]
                asked.append(token)
            elif token in VALUES:
                assert not is_query
                assert row[at - 1] in place
                assert not asked, "no answer is ever read"
            else:
                assert token in FILLER
                assert not is_query
        assert sorted(asked) == sorted(place)
        assert len(place) == len(set(value_of.values())) == pairs
        assert all(value in VALUES for value in value_of.values())
        assert row[: 2 * pairs : 2] == list(place)
        assert row[-pairs:] == asked


@given(st.integers(1, 10), st.integers(0, 5), st.integers(0, 2**40), st.integers(0, 3))
def test_sequences_are_those_of_their_seed(pairs, distance, seed, step):
    task = RecallTask(pairs, 32)
    first, again = (task.sequences(3, distance, (seed, step)) for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.tokens, task.sequences(3, distance, (seed, step + 1)).tokens)


def test_keys_values_order_and_filler_are_drawn_evenly():
    task, rows = RecallTask(4, 16), 8000
    tokens, targets, _ = task.sequences(rows, 1, (0,))
    for part, begin in ((tokens[:, 0:8:2], 0), (tokens[:, 1:8:2], SYMBOLS), (tokens[:, 8:16], 2 * SYMBOLS)):
        for column in part.T:
            counts = torch.bincount(column - begin, minlength=SYMBOLS)
            assert len(counts) == SYMBOLS
            assert ((counts - rows / SYMBOLS).abs() < 6 * math.sqrt(rows / SYMBOLS)).all()
    order = (tokens[:, None, 0:8:2] == tokens[:, 16:, None]).int().argmax(2)  # which pair each query asks for
    for place in order.T:
        assert (torch.bincount(place, minlength=4) - rows / 4).abs().max() < 6 * math.sqrt(rows / 4)
    assert torch.equal(targets[:, 16:], tokens[:, 1:8:2].gather(1, order))


def test_what_does_not_fit():
    assert RecallTask(21, 64).fits(0)
    assert not RecallTask(22, 64).fits(0)
    assert RecallTask(32, 64).fits(1)
    assert not RecallTask(1, 64).fits(-1)
    with pytest.raises(InputError, match="33 pairs take 66 tokens, more than a chunk of 64"):
        RecallTask(33, 64)
    with pytest.raises(InputError, match="65 pairs must be at least 1 and at most the 64 keys"):
        RecallTask(65, 1024)
    with pytest.raises(InputError, match="22 pairs have no sequences of the train distances"):
        trial(pairs=22, config=small_config(chunk_size=64), train_distances=(0,))
    with pytest.raises(InputError, match=r"training.steps = 0 must be at least 1"):
        trial(training=TrainingRecipe(steps=0))


def test_answers_are_counted_by_definition():
    """An answer is the likeliest of all tokens after the whole sequence before it."""
    torch.manual_seed(0)
    model, task = Megalodon(small_config()), RecallTask(3, 16)
    for distance in (0, 2):
        found = ask(model, task, distance, 400, (1, 2), "float32")
        tokens, targets, learnt = task.sequences(400, distance, (1, 2))
        right = model(tokens)[0].argmax(-1) == targets
        assert right[learnt].any()
        assert (found.right, found.answers) == (int(right[learnt].sum()), 1200)
        assert found.accuracy == found.right / 1200
        assert found.error == pytest.approx(math.sqrt(found.accuracy * (1 - found.accuracy) / 1200))


def test_the_bytes_are_those_of_what_is_used_where_the_queries_begin():
    """At distance 0 the pairs' keys and values lie in the cache; where a chunk has just begun nothing does."""
    model, task = Megalodon(small_config()), RecallTask(3, 16)
    c = model.config
    cached = 4 * 6 * (c.z_dim + c.value_dim)
    same, later = (ask(model, task, distance, 2, (0,), "float32") for distance in (0, 2))
    assert same.state_bytes - later.state_bytes == cached
    assert model.state_bytes() - later.state_bytes == 4 * 16 * (c.z_dim + c.value_dim)


def test_a_small_model_learns_to_recall_within_a_chunk():
    """In seconds; 96 % when this was written."""
    task = RecallTask(2, 16)
    recipe = TrainingRecipe(steps=200, batch_size=64, learning_rate=1e-2, warmup_steps=20, precision="float32")
    torch.manual_seed(0)
    model = Megalodon(small_config(model_dim=64, z_dim=32, value_dim=64))
    assert ask(model, task, 0, 200, (1,), "float32").accuracy < 0.1
    loss = train(model, task, (0,), recipe)
    assert ask(model, task, 0, 200, (1,), "float32").accuracy > 0.9
    assert loss < 0.5


def test_only_answers_are_learnt():
    """The loss of a step is that of the answers alone; the first one is of the shortest distance."""
    torch.manual_seed(0)
    model, task = Megalodon(small_config()), RecallTask(2, 16)
    recipe = TrainingRecipe(steps=1, batch_size=4, precision="float32", seed=4)
    tokens, targets, learnt = task.sequences(4, 1, (recall_trials.TRAINING, 4, 0))
    logits, _ = model(tokens)
    expected = torch.nn.functional.cross_entropy(logits[learnt], targets[learnt]).item()
    assert train(model, task, (2, 1), recipe) == pytest.approx(expected, rel=1e-5)


def test_all_distances_are_learnt_from_and_no_others():
    class Recorded(RecallTask):
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
    assert math.isnan(train(model, RecallTask(2, 16), (0,), trial().training, lambda *step: seen.append(step)))
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


def test_the_best_rate_of_each_model_over_its_seeds():
    def made(name, rate, seed, right):
        recipe = dataclasses.replace(trial(seed).training, learning_rate=rate)
        result = carry_out(trial())
        recalled = tuple(dataclasses.replace(r, right=right, answers=10) for r in result.recalled)
        return dataclasses.replace(result, trial=trial(training=recipe, name=name), recalled=recalled)

    results = [made("a", 1e-3, 0, 9), made("a", 1e-3, 1, 1), made("a", 2e-3, 0, 7), made("a", 2e-3, 1, 5),
               made("b", 1e-3, 0, 2)]  # fmt: skip
    first, second = summarise(results)
    assert first.figures()["learning_rate"] == 2e-3
    assert first.by_distance[1] == pytest.approx((0.6, 0.1))
    assert second.by_distance[1] == pytest.approx((0.2, math.sqrt(0.2 * 0.8 / 10)))
    assert first.figures()["seeds"] == [0, 1]


def test_variants():
    base = ModelConfig.named("tiny")
    assert vary(base, [], "tiny") == {"tiny": ModelConfig.named("tiny", vocab_size=VOCAB_SIZE)}
    for name, config in vary(base, list(recall_trials.VARIANTS), "tiny").items():
        changed = {k for k, v in config.to_dict().items() if v != base.to_dict()[k]}
        assert changed == {"vocab_size", *recall_trials.VARIANTS[name]}
        Megalodon(config)
    with pytest.raises(InputError, match="no variant 'megalodo'; did you mean 'megalodon'"):
        vary(base, ["megalodo"], "tiny")


def test_the_command(tmp_path):
    """It trains, says what came out, goes on where it was, and is interrupted without loss."""
    result = megalodon("evaluate", "recall", *QUICK, "--out", "found", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "found" / "recall.json").read_text())
    assert [s["model"] for s in figures["summary"]] == ["megalodon", "gecko"]
    assert list(figures["trials"][0]["accuracy_by_distance"]) == ["0", "1"]
    assert (tmp_path / "found" / "recall.png").stat().st_size > 10_000
    assert "50.0% of 2" in result.stdout
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "found").glob("*seed*")}
    again = megalodon("evaluate", "recall", *QUICK, "--out", "found", "--seeds", 0, 1, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    assert len(list((tmp_path / "found").glob("*seed*"))) == 2 * len(before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--pairs", 40], "40 pairs take 80 tokens"),
        (["--set", "num_layer=3"], "did you mean 'num_layers'"),
        (["--set", "num_layers"], "'num_layers' must be like model_dim=128"),
        (["--variants", "gekko"], "no variant 'gekko'"),
        (["--model", "tinny"], "did you mean 'tiny'"),
        (["--learning-rates", "nan"], "training.learning_rate = nan must be finite"),
        (["--distances", -1], "no sequences of the test distances"),
        (["--seeds"], "need at least one number each"),
        (["--device", "foo"], "device 'foo'"),
    ],
)
def test_what_the_command_refuses(options, says, tmp_path):
    result = megalodon("evaluate", "recall", "--out", "new", *options, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert says in result.stderr
    assert not (tmp_path / "new").exists()


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
    assert "Values recalled" in streams[1].read_text()
