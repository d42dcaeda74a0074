"""Where long documents and their questions come from: local files in several layouts, or the hub."""

import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError
from .csv_lines import csv_lines
from .documents import Document, DocumentTask, Question

Split = Literal["validation", "train"]
Pairs = Iterator[tuple[str, Question]]
"""Documents, each with one of its questions."""

_ENTAILMENT = ("Not mentioned", "Entailment", "Contradiction")
_LEVAL = {"quality": "quality", "govreport": "gov_report_summ", "summscreen": "tv_show_summ"}
_OPTION = re.compile(r"\s*\([A-D]\)\s*")


def load(task: DocumentTask, data: Path | None, limit: int | None = None) -> list[Document]:
    """The validation documents of a task, each with all its questions, however they are spread over the rows.

    Args:
        task: which.
        data: folder with local files, in which case nothing else is asked; None for the hub.
        limit: documents, from the first.

    Raises:
        InputError: nothing there, a damaged file, or no network.
    """
    documents: dict[str, dict[tuple[str, str], Question]] = {}
    for text, question in _pairs(task, "validation", data):
        if text not in documents and len(documents) == limit:
            continue
        asked, key = documents.setdefault(text, {}), (question.id, question.text)
        references = (asked[key].references if key in asked else ()) + question.references
        asked[key] = replace(question, references=references)
    return [Document(text, list(asked.values())) for text, asked in documents.items()]


def solved_examples(task: DocumentTask, data: Path | None, shots: int) -> list[Document]:
    """The first training documents of a task, each with the first of its questions.

    Raises:
        InputError: fewer than that, or as in `load`.
    """
    found: dict[str, Document] = {}
    if shots:
        for text, question in _pairs(task, "train", data):
            found.setdefault(text, Document(text, [question]))
            if len(found) == shots:
                break
    if len(found) < shots:
        raise InputError(f"{task.name}: {shots} solved examples are more than the {len(found)} training documents")
    return list(found.values())


def _pairs(task: DocumentTask, split: Split, data: Path | None) -> Pairs:
    if data is None:
        return _of_scrolls(task, _zipped(task, _from_hub(task), split))
    if not data.is_dir():
        raise InputError(f"--data {data} is no folder")
    folder, archive = data / task.hub_name, data / f"{task.hub_name}.zip"
    own, places = _OWN_LAYOUTS.get(task.name, (None, {}))
    here = [data / place for place in places.get(split, ())]
    if task.hub_name and (folder / f"{split}.jsonl").exists():
        return _of_scrolls(task, _rows(folder / f"{split}.jsonl"))
    if task.hub_name and archive.exists():
        return _of_scrolls(task, _zipped(task, archive, split))
    for path in here:
        if path.exists():
            assert own is not None
            return _of_its_layout(own, path)
    tried = ([folder / f"{split}.jsonl", archive] if task.hub_name else []) + here
    remedy = "; or take --shots 0" if split == "train" else ""
    raise InputError(f"{task.name}: no {split} documents in {data}: none of {', '.join(map(str, tried))}{remedy}")


def _of_its_layout(own: Callable[[Path], Pairs], path: Path) -> Pairs:
    try:
        yield from own(path)
    except InputError:
        raise
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{path} is not laid out as its authors do: {type(error).__name__}: {error}") from None


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one by one."""
    try:
        with path.open(encoding="utf-8") as lines:
            yield from _parsed(lines, path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _parsed(lines: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}, holds no JSON object")
        yield row


def _zipped(task: DocumentTask, path: Path, split: Split) -> Iterator[dict[str, Any]]:
    """The rows of a split in an archive of SCROLLS."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = next((name for name in archive.namelist() if Path(name).name == f"{split}.jsonl"), None)
            if member is None:
                raise InputError(f"{path} holds no {split}.jsonl")
            with archive.open(member) as raw:
                yield from _parsed(io.TextIOWrapper(raw, encoding="utf-8"), path)
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {str(error) or 'it ends too early'}") from None


def _from_hub(task: DocumentTask) -> Path:
    """The archive of a task, out of the hub's cache or downloaded."""
    elsewhere = "give --data a folder with local files (docs/evaluation.md, long documents)"
    if not task.hub_name:
        raise InputError(f"{task.name} is not on the hub in a form that is read here; {elsewhere}")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging
    except ImportError:
        raise InputError(f"the hub needs more packages: pip install 'megalodon-lm[eval]'; or {elsewhere}") from None
    logging.set_verbosity_error()  # it tries again several times, with two lines each
    try:
        return Path(hf_hub_download("tau/scrolls", f"{task.hub_name}.zip", repo_type="dataset"))
    except Exception as error:  # whatever a network may do
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{task.name} could not be had from the hub ({reason}); {elsewhere}") from None


def _of_scrolls(task: DocumentTask, rows: Iterator[dict[str, Any]]) -> Pairs:
    """Rows of tau/scrolls: `id`, and `input`, in which the question stands before the document, and `output`."""
    for row in rows:
        try:
            name, whole, output = str(row["id"]), row["input"], row["output"]
        except KeyError as error:
            raise InputError(f"{task.name}: a row has no {error}; rows of tau/scrolls have id, input, output") from None
        if not isinstance(whole, str) or not isinstance(output, str):
            raise InputError(f"{task.name}: the input or output of {name} is no text; the test split has no outputs")
        if "{}" not in task.ask:
            yield whole, Question(name, "", (output,))
            continue
        asked, _, text = whole.partition("\n\n")
        choices: tuple[str, ...] = ()
        if task.name == "contractnli":
            choices = _ENTAILMENT
        elif task.name == "quality":
            end = text.find("\n\n", max(0, text.find("(D)")))
            choices, text, output = _options(text[:end]), text[end:].strip(), _plain(output)
        if task.metric == "acc" and output not in choices:
            raise InputError(f"{task.name}: the answer of {name}, {output!r}, is none of its choices {list(choices)}")
        yield text, Question(name, asked, (output,), choices)


def _plain(text: str) -> str:
    """With single spaces."""
    return " ".join(text.split())


def _options(text: str) -> tuple[str, ...]:
    """The choices (A) to (D) in a text that begins with them."""
    return tuple(map(_plain, _OPTION.split(text)[1:]))


def _of_meetings(path: Path) -> Pairs:
    """QMSum as its authors publish it: a JSONL file, or a folder of JSON files; the meeting with who says what."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    for file in files:
        rows = _rows(file) if file.suffix == ".jsonl" else [json.loads(file.read_text(encoding="utf-8"))]
        for number, row in enumerate(rows):
            text = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"])
            queries = [*row["general_query_list"], *row["specific_query_list"]]
            for place, query in enumerate(queries):
                yield text, Question(f"{file.stem}-{number}-{place}", query["query"], (query["answer"],))


def _of_leval(path: Path) -> Pairs:
    """L-Eval: a document with its instructions and outputs."""
    for number, row in enumerate(_rows(path)):
        for place, (asked, output) in enumerate(zip(row["instructions"], row["outputs"], strict=True)):
            name = f"{path.stem}-{number}-{place}"
            if path.stem != _LEVAL["quality"]:
                yield row["input"], Question(name, "", (output,))
                continue
            question, choices = _OPTION.split(asked)[0], _options(asked)
            right = choices["ABCD".index(output.strip().lstrip("(")[0])]
            yield row["input"], Question(name, question, (right,), choices)


def _of_fairy_tales(path: Path) -> Pairs:
    """FairytaleQA: a folder of stories in sections, and beside it one of questions, each with up to six answers."""
    for story in sorted(path.glob("*-story.csv")):
        name = story.name.removesuffix("-story.csv")
        asked = path.parent.parent / "questions" / path.name / f"{name}-questions.csv"
        text = "\n".join(section["text"] for section in _named(csv_lines(story)))
        for row in _named(csv_lines(asked)):
            answers = tuple(a.strip() for k in range(1, 7) if (a := row.get(f"answer{k}", "").strip()))
            if answers:
                yield text, Question(f"{name}-{row['question_id']}", row["question"], answers)


def _named(lines: list[list[str]]) -> list[dict[str, str]]:
    """Lines after the first, which names the fields; a line may end early."""
    return [dict(zip(lines[0], line, strict=False)) for line in lines[1:] if line]


_OWN_LAYOUTS: dict[str, tuple[Callable[[Path], Pairs], dict[Split, tuple[str, ...]]]] = {
    "qmsum": (
        _of_meetings,
        {"validation": ("qmsum/val.jsonl", "qmsum/val"), "train": ("qmsum/train",)},
    ),
    **{name: (_of_leval, {"validation": (f"leval/{file}.jsonl",)}) for name, file in _LEVAL.items()},
    "fairytaleqa": (
        _of_fairy_tales,
        {
            "validation": ("fairytaleqa/data-by-train-split/section-stories/val",),
            "train": ("fairytaleqa/data-by-train-split/section-stories/train",),
        },
    ),
}
"""Of tasks whose authors publish files of their own: how they are read, and where they are in a folder of data."""
