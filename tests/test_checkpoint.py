"""Checkpoints: which are kept, which are passed over, and what is in them."""

import errno
import json
import os
import shutil

import pytest
import torch

from megalodon_lm.config import ModelConfig
from megalodon_lm.errors import InputError
from megalodon_lm.training.checkpoint import Checkpoint, checkpoints, newest
from megalodon_lm.training.checkpoint_writer import CheckpointWriter
from megalodon_lm.training.manifest import checksum

PROGRESS = {"tokens": 1, "seconds": 0.5, "usual_loss": None, "best": None, "place": [0], "data": "x"}


def checkpoint(step, **changes):
    weights = {"weight": torch.full((3,), float(step))}
    return Checkpoint(step, ModelConfig.named("tiny"), weights, {"random": torch.zeros(2)}, {**PROGRESS, **changes})


def write(run, *steps, run_id="mine", keep=2, best=None):
    writer = CheckpointWriter(run, run_id, keep)
    for step in steps:
        writer.submit(checkpoint(step), best)
    writer.wait()
    writer.close()


def kept(run):
    return [int(path.name[5:]) for path in checkpoints(run)]


def spoil(run, step):
    path = run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
    raw = path.read_bytes()
    path.unlink()  # the exported model is a link to it
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def test_broken_and_foreign_checkpoints_do_not_count_among_the_newest(tmp_path):
    run = tmp_path / "run"
    write(run, 4, 8, 12, keep=9)
    write(tmp_path / "other", 40, run_id="other")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-00000040", run / "checkpoints" / "step-00000040")
    spoil(run, 8)
    spoil(run, 12)
    found, passed = newest(run, "mine", accept_older=True)
    assert found.step == 4
    assert len(passed) == 3
    write(run, 6)
    assert kept(run) == [40, 12, 8, 6, 4]
    write(run, 10)
    assert kept(run) == [40, 12, 10, 6]
    write(run, 12, 14)
    assert kept(run) == [40, 14, 12]
    assert newest(run, "mine", accept_older=True)[0].step == 14


@pytest.mark.skipif(os.name == "nt", reason="has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_who_may_read_a_checkpoint_and_its_model_is_what_the_umask_says(umask, tmp_path):
    before = os.umask(umask)
    try:
        (tmp_path / "plain").touch()
        write(tmp_path / "run", 4)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "training.safetensors", "manifest.json"}
    assert {path.stat().st_mode for path in files} == {(tmp_path / "plain").stat().st_mode}


def test_a_kept_best_costs_no_new_checkpoint(tmp_path):
    write(tmp_path, 4, 8, 12, 16, keep=1, best=4)
    assert kept(tmp_path) == [16, 4]


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    write(tmp_path, 99_999_999, 100_000_000)
    (tmp_path / "checkpoints" / "step-00000008.bak").mkdir()
    (tmp_path / "checkpoints" / "step-9").mkdir()
    assert kept(tmp_path) == [100_000_000, 99_999_999]


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / "checkpoints" / ".step-00000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000003.old").mkdir()
    write(tmp_path, 4)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000004"]


@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", "3", '"a"', "[" * 3000, '{"checksum": "0"}', '{"checksum": []}']
)
def test_a_manifest_of_another_kind_is_passed_over(content, tmp_path):
    write(tmp_path, 4, 8)
    (tmp_path / "checkpoints" / "step-00000008" / "manifest.json").write_text(content)
    found, passed = newest(tmp_path, "mine", accept_older=True)
    assert found.step == 4
    assert "step-00000008/manifest.json" in passed[0]


@pytest.mark.parametrize("manifest", [{}, {"files": []}, {"files": {}}, {"run": "mine", "step": "8", "files": 1}])
def test_a_manifest_with_a_right_checksum_and_nothing_in_it_is_passed_over(manifest, tmp_path):
    write(tmp_path, 4, 8)
    path = tmp_path / "checkpoints" / "step-00000008" / "manifest.json"
    path.write_text(json.dumps({**manifest, "checksum": checksum(manifest)}))
    assert newest(tmp_path, "mine", accept_older=True)[0].step == 4


@pytest.mark.parametrize(
    "changes",
    [{"tokens": "many"}, {"seconds": None}, {"place": 3}, {"best": [1]}, {"usual_loss": "low"}, {"data": 1}],
)
def test_progress_of_wrong_types_is_passed_over(changes, tmp_path):
    write(tmp_path, 4)
    checkpoint(8, **changes).write(tmp_path, "mine")
    found, passed = newest(tmp_path, "mine", accept_older=True)
    assert found.step == 4
    assert f"progress.json has no proper {next(iter(changes))}" in passed[0]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_that_cannot_flush_folders_is_used(number, tmp_path, monkeypatch):
    plain = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    write(tmp_path, 4)
    assert newest(tmp_path, "mine", accept_older=False)[0].step == 4


def test_a_failing_flush_of_a_file_is_an_error(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match="Input/output error"):
        checkpoint(4).write(tmp_path, "mine")
