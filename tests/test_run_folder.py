"""The folder of a run: made when all is in order, held by one process, never overwritten."""

import errno
import json
import shutil
import subprocess
import sys
import types

import pytest
import torch

from megalodon_lm.cli.main import main
from megalodon_lm.errors import InputError
from megalodon_lm.training import run_lock
from megalodon_lm.training.checkpoint import checkpoints
from megalodon_lm.training.metrics import MetricsFile, read_metrics
from megalodon_lm.training.run_folder import free_run_folder
from megalodon_lm.training.run_lock import RunLock
from megalodon_lm.training.trainer import Trainer

from .runs import metrics, recipe, steps


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr("megalodon_lm.training.report.write_report", lambda *given: None)


def written(folder, given):
    path = folder / "r.toml"
    path.write_text(given.to_toml(), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--set", 'data.validation=["nowhere.txt"]'],
        ["--set", "training.beta1=1"],
        ["--set", "training.learning_rate=inf"],
        ["--set", "training.average=1.0"],
        ["--set", "data.weights=[nan]"],
        ["--set", "training.length=1000000"],
        ["--set", 'data.tokenizer="nowhere.json"'],
        ["--set", 'training.begin_from="nowhere"'],
        pytest.param(["--device", "cuda"], marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")),
        ["--device", "foo"],
        ["--device", ""],
        ["--device", "meta"],
        ["--tensorboard"],
    ],
)
def test_what_is_wrong_is_found_before_the_folder_is_made(wrong, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    given = written(tmp_path, recipe(tmp_path, validate_steps=1, steps=1))
    with pytest.raises(SystemExit) as ended:
        main(["train", given, "--out", str(tmp_path / "run"), *wrong])
    assert ended.value.code == 2
    assert "megalodon: error: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_corrected_command_works(tmp_path, capsys, no_report):
    given = written(tmp_path, recipe(tmp_path, steps=1))
    with pytest.raises(SystemExit):
        main(["train", given, "--out", str(tmp_path / "run"), "--device", "foo"])
    main(["train", given, "--out", str(tmp_path / "run")])
    assert steps(tmp_path / "run") == [1]


def test_a_run_without_a_name_takes_the_first_that_is_free(tmp_path):
    """Neither a folder with something in it nor a file of that name is."""
    assert free_run_folder(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").write_text("a file")
    (tmp_path / "run-2" / "something").mkdir(parents=True)
    assert free_run_folder(tmp_path / "run") == tmp_path / "run-3"
    (tmp_path / "run-3").mkdir()
    assert free_run_folder(tmp_path / "run") == tmp_path / "run-3"


def test_a_fine_tuning_goes_on_without_what_it_began_from(tmp_path, capsys, no_report):
    """Its recipe names neither a model nor a tokenizer: both are those of the run."""
    tokenizer = {"data": {"tokenizer": "bpe:280"}, "model": {"vocab_size": 283}}
    Trainer(recipe(tmp_path, steps=1, **tokenizer), tmp_path / "base").train()
    toml = tmp_path / "tune.toml"
    text = json.dumps(str(tmp_path / "text.txt"))
    toml.write_text(
        f"[data]\ntrain = [{text}]\n[training]\nbegin_from = {json.dumps(str(tmp_path / 'base'))}\nlength = 48\n"
        "checkpoint_steps = 1\nsteps = 1\n"
    )
    out = ["--out", str(tmp_path / "run")]
    main(["train", str(toml), *out])
    shutil.rmtree(tmp_path / "base")
    main(["train", str(toml), *out, "--resume", "last", "--set", "training.steps=2"])
    assert steps(tmp_path / "run") == [1, 2]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(SystemExit):  # without a checkpoint it begins again, and needs it
        main(["train", str(toml), *out, "--resume", "auto"])
    assert "base" in capsys.readouterr().err


def test_with_no_usable_checkpoint_nothing_is_overwritten(tmp_path):
    given = recipe(tmp_path, steps=8)
    run = tmp_path / "run"
    Trainer(given, run).train()
    for path in checkpoints(run):
        (path / "manifest.json").write_text("[]")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"none of the checkpoints in .* can be used .*begin anew in another folder"):
        Trainer(given, run, resume="auto")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match=r"a trained model but no checkpoint .*training.begin_from"):
        Trainer(given, run, resume="auto")
    assert all(path.read_bytes() == content for path, content in before.items() if "checkpoints" not in path.parts)


def test_refusing_another_text_leaves_the_recipe_of_the_run(tmp_path):
    Trainer(recipe(tmp_path, steps=1), tmp_path / "run").train()
    before = (tmp_path / "run" / "recipe.toml").read_bytes()
    (tmp_path / "text.txt").write_bytes(b"another text " * 100)
    with pytest.raises(InputError, match="text is not the one"):
        Trainer(recipe(tmp_path, steps=2), tmp_path / "run", resume="last")
    assert (tmp_path / "run" / "recipe.toml").read_bytes() == before


HOLD = """
import sys, pathlib
from megalodon_lm.training.run_lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_training_in_a_folder_is_refused_until_the_first_is_killed(tmp_path):
    given = recipe(tmp_path, steps=4)
    Trainer(given, tmp_path / "run").train()
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=-1, stdout=-1)
    try:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another process is training in"):
            Trainer(given, tmp_path / "run", resume="auto")
    finally:
        first.kill()
        first.communicate()
    assert Trainer(given, tmp_path / "run", resume="auto").step == 4


def test_a_lock_is_held_from_the_beginning_to_the_end_of_training(tmp_path):
    given = recipe(tmp_path, steps=4)
    trainer = Trainer(given, tmp_path / "run")

    def watch(m):
        with pytest.raises(InputError, match="another process"):
            RunLock(tmp_path / "run")

    trainer.train(watch)
    RunLock(tmp_path / "run").release()


def test_a_lock_on_windows(tmp_path, monkeypatch):
    """A stand-in for its module: the lock is asked for without waiting, and a refusal means another process."""
    asked = []

    def locking(descriptor, mode, count):
        asked.append((mode, count))
        if len(asked) == 2:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=3, locking=locking))
    monkeypatch.setattr(sys, "platform", "win32")
    lock = RunLock(tmp_path)
    with pytest.raises(InputError, match="another process"):
        RunLock(tmp_path)
    lock.release()
    assert asked == [(3, 1), (3, 1)]


def test_what_was_changed_since_a_recipe_was_read_is_checked(tmp_path):
    given = recipe(tmp_path)
    given.training.minutes = float("nan")
    with pytest.raises(InputError, match=r"training\.minutes = nan must be finite"):
        Trainer(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_without_locks_is_said_and_used(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock, "_lock", refuse)
    trainer = Trainer(recipe(tmp_path, steps=1), tmp_path / "run")
    assert trainer.notes == [
        f"{tmp_path / 'run'} cannot be locked (No locks available); start no second training in it"
    ]
    assert trainer.train()


def test_lines_that_are_no_records_are_left_out(tmp_path):
    good = [{"step": 1, "bits_per_token": None}, {"step": 2}, {"step": 5}]
    bad = [b"[]", b"3", b'{"step": "6"}', b"\xff\xfe", b'{"loss": 1}', b"[" * 3000, b'{"step": 3, "lo']
    lines = [json.dumps(record).encode() for record in good]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines[:2], *bad[:6], lines[2], bad[6]]))
    assert read_metrics(tmp_path) == good
    file = MetricsFile(tmp_path)
    file.cut(2)
    file.write({"step": 3, "loss": float("nan"), "norm": float("inf")})
    file.close()
    assert metrics(tmp_path) == [*good[:2], {"step": 3, "loss": None, "norm": None}]
