"""Checkpoints of which every rank writes its part: read by any number of ranks, and whole or not there."""

import json
import os
from pathlib import Path

import pytest
import torch

from megalodon_lm import Megalodon
from megalodon_lm.errors import InputError
from megalodon_lm.parallel.mesh import MeshSizes
from megalodon_lm.parallel.ranks import Ranks, Together
from megalodon_lm.training.averaging import WeightAverage
from megalodon_lm.training.checkpoint import Checkpoint, export, newest
from megalodon_lm.training.manifest import checksum, is_whole
from megalodon_lm.training.optimizer import build_optimizer
from megalodon_lm.training.recipe import TrainingRecipe
from megalodon_lm.training.snapshot import capture, reinstate

from .processes import megalodon
from .ranks import run_ranks
from .test_cut_invariant import CHUNK, build

ROWS, LENGTH = 4, CHUNK + 5
PROGRESS = {"tokens": 1, "seconds": 0.5, "usual_loss": None, "place": [3, 4], "data": "text", "best": None}


class Training:
    """A few steps of a small model, as they are of the trainer, over the ranks of a mesh.

    Args:
        optimizer: of the recipe.
        shape: of the mesh; None for one process.
    """

    def __init__(self, optimizer, shape=None):
        self.model = build(num_heads=4, vocab_size=31)
        self.ranks = Ranks() if shape is None else Together(MeshSizes(*shape), torch.device("cpu"))
        self.reader = self.ranks.apply(self.model, None)
        self.optimizer = build_optimizer(self.model, TrainingRecipe(optimizer=optimizer, learning_rate=0.01), "float32")
        self.average, self.state, self.step = WeightAverage(self.model, 0.9), None, 0

    def losses(self, count):
        """Of so many steps."""
        found = []
        for _ in range(count):
            drawing = torch.Generator().manual_seed(self.step)
            rows = self.ranks.rows(ROWS)
            tokens = torch.randint(0, 31, (ROWS, LENGTH + 1), generator=drawing)[rows.start : rows.stop]
            self.optimizer.zero_grad()
            loss, state = self.reader(tokens[:, :-1], self.state, targets=tokens[:, 1:])
            loss = loss * len(rows) / ROWS
            loss.backward()
            self.state = state.detach()
            self.ranks.sum_gradients(self.model)
            self.optimizer.step()
            self.average.update(self.model)
            self.step += 1
            found.append(self.ranks.total(loss.item()))
        return found

    def save(self, run):
        held = capture(self.model, self.optimizer, self.average, self.state, self.ranks, ROWS)
        Checkpoint(self.step, self.model.config, *held, PROGRESS).write(Path(run), "the run", self.ranks)

    def resume(self, run):
        checkpoint, _ = newest(Path(run), "the run", False, self.ranks)
        self.state = reinstate(checkpoint, self.model, self.optimizer, self.average, self.ranks, ROWS)
        self.step, self.average.steps = checkpoint.step, checkpoint.step
        return self


def go_on(rank, optimizer, run, begun, shapes):
    """Losses after a checkpoint that is written here: of the run itself, and of those that resume it."""
    found = {}
    if begun is not None:
        training = Training(optimizer, begun)
        training.losses(3)
        training.save(run)
        found["itself"] = training.losses(2)
    for shape in shapes:
        found[shape] = Training(optimizer, shape).resume(run).losses(2)
    return found


def on_any(optimizer, run, begun, shapes):
    """The losses go on the same wherever a checkpoint is resumed; all of them follow one process."""
    alone = Training(optimizer)
    alone.losses(3)
    if begun is None:
        alone.save(run)
    expected = alone.losses(2)
    found = []
    for count in (2, 4) if begun is not None and torch.Size(begun).numel() == 2 else (4, 2):  # who writes is first
        here = [s for s in shapes if torch.Size(s).numel() == count]
        writes = begun if begun is not None and torch.Size(begun).numel() == count else None
        if here or writes:
            found += run_ranks(go_on, count, optimizer, str(run), writes, here, timeout=500)
    found.append({"one process": Training(optimizer).resume(run).losses(2)})
    for losses in found:
        for case, actual in losses.items():
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0, msg=f"{case}: {actual} {expected}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint of two ranks, compared with one process and with two ranks that share otherwise."""
    folder = tmp_path_factory.mktemp("run")
    on_any("adamw", folder, (1, 1, 1, 2), [(1, 2, 1, 1)])
    return folder


def test_two_ranks_go_on_as_one_and_as_two_that_share_otherwise(run):
    assert is_whole(run / "checkpoints" / "step-00000003", "the run")


SHAPES = [(1, 2, 1, 2), (1, 4, 1, 1), (1, 1, 1, 4), (2, 1, 1, 2), (1, 2, 1, 1), (1, 1, 1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("begun", [(1, 2, 1, 2), (1, 4, 1, 1), (1, 1, 1, 2), None])
def test_any_mesh_goes_on_from_any_other(tmp_path, optimizer, begun):
    on_any(optimizer, tmp_path, begun, SHAPES)


def copied(run, folder):
    """The checkpoint of the run, in another run."""
    target = folder / "checkpoints" / "step-00000003"
    for path in (run / "checkpoints" / "step-00000003").rglob("*"):
        if path.is_file():
            other = target / path.relative_to(run / "checkpoints" / "step-00000003")
            other.parent.mkdir(parents=True, exist_ok=True)
            other.write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name", ["shards/__1_0.distcp", "shards/.metadata", "config.json", "progress.json"])
def test_a_damaged_file_is_refused_by_name_and_its_checkpoint_passed_over(run, tmp_path, name):
    target = copied(run, tmp_path)
    older = tmp_path / "checkpoints" / "step-00000002"
    older.mkdir()
    for path in target.rglob("*"):
        if path.is_file():
            (older / path.relative_to(target)).parent.mkdir(exist_ok=True)
            (older / path.relative_to(target)).write_bytes(path.read_bytes())
    manifest = json.loads((older / "manifest.json").read_text())
    del manifest["checksum"]
    manifest["step"] = 2
    (older / "manifest.json").write_text(json.dumps({**manifest, "checksum": checksum(manifest)}))
    damaged = bytearray((target / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (target / name).write_bytes(damaged)
    with pytest.raises(InputError, match=Path(name).name):
        newest(tmp_path, "the run", accept_older=False)
    found, passed = newest(tmp_path, "the run", accept_older=True)
    assert found is not None
    assert len(passed) == 1
    assert Path(name).name in passed[0]
    (target / name).unlink()
    with pytest.raises(InputError, match=f"{Path(name).name} is missing"):
        newest(tmp_path, "the run", accept_older=False)


def test_another_runs_checkpoint_is_refused(run, tmp_path):
    copied(run, tmp_path)
    with pytest.raises(InputError, match="belongs to another run, the run"):
        newest(tmp_path, "another", accept_older=False)


def test_its_model_is_consolidated_into_a_folder_like_any_other(run, tmp_path):
    path = run / "checkpoints" / "step-00000003"
    export(path, tmp_path)
    model = Megalodon.load(tmp_path)
    training = Training("adamw")
    training.losses(3)
    for name, weight in training.average.weights.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=1e-10, atol=1e-12)


def test_the_command_converts_it(run, tmp_path):
    path = run / "checkpoints" / "step-00000003"
    assert megalodon("convert", path, "--to", "native", "--out", tmp_path / "model").returncode == 0
    export(path, tmp_path)
    assert Megalodon.load(tmp_path / "model").fingerprint() == Megalodon.load(tmp_path).fingerprint()


def lost(rank, run, at):
    """Write two checkpoints; the second rank dies before one of its files, or the first before one of its own."""
    training = Training("adamw", (1, 1, 1, 2))
    training.losses(1)
    training.save(run)
    training.losses(1)
    who, count = at
    if rank == who:
        die_at(count)
    training.save(run)


def die_at(count):
    """End the process without a word at that call of os.fsync from now on."""
    calls, real = [0], os.fsync

    def fsync(descriptor):
        calls[0] += 1
        if calls[0] == count:
            os._exit(9)
        real(descriptor)

    os.fsync = fsync


def killed(folder, at):
    run_ranks(lost, 2, str(folder), at, check=False, timeout=60)
    found, passed = newest(folder, "the run", accept_older=False)
    assert found.step == 1
    assert not passed
    assert [p.name for p in (folder / "checkpoints").glob("step-*")] == ["step-00000001"]


def test_a_rank_that_dies_while_it_writes_leaves_the_checkpoint_before(tmp_path):
    killed(tmp_path, (1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("at", [(0, 1), (0, 2), (0, 3), (0, 5), (0, 8)])
def test_the_first_rank_dies_anywhere_before_the_new_one_has_its_name(tmp_path, at):
    killed(tmp_path, at)


def full(rank, run):
    training = Training("adamw", (1, 1, 1, 2))
    training.losses(1)
    if rank == 1:
        os.fsync = refuse
    try:
        training.save(run)
    except InputError as error:
        return str(error)


def refuse(descriptor):
    raise OSError(28, "No space left on device")


def test_a_full_disk_of_one_rank_is_told_by_all_and_leaves_nothing(tmp_path):
    for said in run_ranks(full, 2, str(tmp_path)):
        assert said is not None
        assert "step-00000001" in said
        assert "No space left on device" in said
    assert not list((tmp_path / "checkpoints").iterdir())
