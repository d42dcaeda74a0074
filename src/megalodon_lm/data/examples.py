"""Examples with classes, whatever they are: expressions, texts, pairs of texts, pictures or recordings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from . import listops
from .pictures import PictureFile

Kind = Literal["listops", "text", "texts", "picture", "sound"]
BYTES = 256
SAMPLED = 1024  # picture files whose mean and deviation stand for those of all


@dataclass(frozen=True)
class Form:
    """What examples are made of: all that has to be known to classify another one.

    Attributes:
        kind: what they are; "texts" are pairs of them.
        classes: their names, by number.
        rate: of sound, samples a second.
        size: of pictures, width and height.
        patch: numbers that make a step: samples in a row, or the side of a square of pixels; 1 for each by itself.
        mean, deviation: of all numbers in what was trained on, by which they are normalised.
        colour: pictures have three values a pixel.
        scaled: pictures of other sizes are scaled and cut to this one.
        longest: bytes of a text that are read; 0 for all.
    """

    kind: Kind
    classes: tuple[str, ...]
    rate: int = 0
    size: tuple[int, int] = (0, 0)
    patch: int = 1
    mean: float = 0.0
    deviation: float = 1.0
    colour: bool = False
    scaled: bool = False
    longest: int = 0

    @property
    def input(self) -> dict[str, Any]:
        """What an EncoderConfig says of such inputs."""
        pairs = {"pairs": self.kind == "texts"}
        if self.kind == "listops":
            return {"input": "tokens", "vocab_size": len(listops.VOCABULARY), **pairs}
        if self.kind in ("text", "texts"):
            return {"input": "tokens", "vocab_size": BYTES, **pairs}
        width = self.patch if self.kind == "sound" else self.patch**2 * (3 if self.colour else 1)
        return {"input": "numbers", **pairs} if width == 1 else {"input": "patches", "patch_dim": width, **pairs}

    @property
    def described(self) -> str:
        """What they are, in words."""
        if self.kind == "sound":
            return f"sound of {self.rate} Hz"
        if self.kind == "picture":
            return f"{'colour' if self.colour else 'grey'} pictures of {self.size[0]} x {self.size[1]}"
        return {"listops": "expressions of ListOps", "text": "texts", "texts": "pairs of texts"}[self.kind]

    def check(self, examples: "Examples") -> None:
        """Refuse examples that are of another form, as far as that is known before they are read.

        Raises:
            InputError: saying how they differ.
        """
        differ = examples.kind != self.kind or examples.rate != self.rate
        if self.kind == "picture" and not differ:
            shape = (self.size[1], self.size[0], *(3,) * self.colour)
            differ = any(raw.shape != shape for raw in examples.raw if not isinstance(raw, PictureFile))
        if differ:
            raise InputError(f"{examples.names[0]} and what is beside it are not {self.described}")

    def steps(self, raw: NDArray[Any]) -> NDArray[Any]:
        """An example, or one of a pair, as a sequence: (L,) int64 tokens, (L,) float32 or (L, patch_dim) float32.

        Pictures are read line by line. Samples that do not fill a patch are followed by silence.

        Args:
            raw: tokens; bytes; samples; or grey levels (height, width), or colours (height, width, 3).
        """
        if self.kind in ("listops", "text", "texts"):
            return raw.astype(np.int64)
        numbers = (raw.astype(np.float32) - np.float32(self.mean)) / np.float32(self.deviation)
        if self.kind == "sound":
            if self.patch == 1:
                return numbers
            return np.pad(numbers, (0, -len(numbers) % self.patch)).reshape(-1, self.patch)
        if self.patch == 1:
            return numbers.reshape(-1, 3) if self.colour else numbers.reshape(-1)
        height, width = (n // self.patch for n in numbers.shape[:2])
        cut = numbers.reshape(height, self.patch, width, self.patch, -1)
        return cut.swapaxes(1, 2).reshape(height * width, -1)


class Examples(NamedTuple):
    """Examples of one kind, as they came.

    Attributes:
        kind: what they are.
        raw: of each, tokens (L,) uint8, bytes (L,) uint8 or two of these, grey levels (height, width) uint8 or colours
            (height, width, 3), or a PictureFile, or samples (L,) float32.
        labels: (n,) int64, numbers of classes.
        classes: their names.
        names: of each, such as its file's.
        rate: of sound.
        longest: bytes of a text that were read; 0 for all.
    """

    kind: Kind
    raw: Sequence[Any]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    names: tuple[str, ...]
    rate: int = 0
    longest: int = 0

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

    def without(self, others: "Examples") -> "Examples":
        """Those that are not among others, to the last value; pictures that are still in their files are kept."""
        known = {_content(raw) for raw in others.raw}
        return self.take(np.array([i for i, raw in enumerate(self.raw) if _content(raw) not in known], np.int64))

    def form(self, patch: int = 1) -> Form:
        """What they are made of, normalised by their own mean and deviation.

        Raises:
            InputError: pictures of different sizes, or that are no whole patches.
        """
        if self.kind not in ("picture", "sound"):
            return Form(self.kind, self.classes, longest=self.longest)
        raw = self.raw
        files = [r for r in raw if isinstance(r, PictureFile)]
        if files:
            raw = raw[:: -(-len(raw) // SAMPLED)]
        opened = [values(r) for r in raw]
        total = sum(r.size for r in opened)
        mean = float(sum(r.sum(dtype=np.float64) for r in opened) / total)
        deviation = float(sum(np.square(r - mean, dtype=np.float64).sum() for r in opened) / total) ** 0.5 or 1.0
        if self.kind == "sound":
            return Form(self.kind, self.classes, self.rate, patch=patch, mean=mean, deviation=deviation)
        shapes = {r.shape for r in opened}
        if len(shapes) > 1:
            raise InputError(
                f"pictures must be of one size, not {', '.join(map(str, sorted(shapes)[:3]))}; data.side scales them"
            )
        height, width, *colours = shapes.pop()
        if height % patch or width % patch:
            raise InputError(f"data.patch = {patch} must divide the sides of pictures of {width} x {height}")
        return Form(
            self.kind, self.classes, 0, (width, height), patch, mean, deviation, bool(colours),
            any(file.side for file in files),
        )  # fmt: skip


def _content(raw: Any) -> Any:
    """What is the same for equal examples."""
    if isinstance(raw, PictureFile):
        return raw
    return tuple(_content(part) for part in raw) if isinstance(raw, tuple) else (raw.shape, raw.tobytes())


def values(raw: Any) -> Any:
    """What an example is, read if it is still in its file."""
    return raw.read() if isinstance(raw, PictureFile) else raw


def size_of(raw: Any) -> int:
    """Values of an example; of a pair, those of the longer one, which decides how long it is with others."""
    return max(part.size for part in raw) if type(raw) is tuple else raw.size


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
