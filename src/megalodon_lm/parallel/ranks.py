"""What a process is among those that train together; alone, it is the first of one."""

import contextlib
import copy
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import InputError, RankLost
from ..model.language_model import LanguageModel
from ..state import State
from .mesh import MeshSizes, build_mesh, rows_of
from .started import started_ranks

T = TypeVar("T")
TIMEOUT = 600.0
"""Seconds after which a rank that does not answer is lost; MEGALODON_RANK_TIMEOUT sets another time."""


class Ranks:
    """One process alone: nothing is shared."""

    rank, ranks = 0, 1
    is_first = True
    """Whether it is the one that writes the files of the run that belong to no rank."""
    holds_all = True
    """Whether it has all weights, and can compute without the others."""
    group: Any = None
    """Of the messages between all of them; None for the default one."""
    place = 0
    """Among those with random numbers of their own; ranks that share layers have the same."""

    def apply(self, model: LanguageModel, compile_blocks: Callable[[LanguageModel], None] | None) -> LanguageModel:
        """Share a model out, in place.

        Args:
            model: the same on every rank.
            compile_blocks: compiles its blocks, if they are to be.

        Returns:
            What to call in its place.
        """
        if compile_blocks is not None:
            compile_blocks(model)
        return model

    def rows(self, count: int) -> range:
        """Which rows of a batch are this rank's.

        Raises:
            InputError: fewer than ranks to share them.
        """
        return range(count)

    def sum_gradients(self, model: LanguageModel) -> None:
        """Add up what the ranks' passes left."""

    def total(self, value: float) -> float:
        """The sum over ranks with different rows."""
        return value

    def agreed(self, values: Sequence[float]) -> list[float]:
        """The values of the first rank."""
        return list(values)

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank."""
        return flag

    def agreeing(self, act: Callable[[], T]) -> T:
        """What this rank makes of something, once all have.

        Raises:
            InputError: on every rank, the first that one of them met, or what one could not read or write.
        """
        return act()

    def each(self, act: Callable[[], T]) -> list[T]:
        """What every rank makes of something, by their numbers; raises as agreeing."""
        return [act()]

    def own_random_numbers(self, seed: int) -> None:
        """Let dropout differ from place to place; the first one changes nothing."""

    def wait(self) -> None:
        """Until all are here."""

    def aside(self) -> "Ranks":
        """The same ranks for another thread, whose messages do not mix with those of this one."""
        return self

    def carried(self, state: State) -> dict[str, Tensor]:
        """What this rank has of a State that is carried, by name: of its rows; DTensors where ranks share layers."""
        return state.used()

    def own_share(self, state: State) -> State:
        """Of the State of this rank's rows and the whole model, what its part of the model has."""
        return state

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around what needs the others: the loss of one of them ends it with a line that says so."""
        yield

    def leave(self, code: int = 0) -> None:
        """When all is done: one of several ends its process here, with this exit code.

        What a mesh or FSDP2 still holds has threads, and to take those apart can abort a process at its end.
        """


class Together(Ranks):
    """One of several processes, which torchrun or a launcher like it started.

    Args:
        sizes: of their mesh.
        device: where each computes.

    Raises:
        InputError: they do not make such a mesh, or cannot reach each other.
    """

    def __init__(self, sizes: MeshSizes, device: torch.device):
        import torch.distributed as dist

        self.dist, self.sizes = dist, sizes
        seconds = float(os.environ.get("MEGALODON_RANK_TIMEOUT", TIMEOUT))
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo"
        if not dist.is_initialized():
            sizes.over(started_ranks())
            wait = timedelta(seconds=seconds)
            store, rank, ranks = next(dist.rendezvous("env://", timeout=wait))
            # torchrun's agent keeps one store over restarts, and in it the addresses of ranks that are gone
            store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=wait)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.is_first = self.rank == 0
        self.device, self._wait = device, timedelta(seconds=seconds)
        self.mesh = build_mesh(sizes, device)
        self.holds_all = self.mesh["shard"].size() == self.mesh["tensor"].size() == 1
        self.place = self.rank // self.mesh["tensor"].size()

    def apply(self, model: LanguageModel, compile_blocks: Callable[[LanguageModel], None] | None) -> LanguageModel:
        from .apply import parallelize
        from .chunk import ChunkParallel

        parallelize(model, self.mesh, compile_blocks)
        self.model: Any = model
        chunk = self.mesh["chunk"]
        if chunk.size() == 1:
            return model
        return ChunkParallel(model, chunk.get_group(), self.sizes.exchange)

    def rows(self, count: int) -> range:
        self.sizes.check_rows(self.ranks, count)
        return rows_of(self.mesh, count)

    def sum_gradients(self, model: LanguageModel) -> None:
        from .apply import sum_gradients

        sum_gradients(model, self.mesh)

    def total(self, value: float) -> float:
        sums = torch.tensor([value], dtype=torch.float64)
        for name in ("replicate", "shard"):
            if self.mesh[name].size() > 1:
                self.dist.all_reduce(sums, group=self.mesh[name].get_group())
        return sums.item()

    def agreed(self, values: Sequence[float]) -> list[float]:
        told = torch.tensor(values, dtype=torch.float64)
        self.dist.broadcast(told, 0)
        return told.tolist()

    def any(self, flag: bool) -> bool:
        found = torch.tensor([float(flag)])
        self.dist.all_reduce(found, op=self.dist.ReduceOp.MAX)
        return bool(found.item())

    def agreeing(self, act: Callable[[], T]) -> T:
        made: T | None = None
        error = ""
        try:
            made = act()
        except (OSError, InputError) as raised:
            error = str(getattr(raised, "strerror", None) or raised)
        for said in self._told(error):
            if said:
                raise InputError(said)
        return made  # type: ignore[return-value]

    def each(self, act: Callable[[], T]) -> list[T]:
        return self._told(self.agreeing(act))

    def _told(self, value: T) -> list[T]:
        told: list[Any] = [None] * self.ranks
        self.dist.all_gather_object(told, value, group=self.group)
        return told

    def own_random_numbers(self, seed: int) -> None:
        if self.place:
            torch.manual_seed(seed + (self.place << 32))

    def wait(self) -> None:
        self.dist.barrier()

    def aside(self) -> Ranks:
        other = copy.copy(self)
        other.group = self.dist.new_group(backend="gloo", timeout=self._wait)
        return other

    def carried(self, state: State) -> dict[str, Tensor]:
        if self.mesh["tensor"].size() == 1:
            return state.used()
        from .tensor_state import distributed_state

        return distributed_state(state, self.model, self.mesh["tensor"])

    def own_share(self, state: State) -> State:
        if self.mesh["tensor"].size() == 1:
            return state
        from .tensor_state import share_state

        return share_state(state, self.model, self.mesh["tensor"])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, TimeoutError) as error:
            if isinstance(error, InputError) or not _is_of_the_others(error):
                raise
            said = " ".join(str(error).split())[:200]
            raise RankLost(
                f"rank {self.rank} of {self.ranks}: another rank was lost or did not answer in time ({said}); "
                "--resume last goes on from the last checkpoint, with as many ranks as there are then"
            ) from None

    def leave(self, code: int = 0) -> None:
        self.dist.barrier()
        self.dist.destroy_process_group()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _is_of_the_others(error: BaseException) -> bool:
    """Whether an error is what gloo or NCCL say when a rank is gone."""
    words = ("gloo", "nccl", "connection", "peer", "timed out", "timeout", "store", "socket", "broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error).lower() for word in words)


def join(sizes: MeshSizes, device: torch.device) -> Ranks:
    """This process among those that were started with it."""
    return Together(sizes, device) if started_ranks() > 1 else Ranks()


def whole(t: Tensor) -> Tensor:
    """All of a tensor of which each rank may hold a part; every rank must ask."""
    gather: Callable[[], Tensor] | None = getattr(t, "full_tensor", None)
    return t if gather is None else gather()


def held_as(t: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, what is held here as another one is."""
    if not hasattr(like, "full_tensor"):
        return t
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(t.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # all have it
