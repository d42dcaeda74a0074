"""Steps whose loss is not finite or spikes: stop, skip the batch, or go back."""

import itertools
import json
import os
import re
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalodon_lm.cli.training import train_with_progress
from megalodon_lm.training import trainer as trainer_module
from megalodon_lm.training.trainer import Trainer

from .runs import metrics, recipe, steps


@pytest.fixture
def poison(monkeypatch):
    """Spoil the loss of the batches with these numbers, counted over the life of a trainer."""
    monkeypatch.setattr(trainer_module, "compile_kernels", lambda *arguments: None)  # its batches do not count

    def poison(trainer, *at, value=float("nan")):
        numbers = itertools.count(1)

        def spoil(model, inputs, made):
            loss, state = made
            return loss * (value if next(numbers) in at else 1.0), state

        trainer.model.register_forward_hook(spoil)

    return poison


def test_bad_step_stops_and_says_how_to_go_on(tmp_path, poison):
    trainer = Trainer(recipe(tmp_path), tmp_path / "run")
    poison(trainer, 6)
    with pytest.raises(ValueError, match=r"the loss is nan .* at step 6; lower training.learning_rate"):
        trainer.train()
    assert Trainer(recipe(tmp_path), tmp_path / "run", resume="last").step == 4


@pytest.mark.parametrize("value", [float("nan"), 3.0])
def test_bad_batch_is_skipped(value, tmp_path, poison):
    trainer = Trainer(recipe(tmp_path, bad_step="skip", spike=1.0), tmp_path / "run")
    poison(trainer, 6, 7, value=value)
    seen = {}
    assert trainer.train(lambda m: seen.update({m.step: (m.event, trainer.model.fingerprint())}))
    assert [step for step, (event, _) in seen.items() if event.startswith("skipped")] == [6, 7]
    assert seen[5][1] == seen[7][1] != seen[8][1]
    assert steps(tmp_path / "run") == list(range(1, 13))
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_run_goes_back_to_the_last_checkpoint_and_past_the_bad_batch(tmp_path, poison):
    trainer = Trainer(recipe(tmp_path, bad_step="rewind"), tmp_path / "run")
    poison(trainer, 7)
    seen = []
    assert trainer.train(seen.append)
    assert [m.step for m in seen] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10, 11, 12]
    assert seen[6].event.startswith("went back from step 7: the loss is nan")
    assert seen[6].tokens == 8 * 96
    assert steps(tmp_path / "run") == list(range(1, 13))


@pytest.mark.parametrize(("bad", "steps_back"), [((7, 10), (7, 7)), ((7, 8), (7, 5)), ((7, 10, 11), (7, 7, 5))])
def test_every_return_is_told_by_the_records_that_stay(bad, steps_back, tmp_path, poison):
    """Going back takes records away, of which one may tell of the return before."""
    trainer = Trainer(recipe(tmp_path, bad_step="rewind"), tmp_path / "run")
    poison(trainer, *bad)
    assert train_with_progress(trainer, tensorboard=True)[0]
    told = "; ".join(record["event"] for record in metrics(tmp_path / "run") if record["event"])
    assert re.findall(r"went back from step (\d+)", told) == [str(step) for step in steps_back]
    shown = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("tokens")
    assert [event.step for event in shown] == steps(tmp_path / "run") == list(range(1, 13))
    assert [event.value for event in shown] == [record["tokens"] for record in metrics(tmp_path / "run")]


def test_a_loss_that_stays_bad_ends_the_run(tmp_path, poison):
    for policy in ("skip", "rewind"):
        trainer = Trainer(recipe(tmp_path, bad_step=policy, steps=40), tmp_path / policy)
        poison(trainer, *range(6, 99))
        with pytest.raises(ValueError, match="the 10th time"):
            trainer.train()


def test_bad_steps_in_a_row_are_counted_across_a_resume(tmp_path, poison):
    def trainer(resume="no"):
        trainer = Trainer(recipe(tmp_path, bad_step="skip", steps=40), tmp_path / "run", resume=resume)
        poison(trainer, *range(3 if resume == "no" else 1, 99))
        return trainer

    assert not trainer().train(lambda m: os.kill(os.getpid(), signal.SIGINT) if m.step == 7 else None)
    with pytest.raises(ValueError, match="at step 12, the 10th time in a row"):
        trainer("last").train()


def test_going_back_ends_although_good_steps_lie_between(tmp_path, poison):
    """Every third batch is bad and four good ones make a checkpoint."""
    trainer = Trainer(recipe(tmp_path, bad_step="rewind", steps=40), tmp_path / "run")
    poison(trainer, *range(7, 999, 3))
    with pytest.raises(ValueError, match=r"at step 7, the 10th time since step 4; lower"):
        trainer.train()


def test_first_step_may_be_skipped(tmp_path, poison):
    trainer = Trainer(recipe(tmp_path, bad_step="skip", steps=2), tmp_path / "run")
    poison(trainer, 1)
    assert trainer.train()
    assert [record["bits_per_token"] is None for record in metrics(tmp_path / "run")] == [True, False]
