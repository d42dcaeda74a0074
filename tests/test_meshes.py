"""Every mesh of ranks gives the loss, the State and the gradients of one process, in one pass and in segments.

What runs is what a trainer runs of a step: its passes over batches that add up, and the sum over ranks.
"""

from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
import torch

from megalodon_lm import State
from megalodon_lm.config import GECKO, LATER_GECKO
from megalodon_lm.data.batches import Batch
from megalodon_lm.parallel.mesh import MeshSizes
from megalodon_lm.parallel.ranks import Ranks, Together, whole
from megalodon_lm.training.passes import Forward, shared
from megalodon_lm.training.recipe import TrainingRecipe
from megalodon_lm.training.segments import build_pass

from .ranks import run_ranks
from .test_architectures import EVERY
from .test_architectures import made as baseline
from .test_cut_invariant import CHUNK, build

CPU = torch.device("cpu")
ROWS, LENGTH = 4, 4 * CHUNK + 7
MODELS = {
    "megalodon": {"num_heads": 4, "num_layers": 2},
    "gecko": {**GECKO, "num_heads": 4, "num_layers": 2, "vocab_size": 31},  # shares of the vocabulary are uneven
    "later gecko": {**LATER_GECKO, "num_heads": 4, "num_layers": 2},
}
KINDS = ("plain", "packed, padded, carried", "one row learns", "rows end apart", "some rows empty",
         "borders", "short", "a late document")  # fmt: skip


class Case(NamedTuple):
    """What is compared, and on which mesh."""

    mesh: str
    kind: str = "packed, padded, carried"
    exchange: str = "chain"
    segment: int = 0
    model: str = "megalodon"
    numbers: str = "float64"
    recompute: bool = False

    @property
    def sizes(self):
        given = {name: int(size) for name, size in (word.split() for word in self.mesh.split(" x "))}
        return MeshSizes(**{"replicate": 1, **given}, exchange=self.exchange)


def draw(kind, seed):
    """A batch of a kind."""
    g = torch.Generator().manual_seed(seed)
    length = 3 if kind == "short" else LENGTH

    def some(part):
        return torch.rand(ROWS, length, generator=g) < part

    tokens = torch.randint(0, 30, (ROWS, length + 1), generator=g)
    learnt, starts, mask = some(0.7), None, None
    if "packed" in kind:
        starts, mask = some(0.05), some(0.8)
    if kind == "one row learns":
        learnt[1:] = False
    if kind == "rows end apart":  # and nothing is left for the last ranks
        mask = torch.arange(length) < torch.tensor([[5], [length // 2 - 1], [length // 4], [CHUNK]])
    if kind == "some rows empty":  # all those of the first ranks that share rows
        mask = (torch.arange(ROWS) > 1)[:, None] & some(0.9)
    if kind == "borders":
        starts = torch.zeros(ROWS, length, dtype=torch.bool)
        starts[:, ::CHUNK] = True
    if kind == "a late document":
        starts = torch.zeros(ROWS, length, dtype=torch.bool)
        starts[1, -1] = starts[2, CHUNK + 1] = True
    return Batch(tokens[:, :-1], tokens[:, 1:], starts, learnt, None, mask)


def made(case):
    dtype = torch.float64 if case.numbers == "float64" else torch.float32
    choices = MODELS.get(case.model)
    model = baseline.__wrapped__(case.model, dtype) if choices is None else build(dtype, **choices)
    model.activation_checkpointing = case.recompute
    return model


def entry(case, model):
    """The State after some tokens, which is in mid-chunk; as tensors of the whole."""
    if case.kind not in ("packed, padded, carried", "short", "rows end apart"):
        return None
    with torch.no_grad():
        tokens = torch.arange(ROWS * 17).view(ROWS, 17) % 30
        mask = torch.arange(17) < torch.tensor([[17], [5], [12], [17]])
        return model(tokens, mask=None if case.kind == "short" else mask)[1].tensors()


def step(case, ranks):
    """Loss, State and gradients of two batches."""
    model = made(case)
    before = entry(case, model)
    reader = ranks.apply(model, None)
    forward = Forward(reader, "bf16" if case.numbers == "bf16" else "float32", CPU, ranks.ranks > 1)
    passes = shared(build_pass(forward, TrainingRecipe(segment=case.segment)), ranks)
    state = None if before is None else ranks.own_rows(State.from_tensors(before, model, model.declare_state()))
    batches = [draw(case.kind, seed) for seed in (1, 2)]
    learnt, loss = sum(batch.num_learnt for batch in batches), 0.0
    for batch in batches:
        share, state = passes(batch, state, learnt)
        loss += share
    ranks.sum_gradients(model)
    state = ranks.all_rows(state)
    gradients = {n: p.grad if p.grad is None else whole(p.grad) for n, p in model.named_parameters()}
    return {"loss": torch.tensor(loss, dtype=torch.float64), **gradients, **state.tensors()}


def on_ranks(rank, cases):
    found = {}
    for case in cases:
        print(case)
        made = step(case, Together(case.sizes, CPU))
        found[case] = {n: t.detach() for n, t in made.items()} if rank == 0 else made["loss"]
    return found


@cache
def alone(case):
    """The same by one process in one pass, in float64."""
    return step(case, Ranks())


def worst(found, case):
    """The name and size of the largest relative difference."""
    expected = alone(case._replace(mesh="", segment=0, numbers="float64", exchange="chain", recompute=False))
    assert found.keys() == expected.keys()
    differences = {}
    for name, t in expected.items():
        assert found[name].shape == t.shape, name
        scale = t.double().norm().clamp(min=1e-3)
        differences[name] = ((found[name].double() - t.double()).norm() / scale).item()
    name = max(differences, key=differences.get)
    return name, differences[name]


TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "bf16": 0.1}


def check(ranks, cases, timeout=300):
    first, *others = run_ranks(on_ranks, ranks, cases, timeout=timeout)
    wrong = {}
    for case in cases:
        name, difference = worst(first[case], case)
        if not difference < TOLERANCES[case.numbers]:
            wrong[case] = (name, difference)
        assert all(torch.equal(first[case]["loss"], other[case]) for other in others), case
    assert not wrong, "\n".join(map(str, wrong.items()))


TWO = [
    Case("chunk 2", segment=10),
    Case("shard 2", "one row learns", segment=10),
    Case("shard 2", "some rows empty"),
    Case("replicate 2", "some rows empty", segment=10),
    Case("tensor 2", segment=10, recompute=True),
    Case("chunk 2", model="llama"),
    Case("shard 2", "one row learns", model="llama"),
]
FOUR = [
    Case("chunk 2 x tensor 2"),
    Case("chunk 2 x tensor 2", "rows end apart", "parallel", segment=10),
    Case("shard 2 x chunk 2", "rows end apart"),
]


@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO), (4, FOUR)], ids=["2 ranks", "4 ranks"])
def test_a_step_is_that_of_one_process(ranks, cases):
    check(ranks, cases)


MESHES = {
    2: ["replicate 2", "shard 2", "chunk 2", "tensor 2"],
    4: ["replicate 2 x shard 2", "replicate 2 x chunk 2", "replicate 2 x tensor 2", "shard 2 x chunk 2",
        "shard 2 x tensor 2", "chunk 2 x tensor 2", "chunk 4"],
}  # fmt: skip


def every(ranks):
    """All kinds of batches on each mesh, by turns in one pass and in segments, of each model, recomputed or not."""
    kinds = product(MESHES[ranks], ("chain", "parallel"), KINDS)
    cases = [
        Case(mesh, kind, exchange, 10 * (n // 2 % 2), [*MODELS][n % 3], "float64", n % 4 == 0)
        for n, (mesh, exchange, kind) in enumerate(kinds)
        if "chunk" in mesh or exchange == "chain"
    ]
    return cases + [
        Case(mesh, exchange=exchange, segment=segment, model=model, numbers=numbers)
        for mesh, (exchange, segment, model) in product(
            MESHES[ranks], [("chain", 0, "megalodon"), ("parallel", 10, "gecko")]
        )
        for numbers in ("float32", "bf16")
    ]


@pytest.mark.slow
def test_other_architectures_share_sequences_weights_and_rows():
    """Their states go from rank to rank in a chain; of layers, tensor ranks share none."""
    meshes = [("chunk 2", "packed, padded, carried"), ("shard 2", "one row learns"), ("replicate 2", "plain")]
    names = [name for name in EVERY if name not in MODELS]
    check(2, [Case(mesh, kind, segment=10, model=name) for mesh, kind in meshes for name in names], timeout=1500)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", MESHES)
def test_every_step_on_every_mesh_is_that_of_one_process(ranks):
    check(ranks, every(ranks), timeout=1500)
