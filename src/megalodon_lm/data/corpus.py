"""Documents named by a recipe or a command line: the bundled novels, files and folders."""

from pathlib import Path

from .books import bundled


def read_documents(sources: list[str]) -> dict[str, bytes]:
    """Read every document of the sources, by name.

    Args:
        sources: "bundled:train", "bundled:validation", a text file, or a folder whose *.txt files are taken in order.

    Raises:
        ValueError: missing or unreadable source, empty text, or no source at all.
    """
    if not sources:
        raise ValueError("no text given; name a file, a folder of .txt files, or bundled:train")
    documents: dict[str, bytes] = {}
    for source in sources:
        if source.startswith("bundled:"):
            documents.update(bundled(source.removeprefix("bundled:")))
            continue
        path = Path(source)
        paths = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not paths:
            raise ValueError(f"the folder {path} holds no .txt file")
        for p in paths:
            documents[str(p)] = read_text(p)
    return documents


def read_text(path: str | Path) -> bytes:
    """The bytes of a file that must exist and hold something.

    Raises:
        ValueError: missing, unreadable or empty.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if not content:
        raise ValueError(f"{path} is empty; there is nothing to read in it")
    return content
