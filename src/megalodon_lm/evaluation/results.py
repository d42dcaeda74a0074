"""Results: what an evaluation found, as a file that says all that is needed to find it again."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from ..data.tokenizer import Tokenizer
from ..errors import InputError
from ..files import RESULTS, check_writable, write_atomically
from ..model.language_model import LanguageModel

PACKAGES = ("megalodon-lm", "torch", "numpy", "tokenizers", "lm_eval", "datasets", "transformers", "rouge-score")
"""Those whose versions may change a result; a file names the ones that are installed."""


class Score(NamedTuple):
    """One figure of a task."""

    value: float
    """Of a share, such as accuracy, F1 or ROUGE, from 0 to 1."""
    standard_error: float | None = None
    share: bool = True
    """Whether it is one; tables show shares in percent. A perplexity is none."""

    def __str__(self) -> str:
        scale, digits = (100, 1) if self.share else (1, 3)
        error = "" if self.standard_error is None else f" ± {scale * self.standard_error:.{digits}f}"
        return f"{scale * self.value:.{digits}f}{error}"


@dataclass(frozen=True)
class TaskResult:
    """What one task found."""

    task: str
    version: str
    """Of the task's definition."""
    shots: int
    """Solved examples in each prompt."""
    samples: int
    """Questions that were asked."""
    scores: dict[str, Score]
    """By the name of the metric."""
    headline: str
    """The metric that tables show."""
    seconds: float = 0.0
    tokens_computed: int = 0
    """That went through the model."""
    tokens_reread: int = 0
    """That would have if every request had been read from its beginning."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What else belongs to it, as plain values: what was cut or left out, scores of parts."""
    peak_memory: int | None = None
    """Bytes of the whole process at their most while it ran; None where the system does not tell."""

    @property
    def is_sound(self) -> bool:
        """Whether a table can show it: the headline is there, and figures are numbers."""
        figures = [self.shots, self.samples, *(s.value for s in self.scores.values())]
        errors = [s.standard_error for s in self.scores.values() if s.standard_error is not None]
        return self.headline in self.scores and all(isinstance(f, int | float) for f in figures + errors)


@dataclass(frozen=True)
class Results:
    """All that one command found about one model."""

    name: str
    """Of the model, in tables."""
    model: dict[str, Any]
    """What identifies it: see `identify`."""
    settings: dict[str, Any]
    """Seeds, precision, limit and whatever else may change a result."""
    tasks: list[TaskResult]
    packages: dict[str, str] = field(default_factory=lambda: installed(PACKAGES))
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically.

        Raises:
            InputError: the path cannot be written, or holds something that is no result.
        """
        check_writable(path, RESULTS)
        write_atomically(path, json.dumps({"megalodon_results": 1} | asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """Read what `save` wrote.

        Raises:
            InputError: missing, or no file of results.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values.pop("megalodon_results") != 1:
                raise InputError(f"{path} is of a later version of megalodon")
            tasks = [
                TaskResult(**task | {"scores": {name: Score(*score) for name, score in task["scores"].items()}})
                for task in values.pop("tasks")
            ]
            if not all(task.is_sound for task in tasks):
                raise ValueError
            return cls(tasks=tasks, **values)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is no file of results; megalodon evaluate tasks --out FILE writes one") from None


def identify(model: LanguageModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """What tells a model from another one, as plain values."""
    return {
        "architecture": model.config.architecture,
        "parameters": model.config.num_parameters,
        "fingerprint": model.fingerprint(),
        "tokenizer": tokenizer.fingerprint,
    }


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are there."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
