"""Runs of several ranks: the same losses on every mesh, checkpoints that any number of ranks goes on with."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from megalodon_lm.architectures import load
from megalodon_lm.cli.training import train_with_progress
from megalodon_lm.errors import InputError, RankLost
from megalodon_lm.evaluation import validation
from megalodon_lm.evaluation.perplexity import score
from megalodon_lm.parallel.mesh import MeshSizes
from megalodon_lm.parallel.ranks import Ranks, Together
from megalodon_lm.training.checkpoint import checkpoints
from megalodon_lm.training.trainer import Trainer

from .ranks import run_ranks
from .runs import TEXT, metrics, recipe

STEPS = 10
CHOICES = {
    "length": 64, "batch_size": 4, "steps": STEPS, "warmup_steps": 2, "checkpoint_steps": 5, "accumulate": 2,
    "learning_rate": 1e-3, "validate_steps": 5,
}  # fmt: skip
OTHERS = {
    "optimizer": "muon", "average": 0.8, "clip": 0.1, "segment": 24, "ramp_steps": 6, "activation_checkpointing": True,
    "schedule": "wsd",
}  # fmt: skip
MODEL = {"dropout": 0.0, "chunk_size": 16, "num_layers": 2, "num_heads": 2}
TEXT_READ = np.frombuffer(TEXT, np.uint8)[:200].astype(np.int64)
MESHES = {
    2: [
        {"replicate": 2}, {"shard": 2, "replicate": 1}, {"chunk": 2}, {"chunk": 2, "exchange": "parallel"},
        {"tensor": 2},
    ],
    4: [
        {"chunk": 4}, {"replicate": 1, "shard": 2, "chunk": 2, "exchange": "parallel"}, {"chunk": 2, "tensor": 2},
    ],
}  # fmt: skip
MORE = [
    {"replicate": 2, "chunk": 2}, {"replicate": 1, "shard": 2, "chunk": 2}, {"replicate": 2, "shard": 2},
    {"replicate": 2, "tensor": 2}, {"replicate": 1, "shard": 2, "tensor": 2},
    {"chunk": 2, "tensor": 2, "exchange": "parallel"},
]  # fmt: skip
WITH_OTHERS = {
    2: [{"replicate": 1, "shard": 2}, {"chunk": 2}],
    4: [{"replicate": 1, "shard": 2, "chunk": 2}, {"chunk": 2, "tensor": 2}, {"replicate": 1, "shard": 2, "tensor": 2}],
}


def train(rank, folder, runs):
    """Runs, or what is left of them: the sizes of the mesh of each, its folder, and whether it goes on."""
    torch.set_num_threads(1)
    for sizes, name, resume in runs:
        ranks = Together(MeshSizes(**sizes), torch.device("cpu"))
        Trainer(of_run(folder), folder / name, ranks=ranks, resume=resume).train(validate=validate)


def of_run(folder):
    """The recipe of a folder's runs: of one that is named so with other choices."""
    others = OTHERS if folder.name.startswith("others") else {}
    return recipe(folder, MODEL, {"section": 150}, **CHOICES, **others)


def validate(model):
    return score(model, [TEXT_READ], 64).mean


def trained_alone(folder):
    Trainer(of_run(folder), folder / "run").train(validate=validate)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with the run of one process."""
    return trained_alone(tmp_path_factory.mktemp("alone"))


def follows(run, alone):
    """Its losses are those of one process, on the validation text too, and it stopped at the same place."""
    for kind in ("bits_per_token", "validation"):
        losses = [[m[kind] or 0.0 for m in metrics(folder)] for folder in (run, alone / "run")]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5), (run, kind)
    places = [json.loads((checkpoints(f)[0] / "progress.json").read_bytes())["place"] for f in (run, alone / "run")]
    assert places[0] == places[1], run
    return True


@pytest.mark.parametrize("ranks", MESHES)
def test_steps_on_each_mesh_follow_those_of_one_process(alone, ranks):
    runs = [(sizes, f"{ranks} ranks, {number}", "no") for number, sizes in enumerate(MESHES[ranks])]
    run_ranks(train, ranks, alone, runs)
    assert all(follows(alone / name, alone) for _, name, _ in runs)


@pytest.mark.slow
def test_steps_on_more_meshes_follow_those_of_one_process(alone):
    runs = [(sizes, f"more, {number}", "no") for number, sizes in enumerate(MORE)]
    run_ranks(train, 4, alone, runs)
    assert all(follows(alone / name, alone) for _, name, _ in runs)


SAMPLING = {
    "of chunks": {"chunk": 2}, "of shards": {"replicate": 1, "shard": 2}, "of layers": {"replicate": 1, "tensor": 2},
}  # fmt: skip


def sample(rank, folder, meshes):
    """Runs that measure and write a sample at every step; the last one of one process."""
    torch.set_num_threads(1)
    validation.SAMPLE_TOKENS = 6
    for name, sizes in meshes.items():
        ranks = Ranks() if sizes is None else Together(MeshSizes(**sizes), torch.device("cpu"))
        if sizes is None and rank:
            continue
        sizes = {**MODEL, "num_heads": 2}
        choices = {"length": 32, "batch_size": 2, "steps": 2, "validate_steps": 1, "validate_bytes": 300}
        of_run = recipe(folder, sizes, {"prompt": "abc"}, **choices)
        train_with_progress(Trainer(of_run, folder / name, ranks=ranks))


def test_samples_are_those_of_one_process_and_written_once(tmp_path):
    run_ranks(sample, 2, tmp_path, {**SAMPLING, "alone": None})
    alone = (tmp_path / "alone" / "samples.txt").read_text()
    assert alone.count("bits per byte\nabc") == 2
    for name in SAMPLING:
        assert (tmp_path / name / "samples.txt").read_text() == alone, name


def with_others(ranks, folder):
    """Muon, averaged weights, clipping that bites, segments, batches that grow more: on meshes that share weights."""
    trained_alone(folder)
    runs = [(sizes, f"{ranks} ranks, {number}", "no") for number, sizes in enumerate(WITH_OTHERS[ranks])]
    run_ranks(train, ranks, folder, runs)
    for _, name, _ in runs:
        assert follows(folder / name, folder)
        assert validate(load(folder / name)) == pytest.approx(metrics(folder / name)[-1]["validation"], abs=1e-5)


def test_other_choices_follow_one_process_and_what_is_validated_are_the_weights_of_then(tmp_path_factory):
    with_others(2, tmp_path_factory.mktemp("others"))


@pytest.mark.slow
def test_other_choices_on_meshes_of_two_dimensions_follow_one_process(tmp_path_factory):
    with_others(4, tmp_path_factory.mktemp("others"))


@pytest.mark.parametrize("dimension", ["shard", "chunk", "tensor"])
def test_ranks_that_share_blocks_do_not_compile(tmp_path, dimension):
    with pytest.raises(InputError, match=rf"compile = true cannot go with mesh\.{dimension} = 2"):
        recipe(tmp_path, compile=True).changed(f"mesh.{dimension}=2")


def half(run, folder):
    """A copy of a run as it was in the middle."""
    shutil.copytree(run, folder)
    shutil.rmtree(checkpoints(folder)[0])


def test_any_number_of_ranks_goes_on_with_a_checkpoint(alone):
    """Of one process on two ranks, by each mesh, and of two that share weights on one."""
    runs = [(sizes, f"on {number}", "last") for number, sizes in enumerate(MESHES[2])]
    for _, name, _ in runs:
        half(alone / "run", alone / name)
    run_ranks(train, 2, alone, runs)
    assert all(follows(alone / name, alone) for _, name, _ in runs)
    half(alone / "on 1", alone / "back")
    Trainer(of_run(alone), alone / "back", resume="last").train(validate=validate)
    assert follows(alone / "back", alone)


def lose(rank, folder):
    """A run whose second rank ends in mid-step; what the other one says."""
    ranks = Together(MeshSizes(chunk=2), torch.device("cpu"))
    trainer = Trainer(of_run(folder), folder / "lost", ranks=ranks)
    if rank == 1:
        trainer.ranks.sum_gradients = lambda model: os._exit(9)
    with pytest.raises(RankLost) as raised, ranks.together():
        trainer.train()
    return str(raised.value)


def test_a_lost_rank_ends_the_others_with_a_line(alone):
    said, _ = run_ranks(lose, 2, alone, check=False)
    assert said.startswith("rank 0 of 2: another rank was lost")
    assert "--resume last" in said
