"""Examples to classify: from arrays, folders of pictures and generators; hidden, closed and damaged ones."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from megalodon_lm.data.example_files import Taking
from megalodon_lm.data.example_sources import load_examples
from megalodon_lm.data.examples import Form, joined
from megalodon_lm.errors import InputError


def test_sources(tmp_path):
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (6, 4, 4), np.uint8), np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    np.save(tmp_path / "train_x.0.npy", images)
    np.save(tmp_path / "train_y.0.npy", labels)
    for i, name in enumerate(["cat", "dog"]):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.fromarray(images[i]).save(tmp_path / "pictures" / name / "1.png")
    for source in ("a.npz", "train_x.0.npy"):
        found = load_examples(str(tmp_path / source))
        assert np.array_equal(np.stack(found.raw), images)
        assert found.classes == ("0", "1", "2")
    pictures = load_examples(str(tmp_path / "pictures"))
    assert pictures.classes == ("cat", "dog")
    assert np.array_equal(pictures.raw[1], images[1])
    both = joined([load_examples("pathfinder:0:4"), load_examples("pathfinder:1:3:6")])
    assert len(both.raw) == 7
    assert both.form().size == (32, 32)
    assert load_examples("pathx:0:1").raw[0].shape == (128, 128)
    assert load_examples("listops:1:2").form().input == {"input": "tokens", "vocab_size": 15, "pairs": False}
    for wrong, message in {
        "listops:x:2": "must be like", "listops:1:0": "must be like", str(tmp_path / "none"): "no examples in",
        str(tmp_path / "b.npz"): "holds no pictures", str(tmp_path): "different kinds|class|pictures",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            load_examples(wrong, Taking("(x)"))
    with pytest.raises(InputError, match="class 'cat'"):
        pictures.with_classes(["dog", "cow"])


def test_hidden_files_are_no_examples_and_a_closed_folder_is_refused(tmp_path):
    """A class that nobody made, or one that is missing, would change all that is learnt."""
    for name in ("cat/1.png", "cat/.thumbnail/1.png", "dog/2.png", ".ipynb_checkpoints/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    (tmp_path / "cat" / "._1.png").write_bytes(b"\0\5\x16\7")
    found = load_examples(str(tmp_path))
    assert found.classes == ("cat", "dog")
    assert found.names == (str(tmp_path / "cat" / "1.png"), str(tmp_path / "dog" / "2.png"))
    command = [sys.executable, "-c", f"from {load_examples.__module__} import *; load_examples({str(tmp_path)!r})"]
    if os.geteuid() == 0:  # who may read everything
        if shutil.which("setpriv") is None:
            return
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    (tmp_path / "dog").chmod(0)
    try:
        said = subprocess.run(command, capture_output=True, text=True).stderr
    finally:
        (tmp_path / "dog").chmod(0o755)
    assert f"InputError: cannot read {tmp_path / 'dog'}: Permission denied" in said


def test_damaged_arrays_are_refused_wherever_the_damage_is(tmp_path):
    images, labels = np.arange(600, dtype=np.uint8).reshape(6, 10, 10), np.arange(6)
    with open(tmp_path / "one.npz", "wb") as file:
        np.save(file, images)
    with pytest.raises(InputError, match=r"one\.npz holds no pictures with labels"):
        load_examples(str(tmp_path / "one.npz"))
    said = []
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "whole.npz", images=images, labels=labels)
        whole = (tmp_path / "whole.npz").read_bytes()
        for at in range(0, len(whole), 7):
            for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]):
                (tmp_path / "a.npz").write_bytes(damaged)
                try:
                    found = load_examples(str(tmp_path / "a.npz"))
                except InputError as error:
                    said.append(str(error))
                else:  # the damage is in what nobody needs, such as a time
                    assert np.array_equal(np.stack(found.raw), images)
                    assert np.array_equal(found.labels, labels)
    assert all("a.npz" in line for line in said)


def test_patches_of_pictures_are_squares_and_of_sound_stretches():
    picture = np.arange(16, dtype=np.uint8).reshape(4, 4)
    form = Form("picture", ("a", "b"), size=(4, 4), patch=2)
    assert form.steps(picture).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert form.input == {"input": "patches", "patch_dim": 4, "pairs": False}
    sound = Form("sound", ("a", "b"), rate=8, patch=2)
    assert sound.steps(np.array([1, 2, 3], np.float32)).tolist() == [[1, 2], [3, 0]]
