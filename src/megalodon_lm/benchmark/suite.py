"""Which comparisons are made, and making them one by one."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from ..architectures import ARCHITECTURES
from ..config import ModelConfig
from ..pairs import alternate, rate_ratio, rounds_within
from ..plots import short
from .measures import STEPS, Measure
from .peers import NAMES, library_name, missing
from .records import Record
from .worker import ContenderFailed, Prepared, Worker

_Request = tuple[Measure, int, int]
PeerName = Literal[
    "llama",
    "transformers_llama",
    "mamba",
    "mamba2",
    "rwkv4",
    "rwkv7",
    "gated_deltanet",
    "mega",
    "gecko",
    "jax",
    "floor",
    "itself",
    "portable",
]
LENGTHS = (1024, 4096, 16_384, 32_768, 131_072)
QUICK_LENGTHS = (1024, 4096)
LONG_ROUND = 20.0  # seconds; from there on the warm-up counts as the first round
STEP_TOKENS = 4096  # of a training step, at least
QUICK_STEP_TOKENS = 1024
SLOW: tuple[PeerName, ...] = ("mamba", "mamba2", "rwkv4", "rwkv7", "gated_deltanet", "mega", "jax")
QUICK_LONGEST = 1024  # input of slow peers
QUICK_PEERS: tuple[PeerName, ...] = ("llama", "mamba2", "rwkv7", "floor", "itself", "portable")
LINEAR: tuple[PeerName, ...] = ("mamba", "mamba2", "rwkv7", "gated_deltanet", "mega", "gecko")
"""In time by the length; but for decoding, all bear what a Llama does."""

LLAMAS: tuple[PeerName, ...] = ("llama", "transformers_llama")

LONGEST: dict[tuple[Measure, PeerName], int] = {
    **{("training", peer): 32_768 for peer in LINEAR},
    **{("prefill", peer): 32_768 for peer in LINEAR},
    **{("decode", peer): 16_384 for peer in LINEAR},
    **{("training", peer): 32_768 for peer in LLAMAS},
    ("training", "rwkv4"): 4096,
    ("training", "jax"): 4096,
    ("training", "floor"): 32_768,
    ("prefill", "jax"): 4096,
    ("decode", "jax"): 4096,
    **{("prefill", peer): 32_768 for peer in LLAMAS},
    ("prefill", "rwkv4"): 16_384,
    ("prefill", "floor"): 16_384,
    **{("decode", peer): 131_072 for peer in LLAMAS},
    ("decode", "rwkv4"): 16_384,
    ("decode", "floor"): 16_384,
    ("cema", "portable"): 4096,
    ("cema", "floor"): 4096,
}
"""Longest input of each comparison: what a CPU bears."""

REFERENCE: dict[Measure, int] = {"training": 8192, "prefill": 8192, "decode": 1024}
"""Length with which Megalodon at the longest length is compared."""


@dataclass(frozen=True)
class Case:
    """One comparison: a measure at a length, against a peer, which for "itself" has a batch and length of its own."""

    measure: Measure
    length: int
    batch: int
    peer: PeerName
    peer_length: int
    peer_batch: int

    @property
    def peer_name(self) -> str:
        """As it stands in the record."""
        if self.peer == "itself":
            return f"megalodon at {short(self.peer_length)}"
        if self.peer == "floor":
            return {"decode": "weight-bandwidth floor", "cema": "copy-bandwidth floor"}.get(
                self.measure, "matrix-product floor"
            )
        return {"jax": "megalodon-jax"}.get(self.peer, self.peer)

    def __str__(self) -> str:
        return f"{self.measure} at {short(self.length)} against {self.peer_name}"


def plan(
    measures: Sequence[Measure], peers: Sequence[PeerName], lengths: Sequence[int], quick: bool = False
) -> list[Case]:
    """The comparisons that these choices allow, the short ones first.

    Args:
        measures, peers: which.
        lengths: tokens; each comparison takes those that are bearable for it, and CEMA the longest of those alone.
        quick: shorter training steps, and short inputs alone for slow peers.
    """
    cases = []
    for measure in measures:
        for peer in peers:
            if peer == "itself":
                cases += _against_itself(measure, max(lengths))
                continue
            longest = LONGEST.get((measure, peer), 0)
            if quick and peer in SLOW:
                longest = min(longest, QUICK_LONGEST)
            usable = [n for n in sorted(lengths) if n <= longest]
            for length in usable[-1:] if measure == "cema" else usable:
                step = QUICK_STEP_TOKENS if quick else STEP_TOKENS
                batch = max(1, step // length) if measure == "training" else 1
                cases.append(Case(measure, length, batch, peer, length, batch))
    return sorted(cases, key=lambda case: max(case.length, case.peer_length))


def _against_itself(measure: Measure, longest: int) -> list[Case]:
    """The longest length against the reference length, in training over batches of the same number of tokens.

    Decoding goes on after 100K tokens.
    """
    reference = REFERENCE.get(measure, longest)
    if longest <= reference:
        return []
    length = min(longest, 102_400) if measure == "decode" else longest
    return [Case(measure, length, 1, "itself", reference, longest // reference if measure == "training" else 1)]


def left_out(peers: Sequence[PeerName], jax_python: str | None) -> dict[PeerName, str]:
    """Peers that cannot take part, each with what it takes to have it."""
    reasons: dict[PeerName, str] = {}
    for peer in peers:
        if peer == "jax" and not jax_python:
            reasons[peer] = (
                "needs an interpreter of its own: python -m venv v && v/bin/pip install megalodon-jax==0.2.2, "
                "then --jax-python v/bin/python"
            )
        elif (name := library_name(peer)) in NAMES and peer not in ARCHITECTURES and (lacking := missing(name)):
            reasons[peer] = f"needs {' and '.join(lacking)}: pip install 'megalodon-lm[bench]'"
    return reasons


class Suite:
    """Makes comparisons; each contender works in a process of its own.

    Args:
        config: of our model; peers are of its size.
        precision: of matrix products.
        jax_python: interpreter that has megalodon-jax.
        budget: seconds for the rounds of one comparison.
        fewest: rounds of a comparison however long one takes.
        most: rounds of a comparison however short one is.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: Literal["bf16", "float32"],
        jax_python: str | None = None,
        budget: float = 10.0,
        fewest: int = 3,
        most: int = 31,
    ):
        self.config, self.precision, self.jax_python = config, precision, jax_python
        self.budget, self.fewest, self.most = budget, fewest, most
        self._workers: dict[str, Worker] = {}
        self._kept: dict[str, tuple[_Request, Prepared]] = {}

    def run(self, cases: Sequence[Case], skipped: Callable[[Case, str], None]) -> Iterator[Record]:
        """Make the comparisons.

        Args:
            cases: see plan.
            skipped: called with each comparison that could not be made, and the reason.

        Yields:
            A record each.
        """
        try:
            for case in cases:
                try:
                    yield self._compare(case)
                except ContenderFailed as error:
                    skipped(case, str(error))
        finally:
            self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        self._kept.clear()

    def _compare(self, case: Case) -> Record:
        second = "megalodon again" if case.peer == "itself" else case.peer
        with (
            self._ready(second, case.measure, case.peer_batch, case.peer_length) as (peer_worker, peer),
            self._ready("megalodon", case.measure, case.batch, case.length) as (our_worker, ours),
            self._ready("floor", case.measure, case.batch, case.length) as (floor_worker, floor),
        ):
            workers, told = [our_worker, peer_worker], [ours, peer]
            if case.peer != "floor":
                workers, told = [*workers, floor_worker], [*told, floor]
            one_round = sum(prepared.seconds for prepared in told)
            rounds = rounds_within(self.budget, one_round, self.fewest, self.most)
            counted = int(one_round > LONG_ROUND and rounds > 1 and ours.fresh)
            later = alternate([worker.run for worker in workers], rounds - counted)
            seconds = [[p.seconds] * counted + times for p, times in zip(told, later, strict=True)]
        work = _tokens(case.measure, case.batch, case.length)
        peer_work = _tokens(case.measure, case.peer_batch, case.peer_length)
        ratio = rate_ratio(seconds[0], seconds[1], work, peer_work)
        return Record(
            measure=case.measure,
            length=case.length,
            batch=case.batch,
            ours=work / median(seconds[0]),
            peer=peer_work / median(seconds[1]),
            peer_name=case.peer_name,
            ratio_median=ratio.median,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
            floor_fraction=rate_ratio(seconds[0], seconds[-1]).median,
            rounds=rounds,
            ours_memory=ours.memory,
            peer_memory=None if case.peer == "floor" else peer.memory,
            note=f"{ours.note} | {peer.note}" + ("" if case.peer == "floor" else f" | {floor.note}"),
        )

    @contextmanager
    def _ready(self, name: str, measure: Measure, batch: int, length: int) -> Iterator[Any]:
        """A warmed up contender and what it told.

        Megalodon and the floor stay ready for the next comparison, which often needs the same of them; the others let
        go of their memory.
        """
        worker = self._worker(name)
        request = (measure, batch, length)
        try:
            if self._kept.get(name, (None,))[0] != request:
                self._kept[name] = (request, worker.prepare(*request))
            prepared = self._kept[name][1]
            self._kept[name] = (request, replace(prepared, fresh=False))
            yield worker, prepared
            if name not in ("megalodon", "floor"):
                del self._kept[name]
                worker.release()
        except ContenderFailed:
            self._kept.pop(name, None)
            if worker.process.poll() is not None:
                worker.close()
                self._workers.pop(name, None)
            raise

    def _worker(self, name: str) -> Worker:
        if name not in self._workers:
            config = json.dumps(self.config.to_dict())
            if name == "jax":
                assert self.jax_python is not None
                script = str(Path(__file__).with_name("jax_peer.py"))
                command = [self.jax_python, script, config, self.precision]
            else:
                role = name.split()[0]
                command = [sys.executable, "-m", "megalodon_lm.benchmark.worker", role, config, self.precision]
            self._workers[name] = Worker("megalodon-jax" if name == "jax" else name, command)
        return self._workers[name]


def _tokens(measure: Measure, batch: int, length: int) -> int:
    return STEPS if measure == "decode" else batch * length


MEASURES: tuple[Measure, ...] = get_args(Measure)
PEERS: tuple[PeerName, ...] = get_args(PeerName)
USUAL_PEERS = tuple(peer for peer in PEERS if peer not in ("gecko", "transformers_llama"))
