"""The portable path on a GPU; skipped where there is none."""

import pytest
import torch

from megalodon_lm import ByteTokenizer, Generator, Megalodon, ModelConfig, Sampling, State
from megalodon_lm.ops.backend import describe
from megalodon_lm.training.precision import autocast
from megalodon_lm.training.trainer import Trainer

from .runs import metrics, recipe, same_weights
from .test_cut_invariant import run
from .test_resume import Stopped, stop_after

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def models():
    """One model in float64 on the CPU and in float32 on the GPU."""
    torch.manual_seed(0)
    config = ModelConfig.named("tiny", num_heads=2)
    weights = Megalodon(config).state_dict()
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        model = Megalodon(config)
        model.load_state_dict(weights)
        found.append(model.to(device, dtype))
    return found


def case(batch=2, length=300):
    """Tokens, document starts and mask."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 259, (batch, length), generator=g)
    return tokens, torch.rand(tokens.shape, generator=g) < 0.02, torch.rand(tokens.shape, generator=g) < 0.9


def error(found, expected):
    """Largest difference over the largest magnitude."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("precision", "bound"), [("float32", 2e-4), ("bf16", 0.1)])
def test_a_gpu_computes_what_float64_does(models, packed, padded, precision, bound):
    """Logits, states and all gradients, with an entry state."""
    tokens, starts, mask = case()
    results = []
    for model in models:
        device = model.embed.weight.device
        given = {
            "document_starts": starts.to(device) if packed else None,
            "mask": mask.to(device) if padded else None,
        }
        model.zero_grad(set_to_none=True)
        with autocast(precision if device.type == "cuda" else "float32", device):
            _, state = model(tokens[:, :100].to(device))
            logits, state = model(tokens.to(device), state, **given)
        valid = mask.to(device) if padded else torch.ones_like(mask, device=device)
        logits = logits[valid]
        g = torch.Generator().manual_seed(2)
        weights = torch.randn(logits.shape, generator=g, dtype=torch.float64).to(device, logits.dtype)
        (logits * weights).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append({"logits": logits} | state.tensors() | grads)
    expected, found = results
    assert found["logits"].dtype == torch.float32
    wrong = {name: e for name, t in expected.items() if (e := error(found[name], t)) > bound}
    assert not wrong


def test_cut_anywhere_on_a_gpu(models):
    """A sequence may be cut anywhere and the result is the same."""
    model = models[1]
    tokens, starts, mask = (t.to(GPU) for t in case())
    with torch.no_grad():
        whole, _ = run(model, tokens, [], starts, mask)
        cut, _ = run(model, tokens, [0, 1, 63, 64, 65, 200, 299], starts, mask)
    torch.testing.assert_close(cut[mask], whole[mask], atol=1e-4, rtol=0)


def test_a_state_goes_from_gpu_to_cpu_and_back(models, tmp_path):
    """Through a file, and in memory."""
    model = models[1]
    there = Megalodon(model.config)
    there.load_state_dict(model.state_dict())
    tokens, *_ = case()
    with torch.no_grad():
        _, state = model(tokens.to(GPU))
        expected, _ = model(tokens.to(GPU), state)
        state.save(tmp_path / "a.state")
        on_cpu = State.load(tmp_path / "a.state", there)
        logits, left = there(tokens, on_cpu)
        assert error(logits, expected) < 1e-4
        left.save(tmp_path / "b.state")
        back, _ = model(tokens.to(GPU), State.load(tmp_path / "b.state", model))
        straight, _ = there(tokens, left)
    assert error(back, straight) < 1e-4


def test_a_gpu_writes_what_the_cpu_writes(models):
    """Several rows at different places, without a choice left to chance."""
    on_gpu = models[1].eval()
    on_cpu = Megalodon(on_gpu.config).eval()
    on_cpu.load_state_dict(on_gpu.state_dict())
    prompts = ["Once upon a time", "x" * 700, "and"]
    texts = [
        Generator(model, ByteTokenizer(), "float32").write(prompts, Sampling(temperature=0, max_tokens=40))
        for model in (on_cpu, on_gpu)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("change", [{}, {"precision": "bf16"}, {"carry_state": False}, {"average": 0.9}])
def test_a_run_on_a_gpu_goes_on_as_if_it_had_never_stopped(change, tmp_path):
    """Bit for bit."""
    given = recipe(tmp_path, **change)
    assert Trainer(given, tmp_path / "whole", "cuda").train()
    with pytest.raises(Stopped):
        Trainer(given, tmp_path / "parts", "cuda").train(stop_after(7))
    resumed = Trainer(given, tmp_path / "parts", "cuda", resume="last")
    assert resumed.step == 4
    assert resumed.train()
    assert [m["bits_per_token"] for m in metrics(tmp_path / "parts")] == [
        m["bits_per_token"] for m in metrics(tmp_path / "whole")
    ]
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.filterwarnings("ignore")  # what the compiler says of complex numbers and of itself
def test_compiled_training_on_a_gpu_learns_the_same(tmp_path):
    """As eager training, to the accuracy of float32."""
    given = {"model": {"dropout": 0.0}, "steps": 6}
    for name, compiled in (("eager", False), ("compiled", True)):
        assert Trainer(recipe(tmp_path, **given, compile=compiled), tmp_path / name, "cuda").train()
    eager, compiled = ([m["bits_per_token"] for m in metrics(tmp_path / n)] for n in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_memory_stays_the_same_however_much_is_read(models):
    """In pieces of 4,096 tokens."""
    model = models[1].eval()
    tokens = torch.randint(0, 259, (1, 4096), device=GPU)
    most, state = [], None
    with torch.inference_mode():
        for number in range(40):
            if number in (10, 25):
                torch.cuda.reset_peak_memory_stats()
            _, state = model(tokens, state)
            if number in (24, 39):
                most.append(torch.cuda.max_memory_allocated())
    assert most[0] == most[1]


def test_the_implementation_is_named():
    """Nobody is left to guess that these are portable operators."""
    assert describe(GPU).startswith("portable PyTorch on cuda")
