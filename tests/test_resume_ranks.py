"""Runs that ranks begin, that end in whatever way, and that other numbers of ranks or one process go on with."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megalodon_lm import Megalodon
from megalodon_lm.errors import InputError
from megalodon_lm.files import digest
from megalodon_lm.parallel.mesh import MeshSizes
from megalodon_lm.parallel.ranks import Together
from megalodon_lm.training.checkpoint import checkpoints, is_sharded, newest
from megalodon_lm.training.manifest import checksum
from megalodon_lm.training.run_record import identity
from megalodon_lm.training.trained import load
from megalodon_lm.training.trainer import Trainer

from .processes import megalodon
from .ranks import run_ranks
from .runs import metrics, recipe

CHOICES = {
    "length": 32, "batch_size": 3, "steps": 8, "warmup_steps": 2, "checkpoint_steps": 4, "accumulate": 2,
    "learning_rate": 1e-3, "average": 0.8, "optimizer": "muon",
}  # fmt: skip
MODEL = {"dropout": 0.0, "chunk_size": 16, "num_layers": 1, "num_heads": 2}
MESHES = [{"shard": 2, "replicate": 1}, {"tensor": 2}, {"chunk": 2}]


def of_run(folder, **changes):
    return recipe(folder, {**MODEL, "dropout": changes.pop("dropout", 0.0)}, {"section": 150}, **{**CHOICES, **changes})


class Stopped(Exception):
    pass


def stop(metrics):
    if metrics.step == 6:
        raise Stopped


def train(rank, folder, runs):
    """Runs, each with the sizes of its mesh, its name and so on; what stops is cut off two steps after a checkpoint."""
    torch.set_num_threads(1)
    for sizes, name, resume, changes, stops in runs:
        ranks = Together(MeshSizes(**sizes), torch.device("cpu"))
        trainer = Trainer(of_run(folder, **changes), folder / name, ranks=ranks, resume=resume)
        if not stops:
            trainer.train()
            continue
        with pytest.raises(Stopped):
            trainer.train(stop)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of one process, and two that were cut off, of ranks that share weights, and layers."""
    folder = tmp_path_factory.mktemp("runs")
    Trainer(of_run(folder), folder / "alone").train()
    run_ranks(train, 2, folder, [(sizes, f"cut {n}", "no", {}, True) for n, sizes in enumerate(MESHES[:2])])
    return folder


def losses(run):
    return [m["bits_per_token"] for m in metrics(run)]


def test_one_process_goes_on_with_what_ranks_began(runs):
    for number in range(2):
        run = runs / f"back {number}"
        shutil.copytree(runs / f"cut {number}", run)
        assert is_sharded(checkpoints(run)[0])
        assert not (run / "model.safetensors").exists()
        trainer = Trainer(of_run(runs), run, resume="last")
        assert trainer.step == 4
        assert trainer.train()
        assert losses(run) == pytest.approx(losses(runs / "alone"), abs=1e-5)
        weights, expected = (dict(Megalodon.load(folder).named_parameters()) for folder in (run, runs / "alone"))
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


def test_commands_read_a_run_that_was_cut_off(runs, tmp_path):
    run = runs / "cut 0"
    path = checkpoints(run)[0]
    assert load(run).fingerprint() == load(path).fingerprint()
    assert '"parameters"' in megalodon("info", run, "--json").stdout
    text = tmp_path / "text"
    text.write_bytes(b"abcdefgh" * 20)
    found = []
    for folder in (run, path, tmp_path / "model"):
        if folder == tmp_path / "model":
            assert megalodon("convert", run, "--to", "native", "--out", folder).returncode == 0
        made = megalodon("evaluate", "perplexity", folder, text, "--json", tmp_path / "figures", "--quiet")
        assert made.returncode == 0, made.stderr
        found.append((tmp_path / "figures").read_text().replace(str(folder), ""))
        (tmp_path / "figures").unlink()
    assert found[0] == found[1] == found[2]
    begun = recipe(
        tmp_path, {"size": None, "dropout": 0.0}, {"tokenizer": str(run)}, begin_from=str(run), steps=1, warmup_steps=0
    )
    assert Trainer(begun, tmp_path / "begun").model.fingerprint() == load(run).fingerprint()


def test_an_exported_model_is_never_older_than_the_checkpoints(runs):
    """A finished run of one process that two ranks prolong: until they end, the newest checkpoint holds the model."""
    run = runs / "longer"
    shutil.copytree(runs / "alone", run)
    before = load(run).fingerprint()
    longer = {"steps": 12, "checkpoint_steps": 2}
    run_ranks(prolong, 2, runs, longer)
    assert not (run / "model.safetensors").exists()
    cut = load(run).fingerprint()
    assert cut != before
    run_ranks(train, 2, runs, [({"chunk": 2}, "longer", "last", longer, False)])
    assert load(run).fingerprint() == Megalodon.load(run).fingerprint() != cut


def prolong(rank, folder, changes):
    ranks = Together(MeshSizes(shard=2, replicate=1), torch.device("cpu"))
    trainer = Trainer(of_run(folder, **changes), folder / "longer", ranks=ranks, resume="last")

    def cut(metrics):
        if metrics.step == 11:
            raise Stopped

    with pytest.raises(Stopped):
        trainer.train(cut)


def test_the_same_ranks_go_on_with_the_same_random_numbers(runs):
    """With dropout, to the last bit: every rank has numbers of its own."""
    sizes, changes = {"replicate": 2}, {"dropout": 0.2}
    kinds = [("whole", "no", False), ("parts", "no", True), ("parts", "last", False)]
    run_ranks(train, 2, runs, [(sizes, name, resume, changes, stops) for name, resume, stops in kinds])
    assert losses(runs / "parts") == losses(runs / "whole")


def rewind(rank, folder):
    """A run whose fifth step spoils its loss, and that goes back to its checkpoint."""
    ranks = Together(MeshSizes(chunk=2), torch.device("cpu"))
    trainer = Trainer(of_run(folder, bad_step="rewind"), folder / "rewound", ranks=ranks)
    judge, told = trainer.bad_steps.judge, []

    def spoilt(step, loss, norm):
        if step == 5 and not told:
            told.append(step)
            return judge(step, float("nan"), norm)
        return judge(step, loss, norm)

    trainer.bad_steps.judge = spoilt
    assert trainer.train()


def test_ranks_go_back_together(runs):
    run_ranks(rewind, 2, runs)
    assert [m["step"] for m in metrics(runs / "rewound")] == list(range(1, 9))
    assert any("went back from step 6" in m["event"] for m in metrics(runs / "rewound"))


def again_described(path, **changes):
    """The manifest of a checkpoint for its files as they are now."""
    manifest = json.loads((path / "manifest.json").read_bytes()) | changes
    del manifest["checksum"]
    manifest["files"] = {name: digest(path / name) for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps({**manifest, "checksum": checksum(manifest)}))


def blind(rank, folder):
    """The second rank writes to a disk that the first one does not see."""
    ranks = Together(MeshSizes(shard=2, replicate=1), torch.device("cpu"))
    trainer = Trainer(of_run(folder), folder / f"blind {rank}", ranks=ranks)
    trainer.folder.mkdir(exist_ok=True)
    with pytest.raises(InputError) as raised:
        trainer.train()
    return str(raised.value)


def test_ranks_without_a_common_disk_end_with_a_line(runs):
    for said in run_ranks(blind, 2, runs):
        assert "shards/__1_0.distcp, which another rank has written, is not there" in said


def refused(rank, folder):
    """Rows that cannot be shared; a damaged file, of which one rank alone finds it."""
    ranks = Together(MeshSizes(replicate=2), torch.device("cpu"))
    said = []
    for changes, name, resume in (({"batch_size": 1}, "none", "no"), ({}, "damaged", "last")):
        with pytest.raises(InputError) as raised:
            Trainer(of_run(folder, **changes), folder / name, ranks=ranks, resume=resume)
        said.append(str(raised.value))
    trainer = Trainer(of_run(folder), folder / "damaged", ranks=ranks, resume="auto")
    return said, trainer.step, trainer.notes


def test_what_one_rank_refuses_all_refuse_with_the_same_line_and_nothing_is_written(runs):
    run = runs / "damaged"
    shutil.copytree(runs / "cut 0", run)
    older = checkpoints(run)[0]
    path = older.with_name("step-00000006")
    shutil.copytree(older, path)
    again_described(path, step=6)
    damaged = bytearray((path / "shards" / "__1_0.distcp").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (path / "shards" / "__1_0.distcp").write_bytes(damaged)
    found = run_ranks(refused, 2, runs)
    assert found[0] == found[1]
    said, step, notes = found[0]
    assert "1 rows cannot be shared by 2 ranks; raise training.batch_size" in said[0]
    assert not (runs / "none").exists()
    assert "step-00000006/shards/__1_0.distcp was altered" in said[1]
    assert step == 4
    assert "passed over" in notes[0]


def test_a_command_refuses_rows_that_cannot_be_shared_before_it_starts_ranks(runs, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(of_run(tmp_path).to_toml())
    made = megalodon("train", path, "--out", tmp_path / "run", "--ranks", 4)
    assert made.returncode == 2
    assert made.stderr.count("\n") == 1
    assert "3 rows cannot be shared by 4 ranks" in made.stderr
    assert not (tmp_path / "run").exists()


def test_a_description_of_shards_that_is_a_program_does_not_run(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "cut 0", run)
    path = checkpoints(run)[0]
    (path / "shards" / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    again_described(path)
    with pytest.raises(InputError, match=r"cannot be understood: .*os.system does not belong"):
        load(path)
    assert not (tmp_path / "ran").exists()


def start(folder, out, *options):
    """The command as it is given, as processes of its own."""
    command = [sys.executable, "-m", "megalodon_lm", "train", folder / "recipe.toml", "--out", out, "--quiet"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "MEGALODON_RANK_TIMEOUT": "200"}
    with (folder / "said").open("w") as said:
        return subprocess.Popen([*command, *map(str, options)], env=settings, stderr=said, cwd=folder)


def finish(folder, out, *options):
    assert start(folder, out, *options).wait() == 0, (folder / "said").read_text()


def set_mesh(sizes):
    return ["--set", *(f"mesh.{name}={size}" for name, size in sizes.items())]


SQUARES = [
    {"replicate": 1, "shard": 2, "tensor": 2}, {"replicate": 2, "chunk": 2}, {"replicate": 1, "chunk": 2, "tensor": 2},
]  # fmt: skip
OTHERS = [
    (1, {}),
    (2, {"replicate": 1, "shard": 2}), (2, {"replicate": 1, "tensor": 2}),
    (4, {"replicate": 1, "shard": 2, "chunk": 2}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("square", SQUARES)
def test_what_2_x_2_began_1_2_and_4_go_on_with_by_the_command(tmp_path, square):
    (tmp_path / "recipe.toml").write_text(of_run(tmp_path, batch_size=4).to_toml())
    finish(tmp_path, tmp_path / "alone")
    finish(tmp_path, tmp_path / "began", "--ranks", 4, *set_mesh(square))
    assert losses(tmp_path / "began") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    shutil.rmtree(checkpoints(tmp_path / "began")[0])
    for number, (ranks, sizes) in enumerate(OTHERS):
        run = tmp_path / f"run {number}"
        shutil.copytree(tmp_path / "began", run)
        finish(tmp_path, run, "--resume", "last", *(["--ranks", ranks, *set_mesh(sizes)] if sizes else []))
        assert losses(run) == pytest.approx(losses(tmp_path / "alone"), abs=1e-5), (ranks, sizes)


@pytest.mark.slow
def test_ranks_killed_while_they_save_leave_a_whole_checkpoint(tmp_path):
    """One of two, as soon as a checkpoint is seen that is being written; both go on, with another mesh each time."""
    choices = {"batch_size": 2, "steps": 40, "checkpoint_steps": 1, "accumulate": 1}
    (tmp_path / "recipe.toml").write_text(of_run(tmp_path, **choices).to_toml())
    finish(tmp_path, tmp_path / "alone")
    run, chosen, kills = tmp_path / "run", random.Random(1), 0
    for attempt in range(4):
        agent = start(
            tmp_path, run, "--ranks", 2, "--resume", "auto", *set_mesh({"replicate": 1, **MESHES[attempt % 3]})
        )
        seen = newest_step(run)
        while agent.poll() is None:
            time.sleep(0.002)
            if list((run / "checkpoints").glob(".step-*")) and newest_step(run) > seen + 2:
                children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
                os.kill(int(chosen.choice(children)), signal.SIGKILL)
                kills += 1
                break
        agent.wait()
        if checkpoints(run):
            assert newest(run, identity(run), accept_older=False)[0].step == newest_step(run)
    assert kills >= 2
    finish(tmp_path, run, "--resume", "last")
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


def newest_step(run):
    return max((int(re.sub(r"\D", "", path.name)) for path in checkpoints(run)), default=0)
