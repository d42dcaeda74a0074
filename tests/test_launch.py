"""Ranks started by the command itself and by torchrun, and what the examples in docs/ say."""

import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from megalodon_lm.parallel.mesh import MeshSizes

from .runs import metrics, recipe

DOCS = Path(__file__).parent.parent / "docs"


def test_the_mesh_in_the_documentation_is_the_table_of_a_recipe():
    text = (DOCS / "distributed.md").read_text()
    table = tomllib.loads(text.split("```toml\n")[1].split("```")[0])["mesh"]
    assert list(table) == list(MeshSizes.__dataclass_fields__)
    MeshSizes(**table).check()


def words_of(lines):
    """The words of torchrun's command line and of this package's."""
    words = " ".join(lines.replace("\\\n", " ").split()).split(" ")
    at = words.index("megalodon_lm")
    return words[:at], words[at + 1 :]


def check(own, ours):
    """torchrun's parser and that of the command take them."""
    from torch.distributed.run import get_args_parser

    from megalodon_lm.cli.commands import parse

    given = get_args_parser().parse_args([*own, "megalodon_lm", *ours])
    assert given.module
    assert parse(ours).recipe.name == "recipe.toml"


def test_examples_for_torchrun_parse():
    text = (DOCS / "distributed.md").read_text()
    commands = text.split("    torchrun ")[1:]
    assert len(commands) == 2
    for command in commands:
        check(*words_of(command.split("\n\n")[0].split("\n    torchrun")[0]))


def test_the_example_for_slurm_parses():
    path = DOCS / "launch" / "slurm.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text().split("srun torchrun")[1].replace('"$SLURM_NNODES"', "4")
    check(*words_of(text.replace('"', "")))


def test_the_example_for_kubernetes_parses():
    spec = yaml.safe_load((DOCS / "launch" / "jobset.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    command = job["template"]["spec"]["containers"][0]["command"]
    at = command.index("megalodon_lm")
    check(command[1:at], command[at + 1 :])
    assert f"--nnodes={job['parallelism']}" in command


CHOICES = {"length": 48, "batch_size": 2, "steps": 30, "warmup_steps": 2, "checkpoint_steps": 2, "keep_checkpoints": 1}


def start(folder, out, *options):
    """A run of a recipe with a mesh, begun."""
    path = folder / "recipe.toml"
    path.write_text(recipe(folder, {"dropout": 0.0, "chunk_size": 16, "num_layers": 2}, **CHOICES).to_toml())
    command = [sys.executable, "-m", "megalodon_lm", "train", path, "--out", out, "--quiet", *map(str, options)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "MEGALODON_RANK_TIMEOUT": "120"}
    with (folder / "said").open("w") as said:  # no pipe: one that nobody empties would stop the ranks
        return subprocess.Popen(command, env=settings, stderr=said, cwd=folder)


def said(folder):
    """On its standard error."""
    return (folder / "said").read_text()


def losses(run):
    return [m["bits_per_token"] for m in metrics(run)]


@pytest.mark.slow
def test_killed_ranks_start_again_and_the_losses_are_those_of_an_undisturbed_run(tmp_path):
    """One of four, in the middle of whatever it does, ten times."""
    undisturbed = start(tmp_path, tmp_path / "one")
    assert undisturbed.wait() == 0, said(tmp_path)
    run = tmp_path / "four"
    agent = start(tmp_path, run, "--ranks", 4, "--restarts", 10, "--set", "mesh.chunk=2")
    chosen = random.Random(0)
    for _ in range(10):
        before = len(losses(run)) if (run / "metrics.jsonl").exists() else 0
        while not (run / "metrics.jsonl").exists() or len(losses(run)) == before:
            assert agent.poll() is None, said(tmp_path)
            time.sleep(0.05)
        time.sleep(chosen.uniform(0, 0.5))
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        if children:
            os.kill(int(chosen.choice(children)), signal.SIGKILL)
    assert agent.wait() == 0, said(tmp_path)
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_a_rank_killed_without_restarts_ends_the_command_with_a_line(tmp_path):
    agent = start(tmp_path, tmp_path / "run", "--ranks", 2, "--set", "training.steps=100000")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert agent.poll() is None, said(tmp_path)
        time.sleep(0.05)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert agent.wait() == 2
    assert "was ended by signal 9; --resume last goes on" in said(tmp_path)
