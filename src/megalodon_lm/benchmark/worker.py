"""A contender in a process of its own: its memory can be told apart, and one of another library can take part.

The parent writes one line of JSON and reads one; see `serve` for the requests. `jax_peer.py` speaks the same.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SHORT = 2.0
"""Seconds. Work that takes less is done twice in each turn, and the second time counts: the other contenders have just
had the processor and its caches. Longer work is measured from its beginning."""


class ContenderFailed(Exception):
    """A contender could not start or did not survive; the message says which and why, in one line."""


@dataclass(frozen=True)
class Prepared:
    """What a contender tells once it is ready: its settings, the seconds of the warm-up, and the memory it took."""

    note: str
    seconds: float
    memory: int | None
    fresh: bool = True
    """Whether the warm-up was just now, not for an earlier comparison."""


class Worker:
    """The parent's end.

    Args:
        name: for messages.
        command: of the process.

    Raises:
        ContenderFailed: it does not start.
    """

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError as error:
            raise ContenderFailed(f"{name} cannot start: {command[0]}: {error.strerror}") from None
        try:
            self._answer()  # that it is there
        except ContenderFailed:
            self.close()
            raise

    def prepare(self, measure: str, batch: int, length: int) -> Prepared:
        """Make ready and run once.

        Raises:
            ContenderFailed: it ran out of memory, or refused.
        """
        reply = self._ask({"measure": measure, "batch": batch, "length": length})
        return Prepared(reply["note"], reply["seconds"], reply["memory"])

    def run(self) -> float:
        """Run once more: seconds."""
        return self._ask({"run": True})["seconds"]

    def release(self) -> None:
        """Let go of what `prepare` made."""
        self._ask({"release": True})

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise ContenderFailed(self._end()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ContenderFailed(self._end())
        reply = json.loads(line)
        if "error" in reply:
            raise ContenderFailed(f"{self.name}: {reply['error']}")
        return reply

    def _end(self) -> str:
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}; out of memory?" if code < 0 else f"ended with code {code}"
        return f"{self.name} {how}"


def serve(name: str, model: dict[str, Any], precision: Any) -> None:
    """The child's end: answer requests until the input ends.

    `{"measure", "batch", "length"}` makes ready, warms up and answers `{"note", "seconds", "memory"}`; `{"run"}` runs
    once and answers `{"seconds"}`; `{"release"}` frees and answers `{}`. What fails answers `{"error"}`.
    """
    answers = os.fdopen(os.dup(1), "w")  # libraries that print do not disturb the answers
    os.dup2(2, 1)

    def answer(reply: dict[str, Any]) -> None:
        answers.write(json.dumps(reply) + "\n")
        answers.flush()

    from ..config import ModelConfig
    from ..training.memory import forget_peak, keep_freed_memory, resident
    from .workloads import contender

    keep_freed_memory()  # as a training run does; the others gain by it too
    competitor = contender(name, ModelConfig.from_dict(model), precision)
    timer, seconds = None, 0.0
    answer({})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "run" in request:
                assert timer is not None
                if seconds < SHORT:
                    timer()
                seconds = timer()
                answer({"seconds": seconds})
                continue
            timer, seconds = None, 0.0
            if "release" in request:
                answer({})
                continue
            note = competitor.settle(**request)
            forget_peak()
            before = resident()
            timer = competitor.timer(**request)
            forget_peak()
            seconds = timer()
            after = resident(peak=True)
            memory = None if before is None or after is None else max(0, after - before)
            answer({"note": note, "seconds": seconds, "memory": memory})
        except (RuntimeError, ValueError, MemoryError) as error:
            answer({"error": str(error).splitlines()[0] if str(error) else type(error).__name__})


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
