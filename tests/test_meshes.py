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
from megalodon_lm.parallel.tensor_state import gather_state
from megalodon_lm.training.averaging import WeightAverage
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
    """Loss and gradients of two batches, and the State of this rank's rows."""
    model = made(case)
    before = entry(case, model)
    reader = ranks.apply(model, None)
    forward = Forward(reader, "bf16" if case.numbers == "bf16" else "float32", CPU, ranks.ranks > 1)
    passes = shared(build_pass(forward, TrainingRecipe(segment=case.segment)), ranks)
    rows, state = list(ranks.rows(ROWS)), None
    if before is not None:
        state = ranks.own_share(State.from_tensors(before, model, model.declare_state()).select(rows))
    batches = [draw(case.kind, seed) for seed in (1, 2)]
    learnt, loss = sum(batch.num_learnt for batch in batches), 0.0
    for batch in batches:
        share, state = passes(batch, state, learnt)
        loss += share
    ranks.sum_gradients(model)
    if "tensor" in case.mesh:
        state = gather_state(state, model, ranks.mesh["tensor"])
    gradients = {n: p.grad if p.grad is None else whole(p.grad) for n, p in model.named_parameters()}
    return {
        "loss": torch.tensor(loss, dtype=torch.float64), "rows": torch.tensor(rows), **gradients,
        **{f"state {name}": t for name, t in state.tensors().items()},
    }  # fmt: skip


def on_ranks(rank, cases):
    found = {}
    for case in cases:
        print(case)
        made = step(case, Together(case.sizes, CPU))
        found[case] = {
            n: t.detach() for n, t in made.items() if rank == 0 or n in ("loss", "rows") or n[:6] == "state "
        }
    return found


def reference(case):
    """The same by one process in one pass, in float64."""
    return alone(case._replace(mesh="", segment=0, numbers="float64", exchange="chain", recompute=False))


@cache
def alone(case):
    return step(case, Ranks())


def worst(found, case):
    """The name and size of the largest relative difference."""
    expected, differences = reference(case), {}
    for name, other in found.items():
        t = expected[name]
        if name == "rows" or name[:6] == "state ":
            t = t[found["rows"]]
        assert other.shape == t.shape, name
        scale = t.double().norm().clamp(min=1e-3)
        differences[name] = ((other.double() - t.double()).norm() / scale).item()
    name = max(differences, key=differences.get)
    return name, differences[name]


TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "bf16": 0.1}


def check(ranks, cases, timeout=300):
    found, wrong = run_ranks(on_ranks, ranks, cases, timeout=timeout), {}
    for case in cases:
        assert found[0][case].keys() == reference(case).keys()
        for of_rank in found:
            name, difference = worst(of_rank[case], case)
            if not difference < TOLERANCES[case.numbers]:
                wrong[case] = (name, difference)
            assert torch.equal(found[0][case]["loss"], of_rank[case]["loss"]), case
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


def compared(rank, cases):
    """As worst, in one process: first weights that are powers differ in their last bits from process to process."""
    return {
        case: worst({n: t.detach() for n, t in step(case, Together(case.sizes, CPU)).items()}, case) for case in cases
    }


@pytest.mark.slow
def test_other_architectures_share_sequences_weights_and_rows():
    """Their states go from rank to rank in a chain; of layers, tensor ranks share none."""
    meshes = [("chunk 2", "packed, padded, carried"), ("shard 2", "one row learns"), ("replicate 2", "plain")]
    names = [name for name in EVERY if name not in MODELS]
    cases = [Case(mesh, kind, model=name) for mesh, kind in meshes for name in names]
    for case, (name, difference) in run_ranks(compared, 2, cases, timeout=1500)[0].items():
        assert difference < 1e-10, (case, name)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", MESHES)
def test_every_step_on_every_mesh_is_that_of_one_process(ranks):
    check(ranks, every(ranks), timeout=1500)


def read_between_steps(rank, meshes):
    return {mesh: losses_and_readings(Together(Case(mesh).sizes, CPU)) for mesh in meshes}


def losses_and_readings(ranks):
    """Of some steps, and of averaged weights after each, rounded: what is kept of them must go."""
    model = made(Case("", numbers="float32"))
    reader = ranks.apply(model, None)
    passes = shared(build_pass(Forward(reader, "float32", CPU, ranks.ranks > 1), TrainingRecipe()), ranks)
    optimizer, average = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True), WeightAverage(model, 0.5)
    losses, readings, batch = [], [], draw("plain", 1)
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(passes(batch, None, batch.num_learnt).loss)
        ranks.sum_gradients(model)
        optimizer.step()
        average.update(model)
        with average.applied(model), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            readings.append(reader(batch.inputs, targets=batch.targets)[0].item())
    return losses, readings


def check_readings(ranks, meshes):
    expected = losses_and_readings(Ranks())
    assert expected[1][0] - expected[1][-1] > 0.3  # it learns, so that old weights would tell
    for losses, readings in run_ranks(read_between_steps, ranks, meshes)[0].values():
        assert losses == pytest.approx(expected[0], rel=1e-5)
        assert readings == pytest.approx(expected[1], rel=1e-3)


def test_readings_between_steps_are_those_of_one_process():
    check_readings(2, MESHES[2])


@pytest.mark.slow
def test_readings_between_steps_on_meshes_of_two_dimensions_are_those_of_one_process():
    check_readings(4, ["shard 2 x chunk 2", "shard 2 x tensor 2", "replicate 2 x shard 2"])
