"""Does a model score the same here as through lm-evaluation-harness's own class for transformers, question by question?

    python benchmarks/harness_paths.py model.gguf --data copies --tasks winogrande piqa --json paths.json

The model is a GGUF file or a folder of transformers, also one that `megalodon convert --to transformers` wrote: then
our side runs the native model, the other one the class of transformers. Both work in float32, one question after the
other here, in padded batches there. Where a choice differs, or a log-likelihood by more than rounding explains, those
questions are asked again in float64, on both sides. With --json a task that is done is kept, and not asked again.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from megalodon_lm.evaluation.harness import HarnessModel
from megalodon_lm.evaluation.task_definitions import Definitions, usual_shots
from megalodon_lm.files import write_atomically

TASKS = ("winogrande", "piqa", "arc_easy", "hellaswag", "mmlu_abstract_algebra", "mmlu_us_foreign_policy")
TOLERANCE = 1e-4  # of a log-likelihood, relative to it
SEED = 1234  # of solved examples


@dataclass
class Paths:
    """See the head of the file."""

    model: tyro.conf.Positional[Path]
    """A GGUF file, or a folder of transformers."""
    data: Path
    """Folder of local copies, as for megalodon evaluate tasks."""
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    """Of multiple choice; mmlu_ ones with five solved examples."""
    questions: int = 200
    """Of each task, the first ones."""
    batch: int = 8
    """Texts side by side on the harness's side."""
    json: Path | None = None
    """File for all figures, with every log-likelihood."""


@dataclass
class Found:
    """What both sides say of one task."""

    questions: int
    requests: int
    here: dict[str, float]
    """Scores by metric."""
    there: dict[str, float]
    absolute: float
    """Largest difference of a log-likelihood, in nats."""
    relative: float
    """The same, as a part of the log-likelihood."""
    other_choices: list[int]
    """Questions with another likeliest choice, of the whole answer or by its length."""
    other_greedy: int
    """Answers that one side alone finds to be the likeliest text."""
    again: dict[str, Any] | None = None
    """The questions that were asked again in float64."""
    seconds: tuple[float, float] = (0.0, 0.0)
    log_likelihoods: list[list[tuple[float, float]]] = field(default_factory=list)
    """By question and answer, here and there."""


def questions(task: str, data: Path, number: int) -> tuple[Any, list[list[Any]]]:
    """A task, and the requests of its first questions, question by question."""
    ((_, made),) = Definitions([task], data).load(task)["tasks"].items()
    if made.get_config("num_fewshot") != 0:
        made.set_config("num_fewshot", usual_shots(task))
    made.set_fewshot_seed(SEED)
    made.build_all_requests(limit=number)
    by_question: dict[int, list[Any]] = {}
    for request in made.instances:
        by_question.setdefault(request.doc_id, []).append(request)
    return made, list(by_question.values())


@lru_cache(maxsize=1)
def sides(model: Path, dtype: torch.dtype, batch: int) -> tuple[HarnessModel, Any]:
    """The model through our class, and through the harness's own."""
    from lm_eval.models.huggingface import HFLM

    import megalodon_lm.hub  # noqa: F401  # so that the other side knows a Megalodon
    from megalodon_lm.hub.transformers_model import find_pretrained, load_transformers

    ours, tokenizer = load_transformers(model, dtype=dtype)
    name, given = find_pretrained(model)
    theirs = HFLM(pretrained=name, gguf_file=given.get("gguf_file"), dtype=dtype, device="cpu", batch_size=batch)
    return HarnessModel(ours, tokenizer, "float32"), theirs


def compare(task: Any, asked: list[list[Any]], here: HarnessModel, there: Any) -> Found:
    """Ask both sides the same questions."""
    flat = [SimpleNamespace(args=request.args) for question in asked for request in question]
    began = time.process_time()
    ours = here.loglikelihood(flat)
    between = time.process_time()
    theirs = there.loglikelihood(flat, disable_tqdm=True)
    seconds = between - began, time.process_time() - between
    pairs = iter(zip(ours, theirs, strict=True))
    by_question = [[next(pairs) for _ in question] for question in asked]
    scores: list[dict[str, list[float]]] = [{}, {}]
    others = []
    for number, (question, answers) in enumerate(zip(asked, by_question, strict=True)):
        verdicts = [task.process_results(question[0].doc, list(side)) for side in zip(*answers, strict=True)]
        for found, verdict in zip(scores, verdicts, strict=True):
            for metric, value in verdict.items():
                found.setdefault(metric, []).append(float(value))
        lengths = [len(request.args[1]) for request in question]
        if any(_choice(answers, 0, by) != _choice(answers, 1, by) for by in ([1] * len(answers), lengths)):
            others.append(number)
    values = [(a, b) for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    here_scores, there_scores = ({metric: sum(v) / len(v) for metric, v in found.items()} for found in scores)
    return Found(
        questions=len(asked),
        requests=len(flat),
        here=here_scores,
        there=there_scores,
        absolute=max(abs(a - b) for a, b in values),
        relative=max(abs(a - b) / max(abs(a), abs(b)) for a, b in values),
        other_choices=others,
        other_greedy=sum(a != b for (_, a), (_, b) in zip(ours, theirs, strict=True)),
        seconds=seconds,
        log_likelihoods=[[(a[0], b[0]) for a, b in answers] for answers in by_question],
    )


def _choice(answers: list[Any], side: int, by: list[int]) -> int:
    """The likeliest answer of a side, its log-likelihood divided by something."""
    return max(range(len(answers)), key=lambda n: answers[n][side][0] / by[n])


def suspects(found: Found) -> list[int]:
    """Questions that both sides answer otherwise, or whose log-likelihoods differ by more than the tolerance."""
    apart = {
        number
        for number, answers in enumerate(found.log_likelihoods)
        if any(abs(a - b) > TOLERANCE * max(abs(a), abs(b)) for a, b in answers)
    }
    return sorted(apart | set(found.other_choices))


def asked_again(task: Any, asked: list[list[Any]], model: Path, batch: int) -> Found:
    """Compare in float32, and where that finds a difference in float64."""
    found = compare(task, asked, *sides(model, torch.float32, batch))
    if numbers := suspects(found):
        again = compare(task, [asked[n] for n in numbers], *sides(model, torch.float64, batch))
        found.again = {"numbers": numbers} | asdict(again)
    return found


def main(choices: Paths) -> None:
    """Compare and show."""
    file, key = choices.json, {"model": choices.model.name, "questions": choices.questions}
    kept = json.loads(file.read_text()) if file is not None and file.exists() else {}
    done: dict[str, Any] = kept.get("tasks", {}) if {name: kept.get(name) for name in key} == key else {}
    for name in [name for name in choices.tasks if name not in done]:
        found = asked_again(*questions(name, choices.data, choices.questions), choices.model, choices.batch)
        done[name] = asdict(found)
        if file is not None:
            write_atomically(file, json.dumps(key | {"torch": torch.__version__, "tasks": done}) + "\n")
    table = Table(
        "task", "questions", "here", "there", "other choices", "other greedy", "absolute", "relative", "in float64",
        title=f"{choices.model.name}, float32, {torch.get_num_threads()} threads",
    )  # fmt: skip
    for name in choices.tasks:
        one = done[name]
        again = one["again"]
        table.add_row(
            name,
            str(one["questions"]),
            *(
                ", ".join(f"{metric} {100 * value:.1f}" for metric, value in one[side].items())
                for side in ("here", "there")
            ),
            str(len(one["other_choices"])),
            str(one["other_greedy"]),
            f"{one['absolute']:.1e}",
            f"{one['relative']:.1e}",
            "" if again is None
            else f"{again['questions']} again: {len(again['other_choices'])} other choices, {again['relative']:.1e}",
        )  # fmt: skip
    Console(width=180).print(table)


if __name__ == "__main__":
    main(tyro.cli(Paths))
