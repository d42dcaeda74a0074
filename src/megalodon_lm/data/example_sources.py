"""Where examples with classes come from: generators, files, folders, and archives of official splits."""

from itertools import islice
from pathlib import Path

import numpy as np

from ..errors import InputError
from . import listops
from .example_files import Taking, arrays, expressions, folder
from .examples import Examples
from .long_range_arena import load_official
from .pathfinder import PATHX, PathfinderGeometry, picture

GENERATED = {"listops": 2, "listops-d20": 2, "pathfinder": 3, "pathx": 2}
"""Sources that are generated, and how many numbers they may have."""


def load_examples(source: str, taking: Taking | None = None) -> Examples:
    """Examples of one source.

    Args:
        source: generated ones, `listops:SEED:COUNT`, `listops-d20:SEED:COUNT`, `pathx:SEED:COUNT` or
            `pathfinder:SEED:COUNT:DASHES`; an official split, `lra:TASK:SPLIT:FOLDER`, see long_range_arena; a .tsv
            file of ListOps; an .npz file of `images` and `labels`; an .npy file of pictures, such as train_x.npy, with
            their labels in train_y.npy; a folder of text, sound or picture files, in folders by class, or with the
            class in their names.
        taking: how.

    Raises:
        InputError: missing or malformed source.
    """
    taking = taking or Taking()
    name, _, rest = source.partition(":")
    if name in GENERATED and rest:
        return _generated(name, rest, source)
    if name == "lra" and rest:
        return load_official(rest, taking)
    path = Path(source)
    if path.is_dir():
        return folder(path, taking)
    if path.suffix == ".tsv":
        return expressions(listops.lines(path), str(path))
    if path.suffix in (".npz", ".npy"):
        return arrays(path)
    raise InputError(
        f"no examples in {source}: it is neither a folder nor a .tsv, .npz or .npy file, nor is it generated"
    )


def _generated(name: str, rest: str, source: str) -> Examples:
    numbers = rest.split(":")
    if not 2 <= len(numbers) <= GENERATED[name] or not all(n.isdecimal() for n in numbers) or int(numbers[1]) < 1:
        raise InputError(f"{source!r} must be like {name}:SEED:COUNT, of whole numbers")
    seed, count, *dashes = map(int, numbers)
    if name in ("listops", "listops-d20"):
        made = listops.generate(seed) if name == "listops" else listops.generate(seed, *listops.DEPTH_20)
        return expressions(islice(made, count), source)
    geometry = PATHX if name == "pathx" else PathfinderGeometry.of(*dashes) if dashes else PathfinderGeometry()
    drawn = [picture(seed, i, geometry) for i in range(count)]
    names = tuple(f"{source}:{i}" for i in range(count))
    labels = np.array([label for _, label in drawn], np.int64)
    return Examples("picture", [image for image, _ in drawn], labels, ("apart", "connected"), names)
