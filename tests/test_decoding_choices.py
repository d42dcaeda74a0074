"""Steps of one token for every choice of the architecture: the compiled ones against the model in one piece."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm import ModelConfig, State
from megalodon_lm.generation.decodable import fits
from megalodon_lm.generation.engine import DecodingEngine

from .decoding import assert_same_state, in_float64, model_of, read, steps, tokens_of, with_rounded_weights
from .test_choices import ALONE, COMBINATIONS

CHUNK = 16
ALL = {"heads_without_rope": 1, "cema": "real", "attention_norm": "layer", "normalize_attention": False}
ENTRIES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 4 * CHUNK - 7)


def config_of(name="tiny", **changes):
    return ModelConfig.named(name, **{"chunk_size": CHUNK, "num_heads": 2, "z_dim": 64, **changes})


GECKO = config_of("gecko_tiny")


def entered(model, tokens, lengths):
    """The state of rows that have read the first tokens of theirs, some more and some less, and the next ones."""
    rows = [read(model, t[None, :n])[1] for t, n in zip(tokens, lengths, strict=True)]
    room = tokens.shape[1] - max(lengths)
    return State.cat(rows), torch.stack([t[n : n + room] for t, n in zip(tokens, lengths, strict=True)])


def after(logits, lengths, count):
    return torch.stack([row[n : n + count] for row, n in zip(logits, lengths, strict=True)])


@pytest.mark.parametrize(
    "config",
    [*(config_of(**changes) for changes in ALONE), GECKO, config_of("gecko_tiny", **ALL),
     config_of(memory="adaptive", chunk_size=144)],
    ids=lambda c: ", ".join(f"{k}={v}" for k, v in c.to_dict().items() if v != getattr(config_of(), k)) or "none",
)  # fmt: skip
def test_rows_at_and_around_the_ends_of_chunks_are_what_the_judge_says(config):
    """Logits and states, of rows that enter everywhere, and go on over the ends of two chunks."""
    model = model_of(config)
    judge, lengths = in_float64(model), [n * config.chunk_size // CHUNK for n in ENTRIES]
    count = 2 * config.chunk_size + 5
    tokens = tokens_of(len(lengths), max(lengths) + count)
    state, more = entered(model, tokens, lengths)
    engine = DecodingEngine(model, state, "float32")
    assert engine.fused == (config.mixer == "cema")
    found = steps(engine, more)
    expected, _ = read(judge, tokens)
    torch.testing.assert_close(found.double(), after(expected, lengths, count), atol=1e-4, rtol=1e-4)
    whole = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None] + count
    assert_same_state(engine.state(), read(judge, tokens, mask=whole)[1], 1e-4)


@settings(max_examples=15, deadline=None)
@given(COMBINATIONS, st.lists(st.integers(0, 50), min_size=2, max_size=2), st.integers(1, 40), st.integers(0, 40))
def test_random_combinations(changes, lengths, first, second):
    """A state may leave after any step, and goes on in another engine with the same bits."""
    model = model_of(config_of(cema_ndim=3, **changes))
    tokens = tokens_of(2, max(lengths) + first + second)
    state, more = entered(model, tokens, lengths)
    whole, cut = (DecodingEngine(model, state, "float32") for _ in range(2))
    assert whole.fused == (changes["mixer"] == "cema")
    found = steps(whole, more)
    expected, leaving = read(model, more, state=state)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    assert_same_state(whole.state(), leaving, 2e-4)
    parts = steps(cut, more[:, :first])
    resumed = DecodingEngine(model, cut.state(), "float32")
    if second:
        parts = torch.cat([parts, steps(resumed, more[:, first:])], 1)
    assert torch.equal(parts, found)
    assert_same_state(resumed.state(), whole.state(), 0)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_row_is_the_same_whatever_its_neighbours_and_threads(precision):
    model = model_of(config_of("gecko_tiny", **ALL))
    state, more = entered(model, tokens_of(len(ENTRIES), 7 * CHUNK), ENTRIES)
    engine = DecodingEngine(model, state, precision)
    together = steps(engine, more)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for row in range(len(ENTRIES)):
            alone = DecodingEngine(model, state.select([row]), precision)
            assert torch.equal(steps(alone, more[row : row + 1]), together[row : row + 1])
            assert_same_state(alone.state(), engine.state().select([row]), 0)
    finally:
        torch.set_num_threads(threads)


def test_bf16_differs_by_the_rounding_of_weights_and_cache_alone():
    model = model_of(GECKO)
    rounded = with_rounded_weights(model)
    tokens = tokens_of(2, 6 * CHUNK)
    state = read(rounded, tokens[:, :1])[1]
    state.model = None  # of unknown make, so that the other model takes it
    expected, _ = read(rounded, tokens)
    found = steps(DecodingEngine(model, state, "bf16"), tokens[:, 1:])
    error = (found - expected[:, 1:]).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 4e-3


def test_positions_of_many_millions():
    """Rotations are those of the model, though in float32 the angle itself would be wrong by half a turn."""
    model = model_of(GECKO)
    _, state = read(model, tokens_of(1, 3 * CHUNK + 5))
    far = 300_000_000 // CHUNK * CHUNK
    moved = state.clone()
    for name, t in moved.tensors().items():
        if name.endswith("position"):
            t += far
        elif name.endswith("chunks"):
            t += far // CHUNK
    more = tokens_of(1, CHUNK + 9, 1)
    engine = DecodingEngine(model, moved, "float32")
    expected, leaving = read(model, more, state=moved)
    torch.testing.assert_close(steps(engine, more), expected, atol=2e-4, rtol=2e-4)
    assert_same_state(engine.state(), leaving, 2e-4)
    assert int(engine.state().position) == far + 4 * CHUNK + 14


def test_what_is_not_finite_stays_in_its_row():
    model = model_of(GECKO)
    tokens = tokens_of(3, 5 * CHUNK - 3)
    for name, part in read(model, tokens)[1].tensors().items():
        if not part.is_floating_point() or name.startswith("norm") or "log_sum" in name:
            continue
        state = read(model, tokens)[1]
        state.tensors()[name][1].view(-1)[0] = torch.nan
        logits = steps(DecodingEngine(model, state, "bf16"), tokens_of(3, 3 * CHUNK, 1))
        assert torch.isnan(logits[1]).any(), name
        assert torch.isfinite(logits[::2]).all(), name


def test_models_whose_blocks_differ_are_for_the_model():
    one = (
        {"attention": "sliding"},
        {"memory": "adaptive"},
        {"residual": "plain"},
        {"cema": "none"},
        {"mixer": "convolution"},
    )
    for changes in one:
        model = model_of(config_of())
        assert fits(model)
        model.layers[1] = model_of(config_of(**changes)).layers[1]
        assert not fits(model)
    model = model_of(GECKO)
    for block in model.layers:
        block.mega.memory.lag = 1
    assert not fits(model)
