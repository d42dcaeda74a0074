"""Ranks that share a sequence: everything as in one process, by either exchange."""

import pytest
import torch
import torch.distributed as dist

from megalodon_lm.evaluation.perplexity import score
from megalodon_lm.generation.context import Context
from megalodon_lm.parallel.chunk import ChunkParallel

from .ranks import run_ranks
from .test_cut_invariant import CHUNK, build

GECKO = {
    "timestep_norm": "decay", "attention": "sliding", "memory": "adaptive", "cema": "complex",
}  # fmt: skip
LENGTH = 8 * CHUNK
EXCHANGES = ("chain", "parallel")
KINDS = ("plain", "packed", "padded", "carried", "packed, padded, carried", "short")


def batch_of(kind):
    """Tokens, targets, learnt, starts, mask, and whether a State is carried."""
    g = torch.Generator().manual_seed(1)
    length = 7 if kind == "short" else LENGTH + 5 if "padded" in kind else LENGTH
    tokens = torch.randint(0, 30, (3, length + 1), generator=g)
    starts = torch.rand(3, length, generator=g) < 0.03 if "packed" in kind else None
    mask = torch.rand(3, length, generator=g) < 0.8 if "padded" in kind else None
    learnt = torch.rand(3, length, generator=g) < 0.7
    return tokens[:, :-1], tokens[:, 1:], learnt, starts, mask, "carried" in kind or kind == "short"


def entry_of(model, carried):
    """A State after some tokens, in mid-chunk, with gradients."""
    if not carried:
        return None
    with torch.no_grad():
        _, state = model(torch.arange(3 * 17).view(3, 17) % 30)
    return state.map(lambda t: t.requires_grad_() if t.is_floating_point() else t)


def everything(model, reader, kind):
    """Loss, exit state, and gradients of parameters and entry state, of a loss that hangs on the exit state too."""
    tokens, targets, learnt, starts, mask, carried = batch_of(kind)
    entry = entry_of(model, carried)
    model.zero_grad()
    loss, state = reader(tokens, entry, targets=targets, learnt=learnt, document_starts=starts, mask=mask)
    leaves = {n: t for n, t in state.tensors().items() if t.requires_grad and ".norm." not in n}
    weight = 1.0 if reader is model or dist.get_rank() == 0 else 0.0
    leaning = sum((t[:, : 3 * CHUNK // 4] * torch.linspace(-1, 1, t.shape[-1])).sum() for t in leaves.values())
    (loss + weight * 0.01 * leaning).backward()
    found = {f"gradient {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    if entry is not None:
        of_entry = {n: t.grad for n, t in entry.tensors().items() if t.is_floating_point()}
        found |= {f"entry {n}": torch.zeros(()) if g is None else g for n, g in of_entry.items()}
    if reader is not model:
        for t in found.values():
            dist.all_reduce(t)
    return {"loss": loss.detach(), **found, **{f"exit {n}": t.detach() for n, t in state.tensors().items()}}


def worst(found, expected):
    """The name and size of the largest relative difference."""
    differences = {}
    for name, t in expected.items():
        scale = t.double().abs().max().clamp(min=1e-3)
        other = found.get(name, torch.zeros_like(t))
        differences[name] = ((other.double() - t.double()).abs().max() / scale).item()
    name = max(differences, key=differences.get)
    return name, differences[name]


MODELS = {
    "megalodon": lambda dtype: build(dtype, num_layers=2),
    "gecko": lambda dtype: build(dtype, num_layers=2, **GECKO),
}


def compare(rank, dtype, models, kinds, exchanges, recompute=False):
    """The largest difference of each case."""
    found = {}
    for name in models:
        model = MODELS[name](dtype)
        for exchange in exchanges:
            reader = ChunkParallel(MODELS[name](dtype), dist.group.WORLD, exchange)
            reader.model.activation_checkpointing = recompute
            for kind in kinds:
                own = everything(reader.model, reader, kind)
                found[name, exchange, kind] = worst(own, everything(model, model, kind))
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_everything_is_as_in_one_process(ranks):
    """Loss, exit state, and all gradients, also of the State before and through the one after, in float64."""
    for found in run_ranks(compare, ranks, torch.float64, list(MODELS), KINDS, EXCHANGES):
        for case, (name, difference) in found.items():
            assert difference < 1e-10, (case, name, difference)


def other_cases(rank):
    """Other types of numbers, recomputed activations, bytes, and reading without gradients."""
    return {
        "float32": compare(rank, torch.float32, ["megalodon"], KINDS[-2:-1], EXCHANGES),
        "bf16": compare(rank, torch.bfloat16, ["megalodon"], KINDS[-2:-1], EXCHANGES),
        "recomputed": compare(rank, torch.float64, list(MODELS), KINDS[-2:-1], EXCHANGES, recompute=True),
        "bytes": {exchange: bytes_sent(exchange) for exchange in EXCHANGES},
        "reading": reading(),
        "state alone": state_alone(),
    }


def bytes_sent(exchange):
    """By this rank, forward and back, of sequences of whole chunks of two lengths."""
    reader = ChunkParallel(build(torch.float32, num_layers=2), dist.group.WORLD, exchange)
    found = []
    for length in (4 * CHUNK, 16 * CHUNK):
        before = reader.bytes_sent
        loss, _ = reader(torch.zeros(3, length, dtype=torch.int64), targets=torch.ones(3, length, dtype=torch.int64))
        forward = reader.bytes_sent
        loss.backward()
        found.append((forward - before, reader.bytes_sent - forward))
    return found


def reading():
    """A document in pieces, and kept, by all ranks and alone: losses and the State at the end."""
    tokens = torch.randint(0, 30, (700,), generator=torch.Generator().manual_seed(0)).numpy()
    model = build(torch.float32, num_layers=2).eval()
    reader = ChunkParallel(build(torch.float32, num_layers=2).eval(), dist.group.WORLD)
    found = []
    for read_by in (model, reader):
        context = Context(read_by, "float32")
        context.read(tokens)
        losses = score(read_by, [tokens], 0)
        last = read_by(torch.from_numpy(tokens)[None], logits_to_keep=2)[0].detach()
        one, few = torch.zeros(2, 1).long(), torch.zeros(2, 9).long()  # of one token, the first rank has none
        each = read_by(one, targets=one, reduction="none")[0]
        found.append((losses.mean, context.loss(), context.finish()[0], last, read_by(few)[0], read_by(one)[0], each))
    return found


def state_alone():
    """Gradients of the exit State, by whoever reads the sequence."""
    tokens = torch.arange(4 * CHUNK + 5).view(1, -1) % 30
    found = []
    for shared in (False, True):
        model = build(num_layers=2)
        reader = ChunkParallel(model, dist.group.WORLD) if shared else model
        _, state = reader(tokens, logits_to_keep=0)
        weight = 1.0 if not shared or dist.get_rank() == 0 else 0.0
        (weight * sum(t.square().sum() for t in state.tensors().values() if t.requires_grad)).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        if shared:
            for gradient in gradients:
                dist.all_reduce(gradient)
        found.append(gradients)
    return found


@pytest.fixture(scope="module")
def others():
    return run_ranks(other_cases, 2)


@pytest.mark.parametrize(("case", "tolerance"), [("float32", 1e-3), ("bf16", 0.2), ("recomputed", 1e-10)])
def test_other_numbers_and_recomputed_activations(others, case, tolerance):
    """In float32 and bf16, gradients of one process differ as much from those in float64."""
    for found in others:
        for of, (name, difference) in found[case].items():
            assert difference < tolerance, (of, name, difference)


def test_bytes_between_ranks_are_those_of_the_formula_whatever_the_length(others):
    config = build().config
    layer = 16 * config.norm_num_groups + 8 * config.model_dim * config.cema_ndim  # float64 statistics, float32 states
    count, final = 8, 16 * config.norm_num_groups
    for exchange in EXCHANGES:
        first, last = (found["bytes"][exchange] for found in others)
        assert first[0] == first[1]
        assert last[0] == last[1]
        assert first[0][0] == 3 * (2 * (layer + count) + final + count)
        gradients = 3 * (2 * layer + final)  # counts have none
        assert last[0][1] == gradients
        assert first[0][1] == (0 if exchange == "chain" else gradients)


def test_gradients_of_the_state_alone_come_back_along_the_sequence(others):
    for found in others:
        for alone, together in zip(*found["state alone"], strict=True):
            torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_reading_without_gradients(others):
    for found in others:
        for alone, together in zip(*found["reading"], strict=True):
            torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)
