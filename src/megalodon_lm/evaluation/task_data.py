"""Local copies of the data of the harness's tasks: prompts and metrics stay the harness's, only the source changes.

Three layouts are understood, in the folder itself or in folders under it:

- the CSV files of MMLU's authors, `test/anatomy_test.csv`, with or without a header;
- JSONL files of questions, `choices` and `gold`, or of `context_options`, `continuation` and `gold`, as llm-foundry's;
- folders as the datasets of the hub are kept, `winogrande/winogrande_xl/validation-00000-of-00001.parquet`, in Parquet,
  JSONL, JSON or CSV, and single files with the fields of the hub, `social_iqa.jsonl`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .csv_lines import csv_lines

Row = dict[str, Any]
ENDINGS = (".parquet", ".jsonl", ".json", ".csv")
MMLU = ("question", "choice0", "choice1", "choice2", "choice3", "answer")


def _boolq(row: Row) -> Row:
    passage, _, question = row["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
    return {"passage": passage, "question": question.removesuffix("?"), "label": row["gold"]}


def _piqa(row: Row) -> Row:
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}


def _arc(row: Row) -> Row:
    labels = list("ABCDEFGH"[: len(row["choices"])])
    question = row["query"].removeprefix("Question: ")
    return {
        "question": question,
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


def _winogrande(row: Row) -> Row:
    first, second = row["context_options"]
    same = next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    common = first[: first.rfind(" ", 0, same) + 1]  # the options are whole words
    options = {"option1": first[len(common) :], "option2": second[len(common) :]}
    return {"sentence": f"{common}_ {row['continuation']}", "answer": str(row["gold"] + 1), **options}


FOUNDRY: dict[tuple[str, str], tuple[str, Callable[[Row], Row]]] = {
    ("super_glue", "boolq"): ("boolq*.jsonl", _boolq),
    ("piqa", ""): ("piqa*.jsonl", _piqa),
    ("ai2_arc", "ARC-Easy"): ("arc_easy*.jsonl", _arc),
    ("ai2_arc", "ARC-Challenge"): ("arc_challenge*.jsonl", _arc),
    ("winogrande", "winogrande_xl"): ("winogrande*.jsonl", _winogrande),
    ("hellaswag", ""): ("hellaswag*.jsonl", lambda row: row),
}
"""By the dataset and its part: files of llm-foundry, and what makes rows of the hub out of theirs."""


class Splits(dict[str, Any]):
    """The splits of a task's data, each read when it is asked for; those that are not there are empty.

    Args:
        sources: by split, where its rows come from.
    """

    def __init__(self, sources: Mapping[str, Callable[[], Iterable[Row]]]):
        super().__init__()
        self.sources = sources

    def __missing__(self, split: str) -> Any:
        import datasets

        if split in self.sources:
            self[split] = datasets.Dataset.from_list(list(self.sources[split]()))
        else:
            known = self[next(iter(self.sources))]
            self[split] = datasets.Dataset.from_dict({name: [] for name in known.column_names}, known.features)
        return self[split]


class LocalCopies:
    """A folder in which the data of tasks lies.

    Args:
        folder: see above for what may be in it.

    Raises:
        InputError: no such folder.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise InputError(f"--data {folder} is no folder")
        self.folder = folder
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
        self.roots = [folder, *inside]

    def find(self, config: Mapping[str, Any]) -> Splits | None:
        """The data of a task, or None if the split that it asks about is not there.

        Args:
            config: of the harness's definition.
        """
        dataset, part = str(config.get("dataset_path", "")), str(config.get("dataset_name") or "")
        name = dataset.rpartition("/")[2]
        asked = config.get("test_split") or config.get("validation_split")
        for sources in (
            self._authors_mmlu(part) if name == "mmlu" else {},
            self._hub(dataset, part),
            self._single(asked, FOUNDRY.get((name, part)), [config.get("task"), part, name]),
        ):
            if asked in sources:
                return Splits(sources)
        return None

    def _authors_mmlu(self, subject: str) -> dict[str, Callable[[], Iterable[Row]]]:
        for root in self.roots:
            found = {split: root / split / f"{subject}_{split}.csv" for split in ("dev", "val", "test")}
            found = {split: path for split, path in found.items() if path.is_file()}
            if found:
                return {split: _reader(path, _mmlu, MMLU) for split, path in found.items()}
        return {}

    def _hub(self, dataset: str, part: str) -> dict[str, Callable[[], Iterable[Row]]]:
        owner, _, name = dataset.rpartition("/")
        inside = [] if part in ("", "default") else [part]
        for base in (self.folder / owner, *self.roots):
            for place in (base.joinpath(name, *inside), base.joinpath(name, "data", *inside)):
                files: dict[str, list[Path]] = {}
                for path in sorted((*place.glob("*"), *place.glob("*/*"))):
                    if path.suffix in ENDINGS and (split := _split_of(path, place)):
                        files.setdefault(split, []).append(path)
                if files:
                    return {split: _reader_of_many(paths) for split, paths in files.items()}
        return {}

    def _single(
        self, split: Any, foundry: tuple[str, Callable[[Row], Row]] | None, names: list[Any]
    ) -> dict[str, Callable[[], Iterable[Row]]]:
        for root in self.roots:
            for path in sorted(root.glob(foundry[0])) if foundry else ():
                if _is_foundry(path):
                    assert foundry is not None
                    return {split: _reader(path, foundry[1])}
            for path in (root / f"{name}{ending}" for name in names if name for ending in ENDINGS):
                if path.is_file():
                    return {split: _reader(path)}
        return {}


def _split_of(path: Path, place: Path) -> str | None:
    """Which split a file of a dataset holds, by the folder it lies in, or by its name."""
    words = [path.parent.name] if path.parent != place else path.stem.replace(".", "-").replace("_", "-").split("-")
    found = next((word for word in words if word in ("train", "validation", "val", "test", "dev")), None)
    return "validation" if found == "val" else found


def _is_foundry(path: Path) -> bool:
    """Whether the rows of a file have the fields of llm-foundry, or those of HellaSwag, which are everybody's."""
    first = next(iter(_rows(path)), {})
    return "gold" in first or "ctx_a" in first


def _mmlu(row: Row) -> Row:
    answer = row["answer"]
    answer = "ABCD".index(answer) if answer in ("A", "B", "C", "D") else int(answer)
    return {"question": row["question"], "choices": [row[f"choice{n}"] for n in range(4)], "answer": answer}


def _reader(
    path: Path, convert: Callable[[Row], Row] = lambda row: row, columns: Sequence[str] = ()
) -> Callable[[], Iterable[Row]]:
    def read() -> Iterable[Row]:
        try:
            return [convert(row) for row in _rows(path, columns)]
        except InputError:
            raise
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(f"{path} has a row that is not as expected: {type(error).__name__}: {error}") from None

    return read


def _reader_of_many(paths: list[Path]) -> Callable[[], Iterable[Row]]:
    return lambda: [row for path in paths for row in _reader(path)()]


def _rows(path: Path, columns: Sequence[str] = ()) -> Iterable[Row]:
    """The rows of a file, by its ending.

    Args:
        path: of the file.
        columns: of a CSV file, which then may or may not begin with them.

    Raises:
        InputError: it cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".csv":
            lines = csv_lines(path)
            names = lines.pop(0) if lines and (not columns or lines[0] == list(columns)) else columns
            yield from (dict(zip(names, line, strict=True)) for line in lines)
        else:
            text = path.read_text(encoding="utf-8")
            whole = text.lstrip().startswith("[")
            yield from json.loads(text) if whole else map(json.loads, filter(str.strip, text.split("\n")))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
