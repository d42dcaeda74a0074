"""The official splits of Long Range Arena, from the folders that its archives unpack to.

Source: Tay et al. 2020 (arXiv 2011.04006): its release has ListOps, pairs of articles and Pathfinder; texts are the
reviews of Maas et al. 2011 (aclImdb), pictures CIFAR-10 in grey (Krizhevsky 2009, the Python version).
"""

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from . import listops
from .example_files import Taking, expressions, folder
from .examples import Examples
from .pictures import PictureFile

SPLITS = ("train", "validation", "test")
GREY = np.array([0.299, 0.587, 0.114])
"""Of red, green and blue."""


def load_official(rest: str, taking: Taking) -> Examples:
    """Examples of an official split.

    Args:
        rest: TASK:SPLIT:FOLDER; the folder is that of the task's files, or of the whole release.
        taking: how; see load_examples.

    Raises:
        InputError: unknown task or split, missing or malformed files.
    """
    task, _, rest = rest.partition(":")
    split, _, place = rest.partition(":")
    if task not in TASKS or split not in SPLITS or not place:
        raise InputError(
            f"'lra:{task}:{split}:{place}' must be lra:TASK:SPLIT:FOLDER, with a task of {', '.join(TASKS)} and a "
            f"split of {', '.join(SPLITS)}"
        )
    reader, inside, marker = TASKS[task]
    root = Path(place)
    places = [root, *(root.joinpath(*inside[i:]) for i in reversed(range(len(inside))))]
    found = next((p for p in places if (p / marker).exists()), None)
    if found is None:
        raise InputError(f"{root} is not the folder of lra:{task}: {Path(*inside, marker)} is missing")
    return reader(found, split, taking)


def _listops(place: Path, split: str, taking: Taking) -> Examples:
    path = place / f"basic_{ {'validation': 'val'}.get(split, split) }.tsv"
    return expressions(listops.lines(path), str(path))


def _text(place: Path, split: str, taking: Taking) -> Examples:
    """Reviews; validation is the test split, as in the arena, since there is no other."""
    place = place / ("train" if split == "train" else "test")
    parts = [folder(place / name, Taking(r"^()", longest=taking.longest)) for name in ("neg", "pos")]
    raw, names = [r for part in parts for r in part.raw], tuple(n for part in parts for n in part.names)
    labels = np.repeat(np.arange(2), [len(part.raw) for part in parts])
    return Examples("text", raw, labels, ("neg", "pos"), names, longest=taking.longest)


def _retrieval(place: Path, split: str, taking: Taking) -> Examples:
    """Pairs of articles: does one cite the other?"""
    path = place / f"new_aan_pairs.{ {'validation': 'eval'}.get(split, split) }.tsv"
    raw, labels, names = [], [], []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                fields = line.rstrip(b"\r\n").split(b"\t")
                if len(fields) != 5 or fields[0] not in (b"0", b"1", b"0.0", b"1.0"):
                    raise InputError(
                        f"{path}, line {number}: not a label 0 or 1, two names and two texts with tabs between"
                    )
                labels.append(int(fields[0][:1]))
                raw.append(tuple(_bytes(text, taking.longest) for text in fields[3:]))
                names.append(f"{path}:{number}")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not raw:
        raise InputError(f"{path} is empty")
    return Examples(
        "texts", raw, np.array(labels, np.int64), ("unrelated", "related"), tuple(names), longest=taking.longest
    )


def _bytes(text: bytes, longest: int) -> np.ndarray:
    """The first bytes of a text; a zero where there are none, for a sequence must have a step."""
    return np.frombuffer(text[: longest or None] or b"\0", np.uint8).copy()


def _image(place: Path, split: str, taking: Taking) -> Examples:
    """CIFAR-10: 45,000 training pictures; the last tenth of the five files is for validation."""
    files = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    images, labels, names = [], [], []
    for name in files:
        batch = _unpickled(place / name)
        pixels, found = batch.get(b"data"), batch.get(b"labels")
        if not (
            isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 2
            and pixels.shape[1] == 3 * 32 * 32 and isinstance(found, list) and len(found) == len(pixels)
            and all(type(label) is int and 0 <= label < 10 for label in found)
        ):  # fmt: skip
            raise InputError(f"{place / name} does not hold pictures of CIFAR-10 and their labels")
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += found
        names += [f"{place / name}:{i}" for i in range(len(pixels))]
    colours = np.concatenate(images)
    first = len(colours) * 9 // 10
    part = {"train": slice(first), "validation": slice(first, None), "test": slice(None)}[split]
    pictures = colours[part] if taking.colour else (colours[part] @ GREY).astype(np.uint8)
    meta = _unpickled(place / "batches.meta") if (place / "batches.meta").exists() else {}
    classes = tuple(name.decode() for name in meta.get(b"label_names", [])) or tuple(map(str, range(10)))
    return Examples("picture", list(pictures), np.array(labels[part], np.int64), classes, tuple(names[part]))


class _Arrays(pickle.Unpickler):
    """Reads arrays and plain values alone: a pickle may otherwise run whatever it likes."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def _unpickled(path: Path) -> dict[Any, Any]:
    try:
        found = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:
        raise InputError(f"{path} is no batch of CIFAR-10 in its Python version: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is no batch of CIFAR-10 in its Python version")
    return found


def _pathfinder(side: int) -> Callable[[Path, str, Taking], Examples]:
    """Eight tenths of the pictures are for training, one for validation, one for testing, in the order of the files."""

    def read(place: Path, split: str, taking: Taking) -> Examples:
        found = list(_marked(place, side))
        if not found:
            raise InputError(f"{place / 'metadata'} names no pictures")
        edges = [0, len(found) * 8 // 10, len(found) * 9 // 10, len(found)]
        at = SPLITS.index(split)
        part = found[edges[at] : edges[at + 1]]
        if not part:
            raise InputError(f"{len(found)} pictures are too few for the split {split}")
        labels = np.array([label for _, label in part], np.int64)
        names = tuple(str(file.path) for file, _ in part)
        return Examples("picture", [file for file, _ in part], labels, ("apart", "connected"), names)

    return read


def _marked(place: Path, side: int) -> Iterator[tuple[PictureFile, int]]:
    """The pictures that tables in metadata/ name, with their labels; the release has empty files, which are none."""
    tables = sorted((place / "metadata").glob("*.npy"), key=lambda p: (len(p.stem), p.stem))
    for table in tables:
        try:
            lines = table.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {table}: {getattr(error, 'strerror', None) or 'it is no text'}") from None
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise InputError(f"{table}, line {number}: not a folder, a file, a number and a label 0 or 1")
            path = place / fields[0] / fields[1]
            try:
                size = path.stat().st_size
            except OSError as error:
                raise InputError(f"{table}, line {number}: {path}: {error.strerror}") from None
            if size:
                yield PictureFile(path, 0, False, (side, side)), int(fields[3])


TASKS: dict[str, tuple[Callable[[Path, str, Taking], Examples], tuple[str, ...], str]] = {
    "listops": (_listops, ("lra_release", "listops-1000"), "basic_train.tsv"),
    "text": (_text, ("aclImdb",), "train"),
    "retrieval": (_retrieval, ("lra_release", "tsv_data"), "new_aan_pairs.train.tsv"),
    "image": (_image, ("cifar-10-batches-py",), "data_batch_1"),
    "pathfinder": (_pathfinder(32), ("lra_release", "pathfinder32", "curv_contour_length_14"), "metadata"),
    "pathx": (_pathfinder(128), ("lra_release", "pathfinder128", "curv_contour_length_14"), "metadata"),
}
"""By name: the reader, where the files lie in what was unpacked, and a name among them."""
