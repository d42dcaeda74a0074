import pytest
import torch

from .test_cut_invariant import CHUNK, MODEL, build

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


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padded_equals_unpadded(side):
    rows = [tokens(n, seed) for seed, n in enumerate(LENGTHS)]
    width = max(LENGTHS) + 3
    batch, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = row.shape[1]
        places = {
            "left": torch.arange(width - n, width),
            "right": torch.arange(n),
            "scattered": torch.randperm(width, generator=torch.Generator().manual_seed(i))[:n].sort().values,
        }[side]
        batch[i, places], mask[i, places] = row[0], True
    logits, state = MODEL(batch, mask=mask)
    more = tokens(2, 9).expand(len(rows), -1)
    continued, _ = MODEL(more, state)
    for i, row in enumerate(rows):
        alone, own = MODEL(row)
        torch.testing.assert_close(logits[i][mask[i]], alone[0], atol=1e-10, rtol=0)
        torch.testing.assert_close(continued[i], MODEL(more[:1], own)[0][0], atol=1e-10, rtol=0)


def test_ragged_rows_step_by_step_equal_single_runs():
    rows = [tokens(n, seed) for seed, n in enumerate([3, 11, 12, 25])]
    state = type(MODEL(rows[0])[1]).cat([MODEL(r)[1] for r in rows])
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
