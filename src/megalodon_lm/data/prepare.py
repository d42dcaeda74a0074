"""From files of text to token shards: in parallel, in constant memory, and going on where it was interrupted."""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import check, digest, write_atomically
from ..interrupts import spared
from ..processors import num_processors
from ..tables import read_sealed, write_sealed
from .chat import ANSWERS, encode_chat
from .documents import Document, DocumentReader, Part, parts_of, place_of, told
from .shards import DOCUMENT, MANIFEST, read_manifest, token_dtype
from .sources import Found, find_files, is_descriptor, is_stream, stat_of
from .tokenizer import Tokenizer, load_tokenizer

SHARD_BYTES = 1 << 26  # of text, about
FAULTS, LEFT_OUT = "faults.jsonl", "left_out.jsonl"
SHARD = re.compile(r"\d{5,}\.(tokens|documents|answers|json)")
UNFINISHED = re.compile(
    rf"\.({SHARD.pattern}|(prepared|tokenizer)\.json|(faults|left_out)\.jsonl|tokenizer\.model)\..+"
)
"""Names of files that a process which was killed leaves behind."""


@dataclass(frozen=True)
class Plan:
    """What is to be made: the same sources and choices give the same shards, bit for bit.

    Attributes:
        tokenizer: name or path.
        fingerprint: of the tokenizer.
        dtype: of tokens.
        field, encoding, chats: see DocumentReader.
        files: path, bytes and time of change of each file.
        parts: of files, that make each shard.
    """

    tokenizer: str
    fingerprint: str
    dtype: str
    field: str
    encoding: str
    chats: bool
    files: list[list[Any]]
    parts: list[list[list[Any]]]


@dataclass
class Progress:
    """Text read so far, in bytes as stored, and how much of it by an earlier call; tokens, documents, faults found."""

    done: int = 0
    earlier: int = 0
    total: int = 0
    tokens: int = 0
    documents: int = 0
    faults: int = 0


def prepare(
    sources: list[str],
    out: Path,
    tokenizer: str = "bytes",
    field: str = "",
    encoding: str = "utf-8",
    chats: bool = False,
    workers: int = 0,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Turn files into a prepared folder; see shards.

    Args:
        sources: files and folders; see find_files.
        out: folder to make, or one in which the same was begun.
        tokenizer: see load_tokenizer.
        field: of JSONL and Parquet that holds the text; by default "text", or "messages" of chats.
        encoding: of text files without a byte order mark.
        chats: every line or row is a chat, whose answers are marked; see chat.
        workers: processes; 0 for one a processor.
        watch: called after each shard.

    Returns:
        The manifest.

    Raises:
        InputError: missing or unreadable source, no text or no answer at all, or `out` holds something else.
    """
    found = find_files(sources, avoid=out)
    plan = _plan(found, tokenizer, field or ("messages" if chats else "text"), encoding, chats)
    _begin(out, plan)
    todo = [i for i in range(len(plan.parts)) if _done(out, i) is None]
    progress = Progress(total=sum(part[3] for parts in plan.parts for part in parts))
    records: dict[int, dict[str, Any]] = {}

    def count(number: int, record: dict[str, Any]) -> None:
        records[number] = record
        progress.done += sum(part[3] for part in plan.parts[number])
        progress.tokens += record["tokens"]
        progress.documents += record["documents"]
        progress.faults += len(record["faults"]) + record["unlisted"]
        watch(progress)

    for i in range(len(plan.parts)):
        if i not in todo and (record := _done(out, i)) is not None:
            count(i, record)
    progress.earlier = progress.done
    if any(is_stream(path) or is_descriptor(path) for path in found.files):
        workers = 1  # no other process can open them
    for number, record in _run(plan, out, todo, workers or num_processors()):
        count(number, record)
    useless = ""
    if not progress.tokens:
        useless = f"the sources hold no text; {_first_fault(plan, records)}"
    elif chats and not any(record["answers"] for record in records.values()):
        useless = f"no message in the chats has the role {ANSWERS!r}: there would be nothing to learn"
    if useless:
        _discard(out)
        raise InputError(useless)
    return _finish(out, plan, found, [records[i] for i in range(len(plan.parts))])


def _plan(found: Found, tokenizer: str, field: str, encoding: str, chats: bool) -> Plan:
    try:
        "".encode(encoding)
    except LookupError:
        raise InputError(f"unknown encoding {encoding!r}; utf-8, latin-1 and cp1252 are usual ones") from None
    loaded = load_tokenizer(tokenizer)
    numbers = {path: i for i, path in enumerate(found.files)}
    parts: list[list[list[Any]]] = []
    held = 0
    for path in found.files:
        for part in parts_of(path, SHARD_BYTES):
            if not parts or held + part.size > SHARD_BYTES:
                parts.append([])
                held = 0
            parts[-1].append([numbers[path], part.start, part.stop, part.size])
            held += part.size
    files = [[str(path), (stat := stat_of(path)).st_size, stat.st_mtime_ns] for path in found.files]
    dtype = token_dtype(loaded.vocab_size).str
    return Plan(tokenizer, loaded.fingerprint, dtype, field, encoding, chats, files, parts)


def _begin(out: Path, plan: Plan) -> None:
    """Write the plan, or find the same one there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        used = any(not path.name.startswith(".") for path in out.iterdir())  # .git and the like do not matter
    except OSError as error:
        raise InputError(f"cannot create the folder {out}: {error.strerror}") from None
    if not used:
        write_sealed(out / MANIFEST, {**asdict(plan), "complete": False})
        return
    if not (out / MANIFEST).exists():
        raise InputError(f"the folder {out} is not empty; choose another one, nothing was overwritten")
    before = read_manifest(out)
    changed = [key for key, value in asdict(plan).items() if before.get(key) != value]
    if changed:
        raise InputError(f"{out} was begun with other {' and '.join(changed)}; choose another folder")


def _run(plan: Plan, out: Path, todo: list[int], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Make shards in processes of their own, and yield their records as they are finished."""
    choices = replace(plan, files=[], parts=[])  # each process gets what its shard is made of, and not all files
    if workers == 1 or len(todo) < 2:
        yield from ((number, make_shard(choices, _pieces(plan, number), out, number)) for number in todo)
        return
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(workers, len(todo)), context, _end_with_parent) as pool:
        try:
            with spared():
                pending: list[Future[dict[str, Any]]] = [
                    pool.submit(make_shard, choices, _pieces(plan, number), out, number) for number in todo
                ]
            yield from ((number, future.result()) for number, future in zip(todo, pending, strict=True))
        except BrokenProcessPool:
            raise InputError("a process was killed, perhaps for lack of memory; try fewer --workers") from None
        except KeyboardInterrupt:
            for worker in set(multiprocessing.active_children()) - others:  # which would go on with what they have
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """Let a worker not outlive the command: when that is killed, a queue of shards would keep it busy."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait, args=[parent.sentinel], daemon=True).start()


def _pieces(plan: Plan, number: int) -> list[tuple[int, Part]]:
    """What a shard is made of: parts of files, and the number of each file."""
    return [(file, Part(plan.files[file][0], start, stop, size)) for file, start, stop, size in plan.parts[number]]


def make_shard(plan: Plan, pieces: list[tuple[int, Part]], out: Path, number: int) -> dict[str, Any]:
    """Write one shard and its record, which comes last and so stands for the whole.

    Until then its files have names of this process's own: another one may be at the same shard, with the same result.

    Args:
        plan: its choices; files and parts are not looked at.
        pieces: see _pieces.
        out: the folder.
        number: of the shard.
    """
    tokenizer, reader = load_tokenizer(plan.tokenizer), DocumentReader(plan.field, plan.encoding, plan.chats)
    name = f"{number:05d}"
    names = [f"{name}.{kind}" for kind in ("tokens", "documents", "answers")[: 2 + plan.chats]]
    unfinished = {n: out / f".{n}.{os.getpid()}" for n in names}
    record: dict[str, Any] = {"name": name, "tokens": 0, "documents": 0, "answers": 0, "lines": []}
    try:
        with contextlib.ExitStack() as stack:
            tokens_file, documents_file, *rest = opened = [stack.enter_context(unfinished[n].open("wb")) for n in names]
            for file, part in pieces:
                lines, faults = reader.lines, len(reader.faults)
                for document in reader.documents(part):
                    for tokens, answers in _encoded(tokenizer, document, part.path):
                        tokens_file.write(tokens.astype(plan.dtype).tobytes())
                        record["tokens"] += len(tokens)
                        if answers is not None:
                            rest[0].write(answers.tobytes())
                            record["answers"] += int(answers.sum())
                    record["documents"] += 1
                    documents_file.write(np.array([(record["tokens"], file, document.offset)], DOCUMENT).tobytes())
                for fault in reader.faults[faults:]:
                    fault["part"] = len(record["lines"])
                record["lines"].append(reader.lines - lines)
            for stream in opened:
                stream.flush()
                os.fsync(stream.fileno())
        record["files"] = {n: digest(unfinished[n]) for n in names}
        for n in names:
            os.replace(unfinished[n], out / n)
    except OSError as error:
        raise InputError(f"cannot write the shard {out / name}: {error.strerror or error}") from None
    finally:  # what is left would take the room that the next try needs
        for path in unfinished.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    record |= {"faults": reader.faults, "unlisted": reader.unlisted}
    write_sealed(out / f"{name}.json", record)
    return record


def _encoded(tokenizer: Tokenizer, document: Document, path: str) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The begin token and what follows it, piece by piece; of a chat also which tokens are answers.

    Raises:
        InputError: the tokenizer refuses it; with the place of the document, which may be one of millions.
    """
    try:
        if isinstance(document.content, list):
            yield encode_chat(document.content, tokenizer)
            return
        yield np.array([tokenizer.begin]), None
        yield from ((tokens, None) for tokens in tokenizer.encode_blocks(document.content))
    except InputError as error:
        raise InputError(f"{path}, {place_of(path, document)}: {error}") from None


def _done(out: Path, number: int) -> dict[str, Any] | None:
    """The record of a finished shard whose files are there."""
    try:
        record = read_sealed(out / f"{number:05d}.json")
        for name, expected in record["files"].items():
            check(out / name, expected, verify=False)
    except InputError:
        return None
    return record if {"lines", "unlisted"} <= record.keys() else None  # which an earlier version did not count


def _finish(out: Path, plan: Plan, found: Found, records: list[dict[str, Any]]) -> dict[str, Any]:
    unlisted = sum(record["unlisted"] for record in records)
    faults = list(_faults(plan, records))
    last = [{"reason": f"{unlisted} more faults are not listed"}] if unlisted else []
    write_atomically(out / FAULTS, "".join(json.dumps(fault) + "\n" for fault in faults + last))
    write_atomically(out / LEFT_OUT, "".join(json.dumps(left._asdict()) + "\n" for left in found.left_out))
    hidden = ("faults", "unlisted", "lines")
    manifest = {
        **asdict(plan),
        "complete": True,
        "shards": [{key: value for key, value in record.items() if key not in hidden} for record in records],
        "tokens": sum(record["tokens"] for record in records),
        "documents": sum(record["documents"] for record in records),
        "answers": sum(record["answers"] for record in records),
        "faults": len(faults) + unlisted,
        "left_out": found.reasons(),
    }
    load_tokenizer(plan.tokenizer).save(out)
    for path in out.iterdir():
        if UNFINISHED.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
    write_sealed(out / MANIFEST, manifest)
    return manifest


def _discard(out: Path) -> None:
    """Take back what was begun, so that another request can have the folder."""
    for path in out.iterdir():
        if path.name == MANIFEST or SHARD.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds something else
        out.rmdir()


def _faults(plan: Plan, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All faults, their lines counted from the beginning of the file instead of that of its part."""
    before = 0
    for parts, record in zip(plan.parts, records, strict=True):
        lines = []  # of its file, before each part
        for (_, start, _, _), count in zip(parts, record["lines"], strict=True):
            lines.append(before if start else 0)
            before = lines[-1] + count
        for fault in record["faults"]:
            whole = fault | ({"line": fault["line"] + lines[fault["part"]]} if "line" in fault else {})
            yield {key: value for key, value in whole.items() if key != "part"}


def _first_fault(plan: Plan, records: dict[int, dict[str, Any]]) -> str:
    fault = next(_faults(plan, [records[i] for i in range(len(plan.parts))]), None)
    return told(fault) if fault else "the files are empty"
