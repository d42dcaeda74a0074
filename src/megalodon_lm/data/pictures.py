"""Picture files as grey levels or colours, read when they are needed."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class PictureFile(NamedTuple):
    """A picture that stays in its file until it is needed.

    Attributes:
        path: of the file.
        side: width and height that it gets: its shorter side is scaled to that, and the middle taken; 0 as it is.
        colour: three values a pixel, red, green and blue, instead of its grey level.
        expected: width and height that it must have where it is taken as it is.
    """

    path: Path
    side: int
    colour: bool = False
    expected: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        """Values."""
        width, height = (self.side, self.side) if self.side else self.expected
        return width * height * (3 if self.colour else 1)

    def read(self) -> NDArray[np.uint8]:
        """The values; see read_picture."""
        found = read_picture(self.path, self.side, self.colour)
        if not self.side and found.shape[1::-1] != self.expected:
            width, height = found.shape[1::-1]
            raise InputError(f"{self.path} is {width} x {height} pixels, not {self.expected[0]} x {self.expected[1]}")
        return found


def read_picture(path: str | Path, side: int = 0, colour: bool = False) -> NDArray[np.uint8]:
    """A picture file as (height, width) grey levels, or (height, width, 3) colours.

    Args:
        path, side, colour: see PictureFile.

    Raises:
        InputError: missing or damaged.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if side:
                image.draft("RGB" if colour else "L", (side, side))  # lets JPEG be decoded no larger than needed
            picture: Image.Image = image
            if image.mode.startswith("I"):  # 16 bits, which the library would cut off at 255
                picture = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) // 257).astype(np.uint8))
            picture = picture.convert("RGB" if colour else "L")
        if side:
            scale = side / min(picture.size)
            width, height = (max(side, round(n * scale)) for n in picture.size)
            left, top = (width - side) // 2, (height - side) // 2
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            picture = picture.crop((left, top, left + side, top + side))
        return np.array(picture)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from None
