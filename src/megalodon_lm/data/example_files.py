"""Examples with classes in files: arrays, folders of text, sound or pictures, and single ones to classify."""

import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from . import listops
from .examples import Examples, Form
from .pictures import PICTURES, PictureFile, read_picture
from .sound import SUFFIXES, read_sound, sound_rate

TEXTS = (".txt",)


@dataclass(frozen=True)
class Taking:
    """How files are taken.

    Attributes:
        label: for a folder, a regular expression whose first group is the class in a file's name; "" for class folders.
        side: of pictures, see PictureFile.
        colour: of pictures, see PictureFile.
        longest: bytes of a text that are read; 0 for all.
    """

    label: str = ""
    side: int = 0
    colour: bool = False
    longest: int = 0


def expressions(found: Iterable[tuple[Sequence[str], int]], source: str) -> Examples:
    """Expressions of ListOps with their values."""
    raw, labels = [], []
    for tokens, label in found:
        raw.append(np.array([listops.NUMBER_OF[token] for token in tokens], np.uint8))
        labels.append(label)
    names = tuple(f"{source}:{i + 1}" for i in range(len(raw)))
    return Examples("listops", raw, np.array(labels, np.int64), tuple(map(str, range(10))), names)


def arrays(path: Path) -> Examples:
    """Examples of a file of arrays: an .npz of `images` and `labels`, or an .npy of pictures beside one of labels.

    Raises:
        InputError: missing or malformed.
    """
    try:
        if path.suffix == ".npz":
            with open(path, "rb") as file:
                both = np.load(file, allow_pickle=False)
                images, labels = both["images"], both["labels"]
        else:
            images = np.load(path, allow_pickle=False)
            labels = np.load(path.with_name(path.name.replace("_x", "_y")), allow_pickle=False)
    except (OSError, ValueError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} holds no pictures with labels: {error}") from None
    if (
        not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3))
        or images.dtype != np.uint8
        or labels.shape != images.shape[:1]
        or not len(images)
    ):
        raise InputError(
            f"{path} must hold pictures (n, height, width) or (n, height, width, 3) uint8 and n labels, not "
            f"{images.dtype} of {images.shape} and labels of {labels.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise InputError(f"{path} must have labels that are whole numbers from 0, not {labels.dtype}")
    classes = tuple(map(str, range(int(labels.max()) + 1)))
    names = tuple(f"{path}:{i}" for i in range(len(images)))
    return Examples("picture", list(images), labels.astype(np.int64), classes, names)


def folder(path: Path, taking: Taking) -> Examples:
    """Examples of a folder of files, which must all be texts, sounds or pictures.

    Raises:
        InputError: none there, several kinds, or one that cannot be read or has no class.
    """
    kinds = {"sound": SUFFIXES, "picture": PICTURES, "text": TEXTS}
    kind_of = {suffix: kind for kind, suffixes in kinds.items() for suffix in suffixes}
    found = {p: kind_of[p.suffix.lower()] for p in _below(path) if p.suffix.lower() in kind_of}
    found = {p: kind for p, kind in found.items() if p.is_file()}
    if "sound" in found.values() or "picture" in found.values():  # a letter beside them is none of the examples
        found = {p: kind for p, kind in found.items() if kind != "text"}
    if not found:
        raise InputError(f"no sound, picture or text files in {path}")
    if len(set(found.values())) > 1:
        raise InputError(f"{path} holds both sound and pictures; give a folder of one of them")
    files = list(found)
    named = _classes(files, path, taking.label)
    classes = tuple(sorted(set(named)))
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name] for name in named], np.int64)
    names = tuple(map(str, files))
    kind = found[files[0]]
    if kind == "sound":
        rate = sound_rate(files[0])
        return Examples("sound", [read_sound(file, rate) for file in files], labels, classes, names, rate)
    if kind == "text":
        return Examples(
            "text", [read_text(file, taking.longest) for file in files], labels, classes, names, longest=taking.longest
        )
    pictures = [
        PictureFile(file, taking.side, taking.colour) if taking.side else read_picture(file, 0, taking.colour)
        for file in files
    ]
    return Examples("picture", pictures, labels, classes, names)


def _below(path: Path) -> list[Path]:
    """All files below a folder in the order of their paths, but hidden ones, such as in .ipynb_checkpoints."""

    def refuse(error: OSError) -> None:  # a class would be missing
        raise InputError(f"cannot read {error.filename}: {error.strerror}")

    found = []
    for where, folders, files in os.walk(path, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _classes(files: list[Path], path: Path, label: str) -> list[str]:
    """The class of each file, by its name or its folder."""
    try:
        pattern = re.compile(label)
    except re.error as error:
        raise InputError(f"label = {label!r} is no regular expression: {error}") from None
    named = []
    for file in files:
        if not label:
            if file.parent == path:
                raise InputError(f"{file} lies in no class folder of {path}; data.label finds classes in names")
            named.append(file.parent.name)
        elif (found := pattern.search(file.name)) is None or not pattern.groups or found[1] is None:
            raise InputError(f"{file} has no class by label = {label!r}, whose first group names it")
        else:
            named.append(found[1])
    return named


def read_text(path: str | Path, longest: int) -> np.ndarray:
    """The first bytes of a text file, (L,) uint8.

    Args:
        path: of the file.
        longest: bytes that are read; 0 for all.

    Raises:
        InputError: missing or empty.
    """
    try:
        with open(path, "rb") as file:
            found = np.frombuffer(file.read(longest or -1), np.uint8)
    except OSError as error:
        raise InputError(f"{path} cannot be read as text: {error.strerror}") from None
    if not len(found):
        raise InputError(f"{path} is empty")
    return found


def read_example(files: Sequence[str], form: Form) -> Any:
    """One example to classify, as an `Examples` has it.

    Args:
        files: one, or of pairs two; of ListOps the expression itself.
        form: of what a model takes.

    Raises:
        InputError: it cannot be read, or is of another form.
    """
    if form.kind == "texts":
        return tuple(read_text(file, form.longest) for file in files)
    (file,) = files
    if form.kind == "listops":
        tokens = listops.parse(file)
        listops.evaluate(tokens)  # refuses what is none
        return np.array([listops.NUMBER_OF[token] for token in tokens], np.uint8)
    if form.kind == "text":
        return read_text(file, form.longest)
    if form.kind == "sound":
        return read_sound(file, form.rate)
    return PictureFile(Path(file), form.size[0] if form.scaled else 0, form.colour, form.size).read()
