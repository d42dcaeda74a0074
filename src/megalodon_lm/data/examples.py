"""Examples with classes, whatever they are: expressions, pictures or recordings, from files or from a generator."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from . import listops
from .pathfinder import PATHX, PathfinderGeometry, picture
from .sound import SUFFIXES, read_sound, sound_rate

Kind = Literal["listops", "picture", "sound"]
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")


@dataclass(frozen=True)
class Form:
    """What examples are made of: all that has to be known to classify another one.

    Attributes:
        kind: what they are.
        classes: their names, by number.
        rate: of sound, samples a second.
        size: of pictures, width and height.
        patch: numbers that make a step: samples in a row, or the side of a square of pixels; 1 for each by itself.
        mean, deviation: of all numbers in what was trained on, by which they are normalised.
    """

    kind: Kind
    classes: tuple[str, ...]
    rate: int = 0
    size: tuple[int, int] = (0, 0)
    patch: int = 1
    mean: float = 0.0
    deviation: float = 1.0

    @property
    def input(self) -> dict[str, Any]:
        """What an EncoderConfig says of such inputs."""
        if self.kind == "listops":
            return {"input": "tokens", "vocab_size": len(listops.VOCABULARY)}
        if self.patch == 1:
            return {"input": "numbers"}
        return {"input": "patches", "patch_dim": self.patch if self.kind == "sound" else self.patch**2}

    def steps(self, raw: NDArray[Any]) -> NDArray[Any]:
        """An example as a sequence: (L,) int64 tokens, (L,) float32 numbers or (L, patch_dim) float32.

        Pictures are read line by line. Samples that do not fill a patch are followed by silence.

        Args:
            raw: tokens; samples; or grey levels (height, width).
        """
        if self.kind == "listops":
            return raw.astype(np.int64)
        numbers = (raw.astype(np.float32) - np.float32(self.mean)) / np.float32(self.deviation)
        if self.patch == 1:
            return numbers.reshape(-1)
        if self.kind == "sound":
            return np.pad(numbers, (0, -len(numbers) % self.patch)).reshape(-1, self.patch)
        height, width = (n // self.patch for n in numbers.shape)
        cut = numbers[: height * self.patch, : width * self.patch].reshape(height, self.patch, width, self.patch)
        return cut.swapaxes(1, 2).reshape(height * width, -1)


class Examples(NamedTuple):
    """Examples of one kind, as they came.

    Attributes:
        kind: what they are.
        raw: of each, tokens (L,) uint8, grey levels (height, width) uint8 or samples (L,) float32.
        labels: (n,) int64, numbers of classes.
        classes: their names.
        names: of each, such as its file's.
        rate: of sound.
    """

    kind: Kind
    raw: Sequence[NDArray[Any]]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    names: tuple[str, ...]
    rate: int = 0

    def take(self, which: NDArray[np.int64]) -> "Examples":
        """Some of them, by number."""
        some = which.tolist()
        raw, names = [self.raw[i] for i in some], tuple(self.names[i] for i in some)
        return self._replace(raw=raw, labels=self.labels[which], names=names)

    def with_classes(self, classes: Sequence[str]) -> "Examples":
        """The same with the numbers that classes have elsewhere.

        Raises:
            InputError: a class that is not among them.
        """
        if unknown := [name for name in self.classes if name not in classes]:
            raise InputError(f"class {unknown[0]!r} of {self.names[0]} is not among {', '.join(classes)}")
        numbers = np.array([classes.index(name) for name in self.classes], np.int64)
        return self._replace(classes=tuple(classes), labels=numbers[self.labels])

    def form(self, patch: int = 1) -> Form:
        """What they are made of, normalised by their own mean and deviation."""
        mean, deviation, size = 0.0, 1.0, (0, 0)
        if self.kind != "listops":
            total = sum(len(r.reshape(-1)) for r in self.raw)
            mean = float(sum(r.sum(dtype=np.float64) for r in self.raw) / total)
            deviation = float(sum(np.square(r - mean, dtype=np.float64).sum() for r in self.raw) / total) ** 0.5 or 1.0
        if self.kind == "picture":
            sizes = {r.shape for r in self.raw}
            if len(sizes) > 1:
                raise InputError(f"pictures must be of one size, not {', '.join(map(str, sorted(sizes)[:3]))}")
            height, width = sizes.pop()
            size = (width, height)
        return Form(self.kind, self.classes, self.rate, size, patch, mean, deviation)


def load_examples(source: str, label: str = "") -> Examples:
    """Examples of one source.

    Args:
        source: generated ones, `listops:SEED:COUNT`, `pathx:SEED:COUNT` or `pathfinder:SEED:COUNT:DASHES`; a .tsv file
            of ListOps; an .npz file of `images` and `labels`; an .npy file of pictures, such as train_x.npy, with their
            labels in train_y.npy; a folder of sound or picture files, in folders by class, or with the class in their
            names.
        label: for a folder, a regular expression whose first group is the class in a file's name; "" for class folders.

    Raises:
        InputError: missing or malformed source.
    """
    name, _, rest = source.partition(":")
    if name in ("listops", "pathfinder", "pathx") and rest:
        return _generated(name, rest, source)
    path = Path(source)
    if path.is_dir():
        return _folder(path, label)
    if path.suffix == ".tsv":
        expressions, labels = listops.read(path)
        return _listops(expressions, labels, str(path))
    if path.suffix in (".npz", ".npy"):
        return _arrays(path)
    raise InputError(
        f"no examples in {source}: it is neither a folder nor a .tsv, .npz or .npy file, nor is it generated"
    )


def joined(parts: Sequence[Examples]) -> Examples:
    """Examples of several sources as one, with the classes of all.

    Raises:
        InputError: of different kinds or rates.
    """
    classes = tuple(dict.fromkeys(name for part in parts for name in part.classes))
    parts = [part.with_classes(classes) for part in parts]
    for part in parts[1:]:
        if (part.kind, part.rate) != (parts[0].kind, parts[0].rate):
            raise InputError(f"{part.names[0]} and {parts[0].names[0]} are of different kinds or rates")
    labels = np.concatenate([part.labels for part in parts])
    raw, names = [r for part in parts for r in part.raw], tuple(n for part in parts for n in part.names)
    return parts[0]._replace(raw=raw, labels=labels, names=names)


def _listops(expressions: Sequence[Sequence[str]], labels: Sequence[int], source: str) -> Examples:
    raw = [np.array([listops.NUMBER_OF[token] for token in tokens], np.uint8) for tokens in expressions]
    names = tuple(f"{source}:{i + 1}" for i in range(len(raw)))
    return Examples("listops", raw, np.array(labels, np.int64), tuple(map(str, range(10))), names)


def _generated(name: str, rest: str, source: str) -> Examples:
    numbers = rest.split(":")
    most = 3 if name == "pathfinder" else 2
    if not 2 <= len(numbers) <= most or not all(n.isdecimal() for n in numbers) or int(numbers[1]) < 1:
        raise InputError(f"{source!r} must be like {name}:SEED:COUNT, of whole numbers")
    seed, count, *dashes = map(int, numbers)
    if name == "listops":
        expressions, labels = zip(*islice(listops.generate(seed), count), strict=True)
        return _listops(expressions, labels, source)
    geometry = PATHX if name == "pathx" else PathfinderGeometry(dashes=dashes[0]) if dashes else PathfinderGeometry()
    made = [picture(seed, i, geometry) for i in range(count)]
    names = tuple(f"{source}:{i}" for i in range(count))
    found = np.array([label for _, label in made], np.int64)
    return Examples("picture", [image for image, _ in made], found, ("apart", "connected"), names)


def _arrays(path: Path) -> Examples:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                images, labels = file["images"], file["labels"]
        else:
            images = np.load(path, allow_pickle=False)
            labels = np.load(path.with_name(path.name.replace("_x", "_y")), allow_pickle=False)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path} holds no pictures with labels: {error}") from None
    if images.ndim != 3 or images.dtype != np.uint8 or labels.shape != images.shape[:1] or not len(images):
        raise InputError(f"{path} must hold grey pictures (n, height, width) uint8 and n labels, not {images.shape}")
    classes = tuple(map(str, range(int(labels.max()) + 1)))
    names = tuple(f"{path}:{i}" for i in range(len(images)))
    return Examples("picture", list(images), labels.astype(np.int64), classes, names)


def _folder(path: Path, label: str) -> Examples:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (*SUFFIXES, *PICTURES))
    if not files:
        raise InputError(f"no sound or picture files in {path}")
    try:
        pattern = re.compile(label)
    except re.error as error:
        raise InputError(f"label = {label!r} is no regular expression: {error}") from None
    named = []
    for file in files:
        if not label:
            named.append(file.parent.name)
        elif (found := pattern.search(file.name)) is None or not pattern.groups:
            raise InputError(f"{file} has no class by label = {label!r}, whose first group names it")
        else:
            named.append(found[1])
    classes = tuple(sorted(set(named)))
    labels = np.array([classes.index(name) for name in named], np.int64)
    names = tuple(map(str, files))
    if files[0].suffix.lower() in SUFFIXES:
        rate = sound_rate(files[0])
        return Examples("sound", [read_sound(file, rate) for file in files], labels, classes, names, rate)
    return Examples("picture", [read_picture(file) for file in files], labels, classes, names)


def read_picture(path: str | Path) -> NDArray[np.uint8]:
    """Grey levels (height, width) of a picture file.

    Raises:
        InputError: missing or damaged.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.array(image.convert("L"))
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from None
