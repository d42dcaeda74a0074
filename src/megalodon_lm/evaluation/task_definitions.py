"""The harness's own definitions of tasks: prompts, choices and metrics, over local data or over that of the hub."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Kind

from ..errors import InputError, nearest
from .results_table import published
from .task_data import LocalCopies

FOLDERS = {
    "mmlu": "mmlu/default", "boolq": "super_glue/boolq", "hellaswag": "hellaswag", "piqa": "piqa",
    "social_iqa": "siqa", "winogrande": "winogrande", "arc_easy": "arc", "arc_challenge": "arc", "nq_open": "nq_open",
    "triviaqa": "triviaqa", "lambada_openai": "lambada", "lambada_standard": "lambada",
}  # fmt: skip
"""Where the definitions of the usual tasks lie in the harness: reading all of its thousands takes ten times as long as
all else before the first question."""
TABLE = tuple(task for task in FOLDERS if task not in ("lambada_openai", "lambada_standard"))
"""The ten of the table in the paper, which the name `paper` stands for."""
OTHER_NAMES = {"siqa": "social_iqa", "nq": "nq_open", "tqa": "triviaqa", "lambada": "lambada_openai"}


class Definitions:
    """What the harness knows of tasks, with their data.

    Args:
        names: of tasks, groups and tags of the harness; `paper` for the ten of the paper's table.
        data: folder of local copies, from which alone the data comes then; None for the hub.

    Raises:
        InputError: an unknown task, or no such folder.
    """

    def __init__(self, names: Sequence[str], data: Path | None = None):
        self.copies = None if data is None else LocalCopies(data)
        self.left_out: dict[str, list[str]] = {}
        """By group, the tasks of which there is no local copy."""
        wanted = [name for given in names for name in (TABLE if given == "paper" else [OTHER_NAMES.get(given, given)])]
        self.names = list(dict.fromkeys(wanted))
        for library in ("lm_eval", "huggingface_hub"):  # the latter tries again several times, with two lines each
            logging.getLogger(library).setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        base = Path(lm_eval.tasks.__file__).parent
        kinds = [name if name in FOLDERS else name.split("_")[0] for name in self.names]  # also mmlu_anatomy
        folders = sorted({FOLDERS[kind] for kind in kinds if kind in FOLDERS})
        self._manager = TaskManager(include_defaults=False, include_path=[base / folder for folder in folders])
        if not all(name in self._manager.task_index for name in self.names):
            self._manager = TaskManager()
        known = self._manager.task_index
        for name in self.names:
            if name not in known:
                raise InputError(f"no task {name!r}{nearest(name, known)}; usual ones: {', '.join(FOLDERS)}, or paper")
        if self.copies is not None:
            self._manager._factory = _OverLocalCopies(self.copies)

    def load(self, name: str) -> Any:
        """A task, or the tasks of a group, with their data, as the harness evaluates them.

        Raises:
            InputError: the data is not in the folder, or the hub cannot be reached.
        """
        if self.copies is not None:
            self._leave_out_what_is_not_there(name, self.copies)
        try:
            return self._manager.load(name)
        except InputError:
            raise
        except OSError as error:
            said = str(error).split("\n")[0]
            raise InputError(
                f"the data of {name} is not on this machine and the hub cannot be had ({said}); name a folder that "
                "holds it with --data"
            ) from None

    def _leave_out_what_is_not_there(self, name: str, copies: LocalCopies) -> None:
        """Of a group, the tasks without a local copy."""
        index = self._manager.task_index
        found = False
        for tag, task in _leaves(name, index):
            assert index[task].cfg is not None
            if copies.find(index[task].cfg) is not None:
                found = True
            elif tag is not None:
                index[tag].tags.discard(task)
                self.left_out.setdefault(name, []).append(task)
        if not found:
            raise InputError(
                f"the data of {name} is not in {copies.folder}; docs/evaluation.md says how it may lie there"
            )


def _leaves(name: str, index: Mapping[str, Any], tag: str | None = None) -> Iterator[tuple[str | None, str]]:
    """The tasks that a name stands for, each with the tag that it was found by, if any."""
    entry = index[name]
    if entry.kind is Kind.TAG:
        for task in sorted(entry.tags):
            yield from _leaves(task, index, name)
    elif entry.kind is Kind.GROUP:
        for member in entry.cfg["task"]:
            yield from _leaves(member if isinstance(member, str) else member.get("task", member.get("group")), index)
    else:
        yield tag, name


class _OverLocalCopies(TaskFactory):
    """Makes the harness's tasks over local data."""

    def __init__(self, copies: LocalCopies):
        super().__init__()
        self._copies = copies

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        if "dataset_path" in config:
            splits = self._copies.find(config)
            if splits is None:
                raise InputError(f"the data of {config['task']} is not in {self._copies.folder}")
            config["custom_dataset"] = lambda **_: splits
        return config


def usual_shots(name: str) -> int:
    """Solved examples in a prompt of the paper's table, also for a part of MMLU alone; 0 for other tasks."""
    columns = {column["task"]: column.get("shots", 0) for column in published()["columns"]}
    return int(columns.get("mmlu" if name.startswith("mmlu_") else name, 0))
