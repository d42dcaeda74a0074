import pytest
import torch

from megalodon_lm import State

from .test_cut_invariant import CHUNK, FLOAT32, MODEL, build

LENGTHS = [7, 1, CHUNK, 30]


def tokens(length, seed=0):
    return torch.randint(0, 30, (1, length), generator=torch.Generator().manual_seed(seed))


def test_packed_equals_separate():
    documents = [tokens(n, seed) for seed, n in enumerate(LENGTHS)]
    starts = torch.cat([torch.arange(n)[None] == 0 for n in LENGTHS], 1)
    packed, state = MODEL(torch.cat(documents, 1), document_starts=starts)
    separate = [MODEL(d) for d in documents]
    torch.testing.assert_close(packed, torch.cat([logits for logits, _ in separate], 1), atol=1e-10, rtol=0)
    last = separate[-1][1].tensors()
    for name, t in state.tensors().items():
        torch.testing.assert_close(t, last[name], atol=1e-10, rtol=1e-10, msg=name)


def padded(rows, side, filler=0):
    """Rows (1, n) of unequal n as one batch, and its mask."""
    width = max(row.shape[1] for row in rows) + 3
    batch, mask = torch.full((len(rows), width), filler), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = row.shape[1]
        places = {
            "left": torch.arange(width - n, width),
            "right": torch.arange(n),
            "middle": torch.cat([torch.arange(n // 2), torch.arange(width - n + n // 2, width)]),
            "scattered": torch.randperm(width, generator=torch.Generator().manual_seed(i))[:n].sort().values,
        }[side]
        batch[i, places], mask[i, places] = row[0], True
    return batch, mask


@pytest.mark.parametrize("side", ["left", "right", "middle", "scattered"])
def test_padded_equals_unpadded(side):
    rows = [tokens(n, seed) for seed, n in enumerate(LENGTHS)]
    batch, mask = padded(rows, side)
    logits, state = MODEL(batch, mask=mask)
    more = tokens(2, 9).expand(len(rows), -1)
    continued, _ = MODEL(more, state)
    for i, row in enumerate(rows):
        alone, own = MODEL(row)
        torch.testing.assert_close(logits[i][mask[i]], alone[0], atol=1e-10, rtol=0)
        torch.testing.assert_close(continued[i], MODEL(more[:1], own)[0][0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
@pytest.mark.parametrize(("model", "tolerance"), [(MODEL, 1e-9), (FLOAT32, 2e-4)], ids=["float64", "float32"])
def test_ragged_batch_continued_with_ragged_pieces_equals_single_runs(model, tolerance, side):
    lengths = [[7, 0, CHUNK, 30], [0, 17, 5, 1], [CHUNK, 2 * CHUNK, 0, 3], [1, 0, 1, 0]]
    state, seen = None, [[] for _ in range(4)]
    with torch.no_grad():
        for turn, pieces in enumerate(lengths):
            rows = [tokens(n, 10 * turn + i) for i, n in enumerate(pieces)]
            batch, mask = padded(rows, side)
            logits, state = model(batch, state, mask=mask)
            for i, row in enumerate(rows):
                seen[i].append(row)
                whole, own = model(torch.cat(seen[i], 1))
                n = row.shape[1]
                torch.testing.assert_close(logits[i][mask[i]], whole[0, whole.shape[1] - n :], atol=tolerance, rtol=0)
                for name, t in state.select([i]).tensors().items():
                    torch.testing.assert_close(t, own.tensors()[name], atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("model", [MODEL, FLOAT32], ids=["float64", "float32"])
def test_what_stands_in_the_padding_makes_no_difference(model):
    rows = [tokens(n, seed) for seed, n in enumerate(LENGTHS)]
    with torch.no_grad():
        (a, mask), (b, _) = padded(rows, "scattered"), padded(rows, "scattered", 29)
        (first, left), (second, right) = model(a, mask=mask), model(b, mask=mask)
    assert not torch.equal(a, b)
    assert torch.equal(first[mask], second[mask])
    right = right.tensors()
    assert all(torch.equal(t, right[name]) for name, t in left.tensors().items())


def test_packed_and_padded_equals_separate():
    """Two documents a row, with padding between and around them; a row may end in the padding."""
    pairs = [(tokens(5), tokens(CHUNK + 2, 1)), (tokens(1, 2), tokens(3, 3)), (tokens(CHUNK, 4), tokens(CHUNK, 5))]
    batch, mask = padded([torch.cat(pair, 1) for pair in pairs], "scattered")
    starts = torch.zeros_like(mask)
    for i, (first, _) in enumerate(pairs):
        places = mask[i].nonzero()[:, 0]
        starts[i, places[[0, first.shape[1]]]] = True
    logits, state = MODEL(batch, document_starts=starts, mask=mask)
    for i, pair in enumerate(pairs):
        alone = [MODEL(document) for document in pair]
        expected = torch.cat([found[0] for found, _ in alone])
        torch.testing.assert_close(logits[i][mask[i]], expected, atol=1e-10, rtol=0)
        for name, t in state.select([i]).tensors().items():
            torch.testing.assert_close(t, alone[1][1].tensors()[name], atol=1e-10, rtol=1e-10, msg=name)


def test_ragged_rows_step_by_step_equal_single_runs():
    rows = [tokens(n, seed) for seed, n in enumerate([3, 11, 12, 25])]
    state = State.cat([MODEL(r)[1] for r in rows])
    steps = tokens(15, 5)[0]
    for t in steps:
        logits, state = MODEL(t.expand(4, 1), state)
    for i, row in enumerate(rows):
        alone, _ = MODEL(torch.cat([row, steps[None]], 1))
        torch.testing.assert_close(logits[i, 0], alone[0, -1], atol=1e-9, rtol=0)


def sources(model, at, batch, **options):
    """Whether each embedding receives a gradient that is not exactly zero from the logits at one place."""
    seen = []
    handle = model.embed.register_forward_hook(lambda m, i, out: seen.append(out) or out.retain_grad())
    logits, _ = model(batch, **options)
    handle.remove()
    logits[at].square().sum().backward()
    model.zero_grad()
    return seen[0].grad.abs().sum(-1) != 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_flows_from_later_to_earlier_tokens(dtype):
    model = build(dtype)
    batch = torch.cat([tokens(40), tokens(40, 1)])
    for t in (0, 5, CHUNK, 39):
        flows = sources(model, (0, t), batch)
        assert not flows[0, t + 1 :].any()
        assert flows[0, : t + 1].all()
        assert not flows[1].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_that_is_not_finite_spoils_the_rest_of_its_document_alone(dtype):
    model = build(dtype)
    with torch.no_grad():
        model.embed.weight[29] = torch.nan
        batch = torch.cat([tokens(40) % 29, tokens(40, 1) % 29])
        batch[0, 20] = 29
        starts = torch.zeros(2, 40, dtype=torch.bool)
        starts[:, [9, 15, 30]] = True
        logits, state = model(batch, document_starts=starts)
    spoilt = ~torch.isfinite(logits)
    assert torch.equal(spoilt.any(-1), spoilt.all(-1))
    assert spoilt.all(-1).nonzero().tolist() == [[0, t] for t in range(20, 30)]
    assert all(torch.isfinite(t).all() for t in state.tensors().values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_shows_in_every_logit(dtype):
    model = build(dtype)
    with torch.no_grad():
        model.layers[0].mega.wz.weight.fill_(torch.nan)
        assert torch.isnan(model(tokens(40))[0]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_flows_across_documents(dtype):
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[0, [9, 20, 21]] = True
    flows = sources(build(dtype), (0, 30), tokens(40), document_starts=starts)
    assert flows[0].tolist() == [21 <= t <= 30 for t in range(40)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_flows_out_of_padding(dtype):
    """The hook sees the rows with their padding moved to the end."""
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0, 30], mask[1] = True, True
    flows = sources(build(dtype), (0, 30), tokens(40).expand(2, -1), mask=mask)
    before = int(mask[0, :30].sum())
    assert flows[0].tolist() == [t <= before for t in range(40)]
    assert not flows[1].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_flows_from_the_state_into_a_new_document(dtype):
    model = build(dtype)
    _, state = model(tokens(20))
    entry = state.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
    starts = torch.zeros(1, 10, dtype=torch.bool)
    starts[0, 4] = True
    logits, _ = model(tokens(10, 1), entry, document_starts=starts)
    inputs = [t for t in entry.tensors().values() if t.requires_grad]
    before = torch.autograd.grad(logits[:, :4].square().sum(), inputs, retain_graph=True)
    after = torch.autograd.grad(logits[:, 4:].square().sum(), inputs, allow_unused=True)
    assert all(g.any() for g in before)
    assert not any(g is not None and g.any() for g in after)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_flows_from_earlier_documents_or_other_rows_into_the_exit_state(dtype):
    model, seen = build(dtype), []
    handle = model.embed.register_forward_hook(lambda m, i, out: seen.append(out))
    starts = torch.zeros(2, 20, dtype=torch.bool)
    starts[:, 8] = True
    _, state = model(torch.cat([tokens(20), tokens(20, 1)]), document_starts=starts)
    handle.remove()
    parts = [t.select(0, 0).square().sum() for t in state.tensors().values() if t.requires_grad]
    flows = torch.autograd.grad(sum(parts), seen)[0].abs().sum(-1) != 0
    assert flows.tolist() == [[t >= 8 for t in range(20)], [False] * 20]
