"""Steps of one token: the compiled one against the model in one piece, over chunk boundaries, and back to a State."""

import os
import subprocess
import sys

import pytest
import torch

from megalodon_lm import Megalodon, ModelConfig, State
from megalodon_lm.generation.decoding_weights import prepare
from megalodon_lm.generation.engine import DecodingEngine
from megalodon_lm.generation.fused_step import FusedStep
from megalodon_lm.ops import backend
from megalodon_lm.ops.cpu import decoding_kernels, simd
from megalodon_lm.ops.derived import rounded

from .decoding import assert_same_state, in_float64, model_of, read, steps, tokens_of, with_rounded_weights

CONFIGS = {
    "swiglu": ModelConfig.named("tiny", norm_num_groups=4),
    "heads, plain feed-forward": ModelConfig.named("tiny", swiglu=False, num_heads=2, cema_ndim=16, share_emb=True),
    "rescaled": ModelConfig.named("tiny", rescale_nffn=True, scale_emb=True, cema_ndim=20, norm_num_groups=64),
    "long chunks": ModelConfig.named("tiny", chunk_size=512, vocab_size=261),
}


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_give_what_one_piece_gives(name, rows):
    model = model_of(CONFIGS[name])
    prompt, more = tokens_of(rows, 200), tokens_of(rows, 150, 1)
    _, state = read(model, prompt)
    engine = DecodingEngine(model, state, "float32")
    assert engine.fused
    before = state.clone()
    with torch.no_grad():
        expected, leaving = model(more, state)
    torch.testing.assert_close(steps(engine, more), expected, atol=2e-4, rtol=2e-4)
    assert_same_state(engine.state(), leaving, 2e-4)
    assert_same_state(state, before, 0)


def test_the_definition_in_float64_is_the_judge():
    model = model_of(CONFIGS["rescaled"])
    tokens = tokens_of(2, 300)
    expected, _ = read(in_float64(model), tokens)
    _, state = read(model, tokens[:, :40])
    found = steps(DecodingEngine(model, state, "float32"), tokens[:, 40:])
    torch.testing.assert_close(found.double(), expected[:, 40:], atol=1e-4, rtol=1e-4)


def test_small_offsets_stored_in_bf16_have_their_effect():
    """Norms and attention scale by 1 + the parameter: 1 + 0.003 in bf16 would be 1."""
    model = model_of(CONFIGS["swiglu"]).bfloat16()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if (p.dim() == 1 and "weight" in name) or name.endswith("mega.gamma"):
                p.fill_(0.003)
    tokens = tokens_of(1, 40)
    expected, _ = read(in_float64(model), tokens)
    found = steps(DecodingEngine(model, model.empty_state(), "float32"), tokens)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_bf16_differs_by_the_rounding_of_weights_and_cache_alone():
    """Against a float32 model that has the rounded weights, so that only the cache's rounding is left."""
    model = model_of(CONFIGS["swiglu"])
    rounded = with_rounded_weights(model)
    tokens = tokens_of(2, 130)
    state = read(rounded, tokens[:, :1])[1]
    state.model = None  # of unknown make, so that the other model takes it
    with torch.no_grad():
        expected, _ = rounded(tokens)
    found = steps(DecodingEngine(model, state, "bf16"), tokens[:, 1:])
    error = (found - expected[:, 1:]).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 4e-3
    exact = steps(DecodingEngine(model, state, "float32"), tokens[:, 1:])
    assert (exact - expected[:, 1:]).abs().max() > 1e-4  # the weights were rounded indeed


def test_rows_at_different_positions():
    model = model_of(CONFIGS["long chunks"])
    lengths = (1, 63, 300, 700)
    prompts = [tokens_of(1, n, n) for n in lengths]
    more = tokens_of(4, 230, 9)
    states = [read(model, p)[1] for p in prompts]
    together = DecodingEngine(model, type(states[0]).cat(states), "float32")
    found = steps(together, more)
    for row, state in enumerate(states):
        alone = steps(DecodingEngine(model, state, "float32"), more[row : row + 1])
        assert torch.equal(found[row : row + 1], alone)


def test_steps_are_bitwise_the_same_on_every_number_of_threads():
    model = model_of(CONFIGS["long chunks"])
    _, state = read(model, tokens_of(3, 500))
    more = tokens_of(3, 40, 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = steps(DecodingEngine(model, state, "bf16"), more)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(steps(DecodingEngine(model, state, "bf16"), more), one)


def test_a_state_goes_out_and_comes_back():
    model = model_of(CONFIGS["swiglu"])
    more = tokens_of(2, 60, 1)
    engine = DecodingEngine(model, read(model, tokens_of(2, 90))[1], "float32")
    whole = steps(engine, more)
    again = DecodingEngine(model, read(model, tokens_of(2, 90))[1], "float32")
    first = steps(again, more[:, :23])
    resumed = DecodingEngine(model, again.state(), "float32")
    again.step(more[:, 0])  # must not touch what was handed out
    assert torch.equal(torch.cat([first, steps(resumed, more[:, 23:])], 1), whole)


def test_what_is_not_finite_shows_and_stays_in_its_row():
    """0x7fffffff is the NaN of NVIDIA's processors: a carry out of its fraction would make it a number."""
    worst = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    model, more = model_of(CONFIGS["long chunks"]), tokens_of(3, 2, 1)
    state = read(model, tokens_of(3, 300))[1].clone()
    entered = [
        part for layer in state.parts["layers"] for part in (layer["norm"].mean, layer["cema"], *layer["attention"][:2])
    ]
    for part in entered:
        part[1].view(-1)[0] = worst.to(part.dtype)
        logits = steps(DecodingEngine(model, state, "bf16"), more)
        part[1].view(-1)[0] = 0
        assert torch.isnan(logits[1]).all()
        assert torch.isfinite(logits[::2]).all()
    with torch.no_grad():
        model.layers[0].mega.wz.weight.fill_(worst)
    assert torch.isnan(steps(DecodingEngine(model, state, "float32"), more)).all()


@pytest.mark.parametrize("fused", [True, False])
def test_a_state_may_lie_in_any_order_in_memory(fused):
    model = model_of(ModelConfig.named("tiny", model_dim=64 if fused else 72))
    state = read(model, tokens_of(2, 20))[1]
    turned = state.map(lambda t: t.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1))
    assert not turned.parts["layers"][0]["norm"].mean.is_contiguous()
    before, more = turned.clone(), tokens_of(2, 30, 1)
    engine = DecodingEngine(model, turned, "float32")
    assert engine.fused == fused
    with torch.no_grad():
        expected, leaving = model(more, state)
        piece, after = model(more, turned)
    torch.testing.assert_close(piece, expected)
    assert_same_state(after, leaving, 1e-6)
    torch.testing.assert_close(steps(engine, more), expected, atol=2e-4, rtol=2e-4)
    assert_same_state(engine.state(), leaving, 2e-4)
    assert_same_state(turned, before, 0)


@pytest.mark.parametrize("changes", [{"model_dim": 72}, {"ffn_hidden_dim": 120}, {"z_dim": 24}, {"dropout": 0.1}])
def test_what_the_compiled_step_cannot_do_the_model_does(changes):
    config = ModelConfig.named("tiny", **changes)
    torch.manual_seed(0)
    model = Megalodon(config).train("dropout" in changes)
    _, state = read(model, tokens_of(1, 20))
    engine = DecodingEngine(model, state, "float32")
    assert not engine.fused
    assert engine.step(tokens_of(1, 1)[:, 0]).shape == (1, 259)


@simd.compiled
def _impossible(*args):
    args.no_such_thing()


def test_steps_whose_kernels_cannot_be_compiled_are_taken_by_the_model(monkeypatch, caplog):
    monkeypatch.setattr(decoding_kernels, "head", _impossible)  # the last one of a step
    monkeypatch.setattr(backend, "_failures", {})
    model = model_of(CONFIGS["swiglu"])
    prompt, more = tokens_of(2, 20), tokens_of(2, 5, 1)
    _, state = read(model, prompt)
    engine = DecodingEngine(model, state, "float32")
    found = steps(engine, more)
    with torch.no_grad():
        expected, leaving = model(more, state)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    assert_same_state(engine.state(), leaving, 2e-4)
    assert not engine.fused
    (record,) = caplog.records
    assert "_impossible" in record.message


def test_the_portable_choice_is_obeyed():
    model = model_of(CONFIGS["swiglu"])
    _, state = read(model, tokens_of(1, 20))
    more = tokens_of(1, 70, 1)
    native = steps(DecodingEngine(model, state, "float32"), more)
    backend.set_backend("portable")
    try:
        engine = DecodingEngine(model, state, "float32")
        assert not engine.fused
        torch.testing.assert_close(steps(engine, more), native, atol=2e-4, rtol=2e-4)
    finally:
        backend.set_backend("auto")


@pytest.mark.parametrize("fused", [True, False])
def test_bad_tokens_and_states_are_refused(fused):
    model = model_of(ModelConfig.named("tiny", model_dim=64 if fused else 72))
    _, state = read(model, tokens_of(2, 20))
    engine = DecodingEngine(model, state, "float32")
    assert engine.fused == fused
    with pytest.raises(ValueError, match="token 259 is outside the vocabulary of 259"):
        engine.step(torch.tensor([0, 259]))
    with pytest.raises(ValueError, match="token -1 is outside"):
        engine.step(torch.tensor([-1, 0]))
    with pytest.raises(ValueError, match="2 rows"):
        engine.step(torch.tensor([0]))
    with pytest.raises(ValueError, match="another model"):
        DecodingEngine(model_of(ModelConfig.named("tiny", chunk_size=32)), state)


def test_memory_does_not_grow_with_steps():
    code = """
import resource, torch
from megalodon_lm import Megalodon, ModelConfig, State
from megalodon_lm.generation.engine import DecodingEngine
from megalodon_lm.generation.fused_step import FusedStep
model = Megalodon(ModelConfig.named("tiny")).eval()
engine = DecodingEngine(model, model.empty_state())
def steps(n):
    for _ in range(n):
        engine.step(torch.zeros(1, dtype=torch.int64))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = steps(1000)
print(steps(8_000) - before)
"""
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KiB only on Linux")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert int(out.stdout) < 2048  # KiB


def test_weights_are_prepared_once_for_reading_and_all_steps_until_one_changes():
    """One copy of all that is as large as a matrix, or that takes more than a conversion to make."""
    model = model_of(CONFIGS["swiglu"])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(1, 5, dtype=torch.int64))
    first, second = (prepare(model, torch.bfloat16).layers[0] for _ in range(2))
    with torch.inference_mode():
        read = rounded(model.layers[0].mega.wv.weight, torch.bfloat16)
    assert first.wv.weight.ctypes.data == second.wv.weight.ctypes.data == read.data_ptr()
    for one, other in zip((*first.cema, *first.heads, *first.timenorm), (*second.cema, *second.heads, *second.timenorm),
                          strict=True):  # fmt: skip
        assert one.ctypes.data == other.ctypes.data
    with torch.no_grad():
        model.layers[0].mega.wv.weight.add_(1)
        model.layers[0].mega.cema.gamma.add_(1)
    third = prepare(model, torch.bfloat16).layers[0]
    assert (third.wv.weight != first.wv.weight).any()
    assert (third.cema.g != first.cema.g).any()
    assert third.wz.weight.ctypes.data == first.wz.weight.ctypes.data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_enters_leaves_its_neighbours_bitwise_alone(dtype):
    model = model_of(CONFIGS["long chunks"])
    states = [read(model, tokens_of(1, n, n))[1] for n in (10, 300, 64, 500)]
    more = tokens_of(4, 40, 1)
    alone = [FusedStep(model, state, dtype) for state in states]
    expected = [steps(one, more[row : row + 1]) for row, one in enumerate(alone)]
    running = FusedStep(model, State.cat(states[:3]), dtype)
    before = steps(running, more[:3, :20])
    running.rows.enter(states[3], 1)
    after = steps(running, torch.cat([more[:1, 20:], more[3:, :20], more[2:3, 20:]]))
    for row in range(3):
        assert torch.equal(before[row : row + 1], expected[row][:, :20])
    assert torch.equal(after[:1], expected[0][:, 20:])
    assert torch.equal(after[1:2], expected[3][:, :20])
    assert torch.equal(after[2:], expected[2][:, 20:])


@pytest.mark.parametrize("part", ["mega.wv", "mega.rmsnorm", "nffn", ""])
def test_a_part_of_another_kind_is_computed_by_the_model(part):
    """A subclass may do anything else, such as add an adapter: here it is taken at its word."""
    model = model_of(CONFIGS["swiglu"])
    _, state = read(model, tokens_of(2, 20))
    more = tokens_of(2, 10, 1)
    native = DecodingEngine(model, state, "float32")
    assert native.fused
    changed = model.layers[1].get_submodule(part)
    kind = type(changed)
    changed.__class__ = type("Other", (kind,), {"forward": lambda self, *args: kind.forward(self, *args)})
    engine = DecodingEngine(model, state, "float32")
    assert not engine.fused
    torch.testing.assert_close(steps(engine, more), steps(native, more), atol=2e-4, rtol=2e-4)
