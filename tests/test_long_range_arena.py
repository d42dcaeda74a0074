"""The official splits of Long Range Arena, from small archives of the same layout."""

import pickle

import numpy as np
import pytest
from PIL import Image

from megalodon_lm.data import listops
from megalodon_lm.data.example_batches import ExampleBatches, inputs_of
from megalodon_lm.data.example_files import Taking
from megalodon_lm.data.example_sources import load_examples
from megalodon_lm.errors import InputError
from megalodon_lm.training.classification import Classification, ClassificationRecipe, load_form
from megalodon_lm.training.trainer import Trainer

REVIEWS = {"neg": ["dull", "never again, \u00e9"], "pos": ["a joy", "fine", "very good indeed"]}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """All of them, unpacked into one folder; see the functions below."""
    root = tmp_path_factory.mktemp("archives")
    _expressions(root / "lra_release" / "listops-1000")
    for split in ("train", "test"):
        for name, texts in REVIEWS.items():
            (root / "aclImdb" / split / name).mkdir(parents=True)
            for i, text in enumerate(texts):
                (root / "aclImdb" / split / name / f"{i}_7.txt").write_text(f"{text} {split}", encoding="utf-8")
    (root / "aclImdb" / "train" / "unsup").mkdir()
    (root / "aclImdb" / "train" / "unsup" / "0_0.txt").write_text("no label")
    (root / "aclImdb" / "train" / "labeledBow.feat").write_text("9 0:1")
    _articles(root / "lra_release" / "tsv_data")
    _cifar(root / "cifar-10-batches-py")
    _pathfinder(root / "lra_release" / "pathfinder32" / "curv_contour_length_14", 32)
    _pathfinder(root / "lra_release" / "pathfinder128" / "curv_contour_length_14", 128)
    return root


def _expressions(folder):
    folder.mkdir(parents=True)
    for split, seed in {"train": 0, "val": 1, "test": 2}.items():
        made = listops.generate(seed, 5, 40)
        lines = [f"{listops.official(tokens)}\t{value}\n" for tokens, value in (next(made) for _ in range(6))]
        (folder / f"basic_{split}.tsv").write_text("Source\tTarget\n" + "".join(lines))


def _articles(folder):
    folder.mkdir(parents=True)
    for split in ("train", "eval", "test"):
        rows = [f'{i % 2}.0\tP{i}\tQ{i}\tfirst {i} {split} of "two"\tsecond{"!" * i}\n' for i in range(6)]
        (folder / f"new_aan_pairs.{split}.tsv").write_text("".join(rows))


def _cifar(folder):
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = draw.integers(0, 256, (4, 3072), np.uint8)
        pixels[0] = np.repeat(np.array([255, 0, 0], np.uint8), 1024)  # red
        batch = {b"data": pixels, b"labels": [number, 1, 2, 3], b"batch_label": b"x", b"filenames": [b"a.png"] * 4}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))


def _pathfinder(folder, side):
    (folder / "metadata").mkdir(parents=True)
    draw = np.random.default_rng(1)
    for table in (0, 1, 10, 2):  # by number, not by letters
        rows = []
        (folder / "imgs" / str(table)).mkdir(parents=True)
        for i in range(5):
            path = folder / "imgs" / str(table) / f"sample_{i}.png"
            Image.fromarray(draw.integers(0, 256, (side, side), np.uint8)).save(path)
            rows.append(f"imgs/{table} sample_{i}.png {i} {i % 2} 1.8 6 2 0.5\n")
        (folder / "metadata" / f"{table}.npy").write_text("".join(rows))
    (folder / "imgs" / "1" / "sample_4.png").write_bytes(b"")  # as some are in the release


def load(archive, task, split, **taking):
    return load_examples(f"lra:{task}:{split}:{archive}", Taking(**taking))


def test_listops(archive):
    for split, seed in {"train": 0, "validation": 1, "test": 2}.items():
        found = load(archive, "listops", split)
        made = listops.generate(seed, 5, 40)
        for raw, label in zip(found.raw, found.labels, strict=True):
            tokens, value = next(made)
            assert [listops.VOCABULARY[i] for i in raw] == tokens
            assert label == value
        assert len(found.raw) == 6


def test_texts_are_bytes_and_what_has_no_label_is_left_out(archive):
    train, validation, test = (load(archive, "text", split) for split in ("train", "validation", "test"))
    written = [text for texts in REVIEWS.values() for text in texts]
    assert [bytes(raw).decode() for raw in train.raw] == [f"{text} train" for text in written]
    assert train.classes == ("neg", "pos")
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    assert train.form().input == {"input": "tokens", "vocab_size": 256, "pairs": False}
    assert validation.names == test.names != train.names
    assert [bytes(raw).decode() for raw in test.raw] == [f"{text} test" for text in written]
    short = load(archive, "text", "train", longest=4)
    assert [len(raw) for raw in short.raw] == [4] * 5
    assert short.form().longest == 4


def test_pairs_of_articles_and_their_batches(archive):
    found = load(archive, "retrieval", "validation", longest=20)
    assert [bytes(part).decode() for part in found.raw[3]] == ['first 3 eval of "two"'[:20], "second!!!"]
    assert found.labels.tolist() == [0, 1, 0, 1, 0, 1]
    form = found.form()
    assert form.input == {"input": "tokens", "vocab_size": 256, "pairs": True}
    inputs, mask = inputs_of(found.raw[:2], form)
    assert inputs.shape == mask.shape == (2, 2, 20)
    assert mask.sum(-1).tolist() == [[20, 6], [20, 7]]
    assert bytes(inputs[1, 1, :7].tolist()) == b"second!"
    batches = ExampleBatches(found, form, 3, seed=0)
    assert batches.fingerprint != ExampleBatches(load(archive, "retrieval", "test"), form, 3, seed=0).fingerprint
    assert batches.read(batches.begin()).inputs.shape == (3, 2, 20)


def test_pictures_of_cifar_become_grey_and_the_last_tenth_is_for_validation(archive):
    train, validation, test = (load(archive, "image", split) for split in ("train", "validation", "test"))
    assert [len(part.raw) for part in (train, validation, test)] == [18, 2, 4]
    assert train.labels.tolist()[::4] == [0, 1, 2, 3, 4]
    assert validation.labels.tolist() == [2, 3]
    assert train.raw[0].shape == (32, 32)
    assert set(train.raw[0].ravel()) == {76}  # 0.299 * 255
    assert train.classes[0] == "airplane"
    colour = load(archive, "image", "test", colour=True)
    assert colour.raw[0].shape == (32, 32, 3)
    assert colour.raw[0][5, 7].tolist() == [255, 0, 0]
    assert colour.form().input == {"input": "patches", "patch_dim": 3, "pairs": False}


@pytest.mark.parametrize(("task", "side"), [("pathfinder", 32), ("pathx", 128)])
def test_pathfinder_in_parts_of_eight_one_and_one_tenths(archive, task, side):
    parts = [load(archive, task, split) for split in ("train", "validation", "test")]
    assert [len(part.raw) for part in parts] == [15, 2, 2]  # of 19: one is empty
    names = [name for part in parts for name in part.names]
    assert names == [n for t in (0, 1, 2, 10) for n in names if f"/imgs/{t}/" in n]
    assert len(set(names)) == 19
    assert parts[0].labels.tolist()[:9] == [0, 1, 0, 1, 0, 0, 1, 0, 1]
    assert parts[0].form().size == (side, side)
    with Image.open(names[3]) as image:
        assert np.array_equal(parts[0].raw[3].read(), np.array(image))


@pytest.mark.parametrize("task", ["listops", "text", "retrieval", "image", "pathfinder"])
def test_a_run_on_each(archive, task, tmp_path):
    recipe = ClassificationRecipe.from_dict({
        "model": {"size": "encoder_tiny"},
        "data": {
            "train": [f"lra:{task}:train:{archive}"], "validation": [f"lra:{task}:validation:{archive}"], "longest": 9,
            "patch": 4 if task in ("image", "pathfinder") else 1,
        },
        "training": {"steps": 2, "batch_size": 2, "validate_steps": 1, "precision": "float32"},
    })  # fmt: skip
    trainer = Trainer(recipe, tmp_path / "run", subject=Classification(recipe))
    trainer.train()
    assert trainer.model.config.pairs == (task == "retrieval")
    assert load_form(tmp_path / "run") == trainer.subject.form


def test_what_is_wrong_is_said_in_one_line(archive, tmp_path):
    def refused(source, message):
        with pytest.raises(InputError, match=message) as caught:
            load_examples(source)
        assert "\n" not in str(caught.value)

    refused(f"lra:lists:train:{archive}", "with a task of listops, text, retrieval, image, pathfinder, pathx")
    refused(f"lra:text:dev:{archive}", "a split of train, validation, test")
    refused("lra:text:train", "must be lra:TASK:SPLIT:FOLDER")
    for task, missing in {
        "listops": "basic_train.tsv", "text": "aclImdb/train", "retrieval": "new_aan_pairs.train.tsv",
        "image": "data_batch_1", "pathfinder": "pathfinder32/curv_contour_length_14/metadata",
    }.items():  # fmt: skip
        refused(f"lra:{task}:train:{tmp_path}", f"is not the folder of lra:{task}: .*{missing} is missing")
    _articles(tmp_path / "pairs")
    path = tmp_path / "pairs" / "new_aan_pairs.train.tsv"
    path.write_text(path.read_text() + "2\tP\tQ\ta\tb\n")
    refused(f"lra:retrieval:train:{tmp_path / 'pairs'}", "train.tsv, line 7: not a label 0 or 1")
    (tmp_path / "pairs" / "new_aan_pairs.test.tsv").write_text("")
    refused(f"lra:retrieval:test:{tmp_path / 'pairs'}", "test.tsv is empty")
    _cifar(tmp_path / "cifar")
    (tmp_path / "cifar" / "data_batch_3").write_bytes((tmp_path / "cifar" / "data_batch_3").read_bytes()[:900])
    refused(f"lra:image:train:{tmp_path / 'cifar'}", "data_batch_3 is no batch of CIFAR-10")
    (tmp_path / "cifar" / "test_batch").write_bytes(pickle.dumps({b"data": [1], b"labels": [1]}))
    refused(f"lra:image:test:{tmp_path / 'cifar'}", "test_batch does not hold pictures of CIFAR-10")
    (tmp_path / "cifar" / "test_batch").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    refused(f"lra:image:test:{tmp_path / 'cifar'}", r"it would run (os|posix)\.system")
    _pathfinder(tmp_path / "paths", 32)
    (tmp_path / "paths" / "metadata" / "1.npy").write_text("imgs/1 sample_9.png 9 1\n")
    refused(f"lra:pathfinder:train:{tmp_path / 'paths'}", r"1.npy, line 1: .*sample_9.png: No such file")
    (tmp_path / "paths" / "metadata" / "1.npy").write_text("imgs/1 sample_0.png 9\n")
    refused(f"lra:pathfinder:train:{tmp_path / 'paths'}", "line 1: not a folder, a file, a number and a label")
    (tmp_path / "paths" / "metadata" / "1.npy").unlink()
    Image.new("L", (64, 64)).save(tmp_path / "paths" / "imgs" / "0" / "sample_2.png")
    examples = load_examples(f"lra:pathfinder:train:{tmp_path / 'paths'}")
    with pytest.raises(InputError, match=r"sample_2.png is 64 x 64 pixels, not 32 x 32"):
        examples.form()
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "basic_train.tsv").write_text("Source\tTarget\n[MAX 1 2 ]\tx\n")
    refused(f"lra:listops:train:{tmp_path / 'lists'}", "line 2: not an expression and its value")
