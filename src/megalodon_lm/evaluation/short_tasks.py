"""Tasks of the harness, asked of a model: what came of each, with the tokens and the time that it took."""

import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lm_eval.evaluator import evaluate

from ..errors import InputError
from ..training.memory import forget_peak, resident
from .harness import Cut, HarnessModel
from .read_once import Work
from .results import Score, TaskResult
from .results_table import published
from .task_definitions import Definitions, usual_shots

SEED = 1234  # the harness's own, which draws solved examples
NO_SHARES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
BOOTSTRAPS = 1000  # of what has no standard error in closed form


def ask(
    lm: HarnessModel,
    definitions: Definitions,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = SEED,
    chat: bool = False,
) -> Iterator[TaskResult]:
    """Carry out tasks one after the other.

    Args:
        lm: the model.
        definitions: the tasks and their data.
        shots: solved examples in each prompt; None for as many as in the paper's table, 0 elsewhere.
        limit: questions of each task, of a group of each of its parts; None for all.
        seed: of the examples that are drawn.
        chat: put each question as a turn of a chat.

    Raises:
        InputError: see Definitions.load; or there are fewer solved examples than shots.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 some of the harness's tasks draw from it
    torch.manual_seed(seed)
    for name in definitions.names:
        loaded = definitions.load(name)
        for task in loaded["tasks"].values():
            _prepare(task, usual_shots(name) if shots is None else shots, seed)
        alone = [(one, {"tasks": {one: task}}) for one, task in loaded["tasks"].items()]
        for part, tasks in [(name, loaded)] if loaded.get("groups") else alone:
            began = time.perf_counter()
            lm.reader.work, lm.cut = Work(), Cut()
            forget_peak()
            found = evaluate(
                lm, tasks, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False, apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )  # fmt: skip
            assert found is not None
            cut = asdict(lm.cut) if lm.cut.requests else None
            notes = {"left out": definitions.left_out.get(name), "cut at the window": cut}
            yield _result(part, found, time.perf_counter() - began, lm.reader.work, notes)


def _prepare(task: Any, shots: int, seed: int) -> None:
    """Set the number of solved examples, unless the task is defined without any, and the seed they are drawn with."""
    if task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", shots)
    if (needed := task.get_config("num_fewshot")) > (there := len(task.sampler.fewshot_docs())):
        raise InputError(f"{task.task_name}: {needed} shots need as many solved examples, and the data has {there}")
    task.set_fewshot_seed(seed)


def _result(name: str, found: Any, seconds: float, work: Work, notes: dict[str, Any]) -> TaskResult:
    """What the harness says of a task, or of a group with its parts."""
    scores = _scores(found["results"][name])
    parts = {
        part: {"samples": values["sample_len"], "scores": _scores(values)}
        for part, values in found["results"].items()
        if part != name
    }
    wanted = next((c["metric"] for c in published()["columns"] if c["task"] == name), None)
    tasks = [part for part in found["n-samples"] if part in found["results"]]
    return TaskResult(
        name, str(found["versions"][name]), int(found["n-shot"][tasks[0]]),
        sum(found["n-samples"][task]["effective"] for task in tasks), scores,
        wanted if wanted in scores else next(iter(scores)), seconds, work.computed, work.anew,
        {key: value for key, value in (notes | {"parts": parts}).items() if value}, resident(peak=True),
    )  # fmt: skip


def _scores(values: dict[str, Any]) -> dict[str, Score]:
    """Of the harness's figures by metric and filter, the first filter of each metric."""
    found: dict[str, Score] = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr") and metric not in found:
            error = values.get(f"{metric}_stderr,{chosen}")
            known = float(error) if isinstance(error, int | float) else None
            found[metric] = Score(float(value), known, share=metric not in NO_SHARES)
    return found
