"""Ranks started by the command itself and by torchrun, and what the examples in docs/ say."""

import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megalodon_lm import ByteTokenizer
from megalodon_lm.cli.commands import parse
from megalodon_lm.errors import InputError, RankLost
from megalodon_lm.generation.context import Context
from megalodon_lm.parallel import launch
from megalodon_lm.parallel.launch import LOST
from megalodon_lm.parallel.mesh import MeshSizes
from megalodon_lm.processors import num_processors
from megalodon_lm.training.checkpoint import checkpoints, step_of

from .processes import wait_until
from .runs import metrics, recipe, steps

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

    given = get_args_parser().parse_args([*own, "megalodon_lm", *ours])
    assert given.module
    command = parse(ours)
    assert command.save if ours[0] == "read" else command.recipe.name == "recipe.toml"


def test_examples_for_torchrun_parse():
    text = (DOCS / "distributed.md").read_text()
    commands = text.split("    torchrun ")[1:]
    assert len(commands) == 3
    for command in commands:
        check(*words_of(command.split("\n\n")[0].split("\n    torchrun")[0]))


def test_commands_in_the_documentation_parse():
    lines = [line for line in (DOCS / "distributed.md").read_text().splitlines() if line.startswith("    megalodon ")]
    assert len(lines) == 5
    for line in lines:
        parse(line.split()[1:])


def test_the_example_for_slurm_parses():
    path = DOCS / "launch" / "slurm.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    settings, text = path.read_text().split("srun torchrun")
    warned = int(settings.split("--signal=TERM@")[1].split()[0])  # seconds before the end
    assert int(settings.split("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=")[1].split()[0]) < warned
    text = text.replace('"$SLURM_NNODES"', "4")
    check(*words_of(text.replace('"', "")))


def test_the_example_for_kubernetes_parses():
    given = yaml.safe_load((DOCS / "launch" / "jobset.yaml").read_text())
    name, jobs = given["metadata"]["name"], given["spec"]["replicatedJobs"][0]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    command, environment = container["command"], {e["name"]: e["value"] for e in container["env"]}
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert f"--rdzv-endpoint={name}-{jobs['name']}-0-0.{name}:29500" in command
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in command
    at = command.index("megalodon_lm")
    check(command[1:at], command[at + 1 :])
    assert f"--nnodes={job['parallelism']}" in command


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system holds no process to some processors")
def test_a_job_that_is_held_to_one_processor_plans_with_one():
    held = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    asked = f"{held}; from megalodon_lm.processors import num_processors; print(num_processors())"
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout == "1\n"
    assert num_processors() == len(os.sched_getaffinity(0))


def failures(*codes):
    """Of ranks in the order in which they ended, and some seconds later."""
    return {
        rank: SimpleNamespace(exitcode=code, timestamp=at + sum(later)) for at, (rank, code, *later) in enumerate(codes)
    }


@pytest.mark.parametrize(
    ("codes", "found"),
    [
        (((2, LOST), (1, -9), (0, -15)), "rank 1 of 4 was ended by signal 9"),
        (((3, 2), (0, LOST), (1, -9)), 2),
        (((3, 130), (0, 130)), 130),
        (((0, LOST), (1, -9, 29)), "rank 1 of 4 did not answer in time"),
        (((0, LOST), (1, LOST), (2, -15)), "one of 4 ranks was lost or did not answer in time"),
    ],
)
def test_the_command_ends_as_the_rank_did_that_the_others_fell_with(codes, found):
    if isinstance(found, int):
        assert launch._judged(failures(*codes), 4) == found
    else:
        with pytest.raises(RankLost, match=found):
            launch._judged(failures(*codes), 4)


def test_ranks_of_one_machine_say_the_same_once(tmp_path, monkeypatch):
    monkeypatch.delenv(launch.LAUNCHED, raising=False)
    for rank in "01":
        file = tmp_path / rank / "error.json"
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        file.parent.mkdir()
        first = rank == "0"
        assert launch.to_say(InputError("a"), "a") == first
        assert launch.to_say(RankLost("lost to " + rank), "lost to " + rank) == first
        assert launch.to_say(KeyboardInterrupt(), "interrupted") == first
        assert launch.to_say(InputError(rank), rank)
    monkeypatch.setenv(launch.LAUNCHED, "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "other" / "0" / "error.json"))
    assert not launch.to_say(RankLost("lost"), "lost")  # the command says it
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert launch.to_say(RankLost("lost"), "lost")


def test_commands_of_one_process_are_not_run_by_many(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="megalodon info is one process and cannot be shared"):
        parse(["info", "tiny"])
    assert parse(["train", "quickstart"]).ranks == 1


@pytest.mark.parametrize("options", [["--ranks", "0"], ["--restarts", "2"], ["--ranks", "2", "--restarts", "-1"]])
def test_numbers_of_ranks_that_cannot_be(options, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match=f"{options[-2]} {options[-1]} must"):
        parse(["train", "quickstart", "--out", str(tmp_path / "run"), *options]).run()


CHOICES = {"length": 48, "batch_size": 2, "steps": 30, "warmup_steps": 2, "checkpoint_steps": 2, "keep_checkpoints": 1}


def begin(folder, command, **environment):
    """A command, begun; what it says goes into files: a pipe that nobody empties would stop the ranks."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "MEGALODON_RANK_TIMEOUT": "120", **environment}
    with (folder / "said").open("w") as said, (folder / "printed").open("w") as printed:
        words = [sys.executable, "-m", *map(str, command)]
        return subprocess.Popen(words, env=settings, stderr=said, stdout=printed, cwd=folder)


def training(folder, out, *options, **data):
    """The words of a command that trains with a recipe in the folder."""
    path = folder / "recipe.toml"
    path.write_text(recipe(folder, {"dropout": 0.0, "chunk_size": 16, "num_layers": 2}, data, **CHOICES).to_toml())
    return ["megalodon_lm", "train", path, "--out", out, *map(str, options)]


def start(folder, out, *options):
    """A run of a recipe with a mesh, begun."""
    return begin(folder, training(folder, out, "--quiet", *options))


def said(folder):
    """On its standard error."""
    return (folder / "said").read_text()


def wait_for_a_step(folder, run, process):
    """Until the metrics of one have been written."""
    wait_until(lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text()) > 0, process,
               lambda: said(folder))  # fmt: skip


def ranks_of(agent):
    """Their process numbers."""
    return Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()


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
        if children := ranks_of(agent):
            os.kill(int(chosen.choice(children)), signal.SIGKILL)
    assert agent.wait() == 0, said(tmp_path)
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_a_rank_killed_without_restarts_ends_the_command_with_a_line(tmp_path):
    agent = start(tmp_path, tmp_path / "run", "--ranks", 2, "--set", "training.steps=100000")
    wait_for_a_step(tmp_path, tmp_path / "run", agent)
    os.kill(int(ranks_of(agent)[-1]), signal.SIGKILL)
    assert agent.wait() == LOST
    (line,) = said(tmp_path).splitlines()
    assert "was ended by signal 9; --resume last" in line


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_ranks_once_with_a_checkpoint(tmp_path, number):
    """Sent to the command; and another one soon after, as of a batch system that signals every process."""
    run = tmp_path / "run"
    agent = begin(tmp_path, training(tmp_path, run, "--ranks", 2, "--set", "mesh.chunk=2", "training.steps=100000"))
    wait_for_a_step(tmp_path, run, agent)
    if number == signal.SIGTERM:
        for rank in ranks_of(agent):
            os.kill(int(rank), number)
    agent.send_signal(number)
    assert agent.wait() == 130, said(tmp_path)
    first, last = said(tmp_path).splitlines()
    assert first.startswith("training ")
    assert last.startswith("interrupted after ")
    assert (tmp_path / "printed").read_text() == f"{run}/training.md\n"
    assert step_of(checkpoints(run)[0]) == steps(run)[-1]


@pytest.mark.slow
def test_plain_torchrun_says_and_writes_everything_once(tmp_path):
    run = tmp_path / "run"
    own = ["torch.distributed.run", "--nproc-per-node", 2, "-m"]
    options = ("--tensorboard", "--set", "mesh.chunk=2", "training.steps=4", "training.validate_steps=2",
               "training.validate_bytes=200")  # fmt: skip
    agent = begin(tmp_path, [*own, *training(tmp_path, run, *options, prompt="abc")])
    assert agent.wait() == 0, said(tmp_path)
    assert (tmp_path / "printed").read_text() == f"{run}/training.md\n"
    for line in ("training ", "step 2: ", "step 4: "):
        assert said(tmp_path).count(f"\n{line}") + said(tmp_path).startswith(line) == 1, said(tmp_path)
    assert steps(run) == [1, 2, 3, 4]
    assert (run / "samples.txt").read_text().count(" bits per byte\nabc") == 2
    assert len(list(run.glob("events.*"))) == 1


FAULT = """
import os
if os.environ.get("RANK") == "1":
    import megalodon_lm.training.trainer as trainer
    def step(self, *args):
        {what}
    trainer.Trainer._step = step
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("raise MemoryError('out of memory')", 2, "megalodon: error: not enough memory"),
        (
            "from megalodon_lm.errors import InputError; raise InputError('nothing left')",
            2,
            "megalodon: error: nothing",
        ),
        ("os.kill(os.getpid(), 19)", LOST, "did not answer in time; --resume last"),
    ],
)
def test_a_fault_of_one_rank_is_one_line(tmp_path, what, code, line):
    """Of the second rank, which runs out of memory, meets wrong input, or stands still."""
    (tmp_path / "sitecustomize.py").write_text(FAULT.format(what=what))
    words = training(tmp_path, tmp_path / "run", "--quiet", "--ranks", 2)
    agent = begin(tmp_path, words, PYTHONPATH=str(tmp_path), MEGALODON_RANK_TIMEOUT="10")
    assert agent.wait() == code, said(tmp_path)
    (only,) = said(tmp_path).splitlines()
    assert line in only


@pytest.mark.slow
@pytest.mark.parametrize("own", [[], ["torch.distributed.run", "--nproc-per-node", "4", "-m"]])
def test_what_is_wrong_for_all_ranks_is_said_once(tmp_path, own):
    words = training(tmp_path, tmp_path / "run", *([] if own else ["--ranks", "4"]))
    agent = begin(tmp_path, [*own, *words])
    assert agent.wait() == (1 if own else 2)
    assert said(tmp_path).count("2 rows cannot be shared by 4 ranks") == 1
    assert own or len(said(tmp_path).splitlines()) == 1, said(tmp_path)


@pytest.mark.slow
def test_a_book_from_standard_input_is_read_by_two_processes(saved, tiny, tmp_path):
    text = (b"a book of some length. " * 200)[:3001]
    (tmp_path / "in").write_bytes(text)
    books = []
    for ranks in (1, 2):
        books.append(tmp_path / f"{ranks}.state")
        command = f"cat in | {sys.executable} -m megalodon_lm read {saved} - --save {books[-1]} --precision float32"
        done = subprocess.run(f"{command} --ranks {ranks}", shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{books[-1]}: 3,002 tokens")
        assert done.stderr == ""
    one, two = (Context.load(book, tiny, ByteTokenizer(), "float32") for book in books)
    assert one.position == two.position == 3002
    assert two.loss() == pytest.approx(one.loss(), abs=1e-6)
