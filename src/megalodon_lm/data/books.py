"""The novels inside the package; BOOKS.md beside this file tells where they come from."""

import tarfile
from functools import cache
from importlib.resources import as_file, files

from ..errors import InputError


@cache
def bundled(split: str) -> dict[str, bytes]:
    """The novels of a split, by name.

    Args:
        split: "train" (eight novels, 15.2 MB) or "validation" (Dracula, 0.8 MB).

    Raises:
        InputError: unknown split.
    """
    if split not in ("train", "validation"):
        raise InputError(f"no bundled split {split!r}; there are 'train' and 'validation'")
    found = {}
    with as_file(files(__package__) / "books.tar.xz") as path, tarfile.open(path) as archive:
        for member in archive:
            folder, _, name = member.name.partition("/")
            if folder == split and member.isfile():
                content = archive.extractfile(member)
                assert content is not None
                found[name.removesuffix(".txt")] = content.read()
    return found
