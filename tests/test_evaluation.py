import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.data.tokenizer import ByteTokenizer
from megalodon_lm.errors import InputError
from megalodon_lm.evaluation import norm_statistics, perplexity, quickstart
from megalodon_lm.evaluation.by_context import WHOLE, Curve, measure
from megalodon_lm.evaluation.by_position import rise_by_position, window_starts
from megalodon_lm.evaluation.compressors import compressors
from megalodon_lm.evaluation.norm_statistics import NormSchedule
from megalodon_lm.evaluation.perplexity import Losses, score

LENGTH = 250


def text(length=LENGTH):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(0))


def expected_losses(model, tokens, context):
    """One forward pass a window, in nats; and the position of each in its window."""
    losses, positions = [], []
    for window in tokens.split(context or len(tokens)):
        logits, _ = model(torch.cat([torch.tensor([256]), window[:-1]])[None])
        losses.append(F.cross_entropy(logits[0], window, reduction="none"))
        positions.append(torch.arange(len(window)))
    return torch.cat(losses).detach().double().numpy(), torch.cat(positions).numpy()


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("context", [None, 1, 100, 64, 1000])
def test_score_equals_one_forward_pass_a_window(tiny, context, block, monkeypatch):
    """Whatever blocks the text comes in, and whatever pieces the windows are read in."""
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 128)
    found = score(tiny, (b.numpy() for b in text().split(block)), 256, context)
    losses, positions = expected_losses(tiny, text(), context)
    assert found.tokens == LENGTH
    assert found.nats == pytest.approx(losses.sum(), rel=1e-5)
    low = 0
    for end, bits in found.by_position().items():
        inside = (positions >= low) & (positions < end)
        assert bits == pytest.approx(losses[inside].mean() / math.log(2), rel=1e-4)
        low = end
    assert low == min(context or LENGTH, LENGTH)


@pytest.mark.parametrize("batch_tokens", [8192, 30, 16, 7])
@pytest.mark.parametrize(
    "schedule", [NormSchedule(2, 1, 2), NormSchedule(4, 2, 3), NormSchedule(3, 2, 1), NormSchedule(4, 4, 3)]
)
def test_windowed_statistics_are_those_of_the_last_chunks_read_alone(schedule, batch_tokens, monkeypatch):
    """The procedure written out, chunk by chunk, in float64; whatever a chunk is to the tokens read at a time."""
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(norm_statistics, "MAX_TOKENS", batch_tokens)
    torch.manual_seed(1)
    model = Megalodon(ModelConfig.named("tiny", chunk_size=16)).double().eval()
    tokens = text(16 * 11 + 5)
    inputs = torch.cat([torch.tensor([256]), tokens[:-1]])
    found = score(model, [tokens.numpy()], 256, schedule=schedule)
    state, nats = None, 0.0
    for number, (chunk, targets) in enumerate(zip(inputs.split(16), tokens.split(16), strict=True), 1):
        logits, state = model(chunk[None], state)
        nats += F.cross_entropy(logits[0], targets, reduction="sum").item()
        if len(chunk) == 16 and number >= schedule.first and (number - schedule.first) % schedule.every == 0:
            _, recent = model(inputs[(number - schedule.length) * 16 : number * 16][None])
            mixed = {**state.tensors(), **{n: t for n, t in recent.tensors().items() if "norm" in n}}
            values = iter(mixed.values())
            state = state.map(lambda _, values=values: next(values))
    assert found.nats == pytest.approx(nats, rel=1e-12)
    assert found.nats != pytest.approx(score(model, [tokens.numpy()], 256).nats, rel=1e-6)


def test_windowed_statistics_of_windows_side_by_side(tiny, monkeypatch):
    """Contexts of more chunks than `first` that fit several at once give what each alone gives."""
    schedule = NormSchedule(2, 2, 1)
    tokens = text(1000)
    together = score(tiny, [tokens.numpy()], 256, 300, schedule=schedule)
    alone = [score(tiny, [part.numpy()], 256, schedule=schedule).nats for part in tokens.split(300)]
    assert together.nats == pytest.approx(sum(alone), rel=1e-6)


def test_windows_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="length = 9 must be at most first = 8"):
        NormSchedule(length=9)
    with pytest.raises(ValueError, match="every = 0 must be at least 1"):
        NormSchedule(every=0)


def test_contexts_are_measured_once_each_and_end_with_the_whole(tiny):
    def read():
        return iter([[text().numpy().astype(np.uint8).tobytes()]])

    curve = measure(tiny, read, ByteTokenizer(), [WHOLE, 5000, 16, 64, 16, 300], "float32")
    assert list(curve.losses) == [16, 64, LENGTH]
    expected = {c: expected_losses(tiny, text(), c)[0].sum() / math.log(2) / LENGTH for c in (16, 64, LENGTH)}
    assert curve.bits_per_byte == pytest.approx(expected, rel=1e-5)
    steps = np.diff(list(expected.values()))
    assert curve.largest_rise == pytest.approx(steps.max(), rel=1e-2)
    assert curve.longest.tokens == LENGTH


def test_uniform_model_needs_the_logarithm_of_the_vocabulary():
    losses = Losses()
    losses.add(0, np.full((10, 100), np.log(256)))
    assert losses.bits_per_byte(1000) == pytest.approx(8)
    assert losses.bits_per_byte(500) == pytest.approx(16)
    assert losses.perplexity == pytest.approx(256)


def test_positions_fall_into_buckets_that_cover_the_window():
    losses = Losses()
    values = np.tile(np.arange(10) * np.log(2), (3, 1))
    losses.add(0, values[:, :3])
    losses.add(3, values[:, 3:])
    assert losses.by_position() == pytest.approx({1: 0, 2: 1, 4: 2.5, 8: 5.5, 10: 8.5})


def test_positions_are_compared_on_the_same_tokens():
    """Pages differ by bits, context is worth hundredths: few windows are enough to find out."""
    random = np.random.default_rng(0)
    length, windows = 20_000, (8, 100, 5000)
    whole = 2 + np.repeat(random.normal(0, 2, length // 100), 100) + random.normal(0, 1, length)

    def worth(position):
        return 0.5 / np.sqrt(position + 1)

    rises = []
    for window in windows:
        places = window_starts(length, window, 10_000)[:, None] + np.arange(window)
        assert places.min() > 0
        assert places.max() == length - 1
        assert places.size == 10_000
        losses = whole[places] + worth(np.arange(window)) + random.normal(0, 0.01, places.shape)
        rises.append(losses - whole[places])
    found = rise_by_position(rises)
    assert list(found) == [2**k for k in range(13)] + [5000]
    low = 0
    for high, rise in found.items():
        assert abs(rise.mean - worth(np.arange(low, high)).mean()) < 4 * rise.error + 0.002
        assert rise.error < 0.06
        low = high


def test_one_window_at_least_and_it_ends_with_the_text():
    assert window_starts(100, 99, 10).tolist() == [1]
    assert window_starts(100, 10, 30).tolist() == [30, 60, 90]


def test_the_report_holds_losses_by_position_of_the_windows_it_names(tiny, monkeypatch):
    """By definition: each window read by itself, each token beside itself in the whole text."""
    monkeypatch.setattr(quickstart, "WINDOWS", (16, 64))
    monkeypatch.setattr(quickstart, "WINDOW_TOKENS", 128)
    raw = bytes(text(300).tolist())
    recipe = SimpleNamespace(training=SimpleNamespace(length=16), model=tiny.config)
    trainer = SimpleNamespace(
        model=tiny, tokenizer=ByteTokenizer(), recipe=recipe, precision="float32", device=torch.device("cpu"),
        tokens=1, seconds=1.0,
    )  # fmt: skip
    found = quickstart.measure(trainer, raw, "It")
    whole, _ = expected_losses(tiny, text(300), None)
    sums, counts = {}, {}
    for window in (16, 64):
        for start in window_starts(300, window, 128):
            losses, _ = expected_losses(tiny, text(300)[start : start + window], None)
            for position, rise in enumerate(losses - whole[start : start + window], 1):
                bucket = 1 << (position - 1).bit_length()
                sums[bucket], counts[bucket] = sums.get(bucket, 0) + rise, counts.get(bucket, 0) + 1
    expected = {b: (whole.mean() + sums[b] / counts[b]) / math.log(2) for b in sums} | {300: whole.mean() / math.log(2)}
    assert found.bits_per_byte_by_position == pytest.approx(expected, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(expected[300], rel=1e-5)
    assert list(found.bits_per_byte_by_context) == [1, 4, 16, 64, 300]


def test_compressors_on_the_validation_text():
    from megalodon_lm.data.books import bundled

    novel = bundled("validation")["dracula"]
    found = compressors(novel[at : at + 100_000] for at in range(0, len(novel), 100_000))
    assert found == pytest.approx({"gzip": 2.952, "xz": 2.420, "bzip2": 2.125}, abs=0.002)


def test_a_model_that_is_not_finite_gives_no_figures(tiny):
    broken = copy.deepcopy(tiny)
    with torch.no_grad():
        broken.output.output.weight[5] = math.nan
    with pytest.raises(InputError, match="loss is not finite"):
        score(broken, [text().numpy()], 256)


def test_figures_are_json_even_where_the_perplexity_is_beyond_all_numbers():
    losses = Losses()
    losses.add(0, np.full((1, 10), 1000.0))
    figures = Curve("cumulative", 10, {10: losses}).figures()
    assert figures["perplexity_by_context"] == {10: None}
    json.dumps(figures, allow_nan=False)
