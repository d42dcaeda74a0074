"""Pictures that stay in their files, and examples that are changed at random: the same way after every restart."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from megalodon_lm.data.augmentation import Augmentation
from megalodon_lm.data.example_batches import ExampleBatches
from megalodon_lm.data.example_files import Taking, read_example
from megalodon_lm.data.example_sources import load_examples
from megalodon_lm.data.examples import Examples
from megalodon_lm.data.pictures import PictureFile
from megalodon_lm.errors import InputError
from megalodon_lm.training.classification import Classification, ClassificationRecipe
from megalodon_lm.training.trainer import Trainer

EVERYTHING = Augmentation(shift=2, flip=True, crop=0.3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """In class folders, of several sizes and modes."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(12):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = draw.integers(0, 256, (20 + 3 * i, 50 - 2 * i, 3), np.uint8)
        mode = ("RGB", "L", "P", "RGBA")[i % 4]
        Image.fromarray(pixels).convert(mode).save(folder / "ab"[i % 2] / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def recipe(folder, **augmentation):
    return ClassificationRecipe.from_dict({
        "model": {"size": "encoder_tiny"},
        "data": {"train": [str(folder)], "side": 16, "colour": True, "patch": 8, "held_out_part": 0.25},
        "training": {"steps": 6, "batch_size": 4, "precision": "float32", "checkpoint_steps": 2},
        "augmentation": augmentation,
    })  # fmt: skip


def test_pictures_of_all_sizes_are_scaled_and_cut_to_squares(pictures):
    found = load_examples(str(pictures), Taking(side=16, colour=True))
    assert all(isinstance(raw, PictureFile) for raw in found.raw)
    assert {raw.read().shape for raw in found.raw} == {(16, 16, 3)}
    form = found.form(8)
    assert (form.size, form.scaled, form.colour) == ((16, 16), True, True)
    assert form.input == {"input": "patches", "patch_dim": 192, "pairs": False}
    steps = np.concatenate([form.steps(raw.read()) for raw in found.raw])
    assert steps.shape == (48, 192)
    assert abs(steps.mean()) < 1e-4
    assert abs(steps.std() - 1) < 1e-4
    assert np.array_equal(read_example([found.names[3]], form), found.raw[3].read())
    grey = load_examples(str(pictures), Taking(side=16))
    assert grey.form(16).input == {"input": "patches", "patch_dim": 256, "pairs": False}
    with pytest.raises(InputError, match=r"must be of one size.*data\.side scales them"):
        load_examples(str(pictures)).form()
    with pytest.raises(InputError, match=r"data\.patch = 5 must divide the sides of pictures of 16 x 16"):
        found.form(5)


def test_the_middle_is_taken_and_the_patches_are_squares_of_colours(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = np.arange(16).reshape(4, 4, 1) * [1, 2, 3]
    Image.fromarray(pixels).save(tmp_path / "x.png")
    found = PictureFile(tmp_path / "x.png", 4, True).read()
    assert np.array_equal(found, pixels[:, 2:6])
    form = Examples("picture", [found], np.zeros(1, np.int64), ("a",), ("x",)).form(2)
    steps = form.steps(found) * form.deviation + form.mean
    assert np.allclose(steps[1], found[:2, 2:4].reshape(-1), atol=1e-4)


def test_a_run_that_was_stopped_goes_on_to_the_last_bit(tmp_path, pictures):
    made = recipe(pictures, flip=True, crop=0.3, shift=2)
    whole = Trainer(made, tmp_path / "whole", subject=Classification(made))
    whole.train()

    def stop(metrics):
        if metrics.step == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Trainer(made, tmp_path / "parts", subject=Classification(made)).train(stop)
    again = Trainer(made, tmp_path / "parts", resume="last", subject=Classification(made))
    again.train()
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    other = recipe(pictures, flip=True, crop=0.3)
    plain = Trainer(other, tmp_path / "other", subject=Classification(other))
    plain.train()
    assert not torch.equal(plain.model.output.output.weight, whole.model.output.output.weight)
    with pytest.raises(InputError, match=r"differs from that of the run in augmentation\.shift"):
        Trainer(other, tmp_path / "parts", resume="last", subject=Classification(other))


def test_changes_are_others_in_each_epoch_and_the_same_whatever_was_read_before(pictures):
    examples = load_examples(str(pictures), Taking(side=16))
    batches = ExampleBatches(examples, examples.form(), 12, 1, EVERYTHING)
    first, second = batches.read([0, 0]), batches.read([1, 0])
    again = ExampleBatches(examples, examples.form(), 12, 1, EVERYTHING)
    assert torch.equal(again.read([1, 0]).inputs, second.inputs)
    assert torch.equal(again.read([0, 0]).inputs, first.inputs)
    assert not torch.equal(first.inputs.sort(0)[0], second.inputs.sort(0)[0])
    plain = ExampleBatches(examples, examples.form(), 12, 1, Augmentation())
    assert torch.equal(plain.read([0, 0]).inputs, ExampleBatches(examples, examples.form(), 12, 1).read([0, 0]).inputs)


def test_each_example_and_each_seed_has_changes_of_its_own(pictures, tmp_path):
    """Seen in one picture many times over."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(6):
            (tmp_path / name / f"{i}.png").write_bytes((pictures / "a" / "4.png").read_bytes())
    examples = load_examples(str(tmp_path), Taking(side=16))
    seeds = [ExampleBatches(examples, examples.form(), 12, seed, EVERYTHING).read([0, 0]).inputs for seed in (1, 2)]
    kinds = [{row.numpy().tobytes() for row in found} for found in seeds]
    assert min(map(len, kinds)) > 9
    assert len(kinds[0] & kinds[1]) < 4


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), shift=st.integers(0, 20), flip=st.booleans(),
    crop=st.floats(0.01, 1), colour=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_changed_pictures_keep_their_shape(height, width, shift, flip, crop, colour, seed):
    raw = np.random.default_rng(seed).integers(1, 256, (height, width, 3) if colour else (height, width), np.uint8)
    made = Augmentation(shift=shift, flip=flip, crop=crop)(raw, "picture", 0, np.random.default_rng(seed))
    assert (made.shape, made.dtype) == (raw.shape, raw.dtype)
    if crop == 1:
        assert set(made.ravel()) <= {0, *raw.ravel()}


@settings(deadline=None, max_examples=40)
@given(length=st.integers(1, 50), shift=st.floats(0, 100), gain=st.floats(0, 20), seed=st.integers(0, 1000))
@example(length=20, shift=26.0, gain=1.0, seed=32)
def test_changed_sound_is_the_same_sound_elsewhere_and_louder(length, shift, gain, seed):
    raw = np.random.default_rng(seed).uniform(0.5, 1, length).astype(np.float32)
    made = Augmentation(shift=shift, gain=gain)(raw, "sound", 1000, np.random.default_rng(seed))
    assert (made.shape, made.dtype) == (raw.shape, raw.dtype)
    kept = made[made != 0]
    assert length - len(kept) <= shift
    if len(kept):
        ratio = kept / (raw[: len(kept)] if made[0] == 0 else raw[length - len(kept) :])  # moved to later, or earlier
        assert np.ptp(ratio) < 1e-5 * ratio.max()
        assert np.abs(20 * np.log10(ratio[0])) <= gain + 1e-4


def test_noise_and_mirroring_do_what_they_say():
    draw = np.random.default_rng(0)
    silence = np.zeros(20_000, np.float32)
    found = [Augmentation(noise=0.1)(silence, "sound", 8000, draw) for _ in range(20)]
    assert all(f.dtype == np.float32 for f in found)
    assert 0.02 < np.mean([f.std() for f in found]) < 0.08
    assert max(f.std() for f in found) < 0.105
    raw = np.arange(12, dtype=np.uint8).reshape(3, 4)
    made = {Augmentation(flip=True)(raw, "picture", 0, draw).tobytes() for _ in range(20)}
    assert made == {raw.tobytes(), raw[:, ::-1].tobytes()}
    moved = {tuple(np.argwhere(Augmentation(shift=1)(np.pad([[9]], 2), "picture", 0, draw))[0]) for _ in range(200)}
    assert moved == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(shift=-1), "shift = -1"), (dict(crop=0), "crop = 0"), (dict(crop=1.5), "crop = 1.5"),
        (dict(noise=float("nan")), "noise = nan"), (dict(noise=0.1), "noise = 0.1 is not for picture"),
        (dict(gain=6), "gain = 6.0 is not for picture"), (dict(flop=True), "unknown key 'flop'"),
        (dict(flip=1), "flip = 1 must be of type bool"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(pictures, values, message):
    with pytest.raises(InputError, match=message):
        Classification(recipe(pictures, **values))


def test_damaged_pictures_are_named(tmp_path, pictures):
    (tmp_path / "a").mkdir()
    whole = (pictures / "a" / "0.png").read_bytes()
    for name, content in {"cut": whole[:200], "text": b"a letter", "nothing": b""}.items():
        (tmp_path / "a" / f"{name}.png").write_bytes(content)
        for side in (0, 16):
            with pytest.raises(InputError, match=rf"{name}\.png cannot be read as a picture"):
                PictureFile(tmp_path / "a" / f"{name}.png", side, True).read()
    with pytest.raises(InputError, match=r"there is no such file|No such file"):
        PictureFile(tmp_path / "a" / "missing.png", 16).read()


def test_pictures_of_16_bits_keep_their_shades(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert PictureFile(tmp_path / "x.png", 0, False, (2, 2)).read().tolist() == [[0, 100], [200, 255]]
    assert PictureFile(tmp_path / "x.png", 0, True, (2, 2)).read()[0, 1].tolist() == [100] * 3
