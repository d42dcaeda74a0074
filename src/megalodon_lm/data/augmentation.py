"""What is changed at random in training examples, anew in each epoch, so that fewer of them suffice."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .examples import Kind


@dataclass
class Augmentation:
    """How far training examples are changed; each amount is drawn anew for each example and epoch.

    A recipe's table [augmentation]. Nothing is changed by default, and never what a model is measured on.
    """

    shift: float = 0.0
    """Pictures move by up to so many pixels, whole ones, either way in both directions; sound by up to so many
    milliseconds. What comes in is black, or silent."""
    flip: bool = False
    """Half of the pictures are mirrored, left to right."""
    crop: float = 1.0
    """A part of a picture, of at least this share of its area and of 3/4 to 4/3 its proportions, takes the place of
    all of it."""
    noise: float = 0.0
    """White noise of up to this standard deviation is added to sound, which lies between -1 and 1."""
    gain: float = 0.0
    """Sound gets up to so many decibels louder or softer."""

    def check(self, kind: Kind | None = None) -> None:
        """Refuse values that mean nothing, by themselves or for a kind of examples.

        Raises:
            InputError: naming the key and the rule.
        """
        for key in ("shift", "noise", "gain"):
            value = getattr(self, key)
            if not 0 <= value < math.inf:
                raise InputError(f"augmentation.{key} = {value} must be at least 0, and finite")
        if not 0 < self.crop <= 1:
            raise InputError(f"augmentation.crop = {self.crop} must be above 0 and at most 1")
        usable = {"picture": ("shift", "flip", "crop"), "sound": ("shift", "noise", "gain")}
        for key, value in vars(self).items():
            if kind is not None and value != getattr(Augmentation(), key) and key not in usable.get(kind, ()):
                raise InputError(f"augmentation.{key} = {value!r} is not for {kind}; leave it out")

    def __call__(self, raw: NDArray[Any], kind: Kind, rate: int, draw: np.random.Generator) -> NDArray[Any]:
        """A changed copy of an example, of the same shape and type.

        Args:
            raw: grey levels (height, width), colours (height, width, 3), or samples.
            kind: what it is.
            rate: of sound.
            draw: says how it is changed.
        """
        if kind == "picture":
            return self._picture(raw, draw)
        return self._sound(raw, rate, draw) if kind == "sound" else raw

    def _picture(self, raw: NDArray[np.uint8], draw: np.random.Generator) -> NDArray[np.uint8]:
        if self.crop < 1:
            raw = _cropped(raw, self.crop, draw)
        if self.shift:
            most = min(int(self.shift), *raw.shape[:2])
            down, right = draw.integers(-most, most + 1, 2)
            moved = np.zeros_like(raw)
            height, width = raw.shape[:2]
            moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = raw[
                max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
            ]
            raw = moved
        return raw[:, ::-1] if self.flip and draw.random() < 0.5 else raw

    def _sound(self, raw: NDArray[np.float32], rate: int, draw: np.random.Generator) -> NDArray[np.float32]:
        if self.gain:
            raw = raw * np.float32(10 ** (draw.uniform(-self.gain, self.gain) / 20))
        if self.shift:
            most = int(self.shift * rate / 1000)
            by = int(draw.integers(-most, most + 1))
            moved = np.zeros_like(raw)
            if by >= 0:
                moved[by:] = raw[: max(len(raw) - by, 0)]
            else:
                moved[:by] = raw[-by:]
            raw = moved
        if self.noise:
            noise = draw.standard_normal(len(raw), np.float32)
            raw = raw + np.float32(draw.uniform(0, self.noise)) * noise
        return raw


def _cropped(raw: NDArray[np.uint8], least: float, draw: np.random.Generator) -> NDArray[np.uint8]:
    """A part of a picture, scaled to the size of the whole."""
    from PIL import Image

    height, width = raw.shape[:2]
    area = draw.uniform(least, 1)
    stretch = math.exp(draw.uniform(-math.log(4 / 3), math.log(4 / 3)) / 2)
    part = [min(n, max(1, round(n * math.sqrt(area) * f))) for n, f in ((height, stretch), (width, 1 / stretch))]
    top, left = (int(draw.integers(n - p + 1)) for n, p in zip((height, width), part, strict=True))
    box = (left, top, left + part[1], top + part[0])
    return np.array(Image.fromarray(raw).resize((width, height), Image.Resampling.BILINEAR, box))
