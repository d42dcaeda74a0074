"""The record of a run in its folder: which one it is, and what it learns."""

import json
import time
import uuid
from pathlib import Path

from .. import __version__
from ..errors import InputError
from ..files import write_atomically

RUN_FILE = "run.json"


def write_record(path: Path, of_chats: bool) -> str:
    """Make the folder that of a new run; gives its id.

    Args:
        path: folder.
        of_chats: whether it learns the answers of chats.
    """
    run_id = uuid.uuid4().hex
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = {"id": run_id, "created": created, "version": __version__, "chats": of_chats}
    write_atomically(path / RUN_FILE, json.dumps(record) + "\n")
    return run_id


def identity(path: Path) -> str:
    """The id of the run in a folder.

    Raises:
        InputError: its record is damaged.
    """
    try:
        return str(json.loads((path / RUN_FILE).read_bytes())["id"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path / RUN_FILE} cannot be read; it was truncated or altered") from None


def learnt_chats(path: Path) -> bool | None:
    """Whether the model in a folder was trained on chats, by the record of its run; None where nothing tells."""
    try:
        told = json.loads((path / RUN_FILE).read_bytes())["chats"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return told if isinstance(told, bool) else None
