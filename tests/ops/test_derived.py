import copy
import gc
import pickle

import pytest
import torch

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.ops import derived as module
from megalodon_lm.ops.derived import derived, forget, rounded

UNCOUNTED = ("mega.wv.weight", "mega.wr.weight", "mega.wr.bias", "mega.cema.alpha", "mega.gamma", "nffn.norm.weight")
TOKENS = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(0))


def build():
    torch.manual_seed(1)
    return Megalodon(ModelConfig.named("tiny")).eval()


def logits(model):
    """Read in bf16 as inference does."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        return model(TOKENS)[0].clone()


def anew(model):
    """The same by a copy, of which nothing is kept yet."""
    return logits(copy.deepcopy(model))


def in_place(model):
    with torch.no_grad():
        model.layers[0].mega.wv.weight.mul_(1.5)


def in_place_under_inference_mode(model):
    with torch.inference_mode():
        model.layers[0].nffn.fc1.weight.mul_(1.5)


def bias(model):
    with torch.no_grad():
        model.layers[0].mega.wz.bias.add_(0.5)


def coefficient(name):
    def change(model):
        with torch.no_grad():
            getattr(model.layers[0].mega.cema, name).add_(0.5)

    return change


def optimiser(**kind):
    def change(model):
        step = torch.optim.AdamW(model.parameters(), lr=0.1, **kind)
        model.train()(TOKENS)[0].square().sum().backward()
        step.step()
        model.eval()

    return change


def without_train(model):
    step = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(TOKENS)[0].square().sum().backward()
    step.step()


def between_gradient_and_step(model):
    step = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(TOKENS)[0].square().sum().backward()
    logits(model)
    step.step()
    step.zero_grad()


def load_state(assign):
    def change(model):
        torch.manual_seed(2)
        model.load_state_dict(Megalodon(model.config).state_dict(), assign=assign)

    return change


def another_parameter(model):
    model.output.output.weight = torch.nn.Parameter(model.output.output.weight.detach() * 2)


def other_memory(model):
    model.output.output.weight.data = model.output.output.weight.detach() * 2


def uncounted(name):
    """As adapters do that are merged into the weights, and older optimisers."""

    def change(model):
        model.get_parameter(name).data += 0.1

    return change


CHANGES = {
    "in place": in_place,
    "in place under inference mode": in_place_under_inference_mode,
    "bias": bias,
    **{name: coefficient(name) for name in ("alpha", "delta", "theta", "gamma", "omega")},
    "fused optimiser": optimiser(fused=True),
    "foreach optimiser": optimiser(foreach=True),
    "plain optimiser": optimiser(foreach=False),
    "optimiser, model left in evaluation mode": without_train,
    "optimiser, read between gradient and step": between_gradient_and_step,
    "load_state_dict": load_state(False),
    "load_state_dict by assignment": load_state(True),
    "another parameter": another_parameter,
    "other memory": other_memory,
    **{f"uncounted, {name}": uncounted(f"layers.0.{name}") for name in UNCOUNTED},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_inference_sees_every_change_of_a_weight(change):
    model = build()
    before = logits(model)
    assert torch.equal(before, anew(model))
    assert torch.equal(logits(model), before)
    change(model)
    after = logits(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, anew(model))


def test_weights_are_rounded_once():
    weight = torch.nn.Parameter(torch.randn(3, 4))
    with torch.inference_mode():
        once = rounded(weight, torch.bfloat16)
        assert rounded(weight, torch.bfloat16) is once
    with torch.no_grad():
        assert rounded(weight, torch.bfloat16) is once
        assert rounded(weight, torch.float32) is weight
        assert rounded(weight, torch.float16).dtype == torch.float16
        assert torch.equal(once, weight.to(torch.bfloat16))
    assert rounded(weight, torch.bfloat16) is not once
    assert rounded(weight, torch.bfloat16).requires_grad


def test_what_inference_mode_made_has_no_count_of_writes_and_is_not_kept():
    with torch.inference_mode():
        weight = torch.ones(2)
        assert rounded(weight, torch.bfloat16).tolist() == [1, 1]
        weight.add_(1)
        assert rounded(weight, torch.bfloat16).tolist() == [2, 2]


def test_all_weights_count():
    a, b = torch.ones(2), torch.ones(2)
    with torch.no_grad():
        kept = derived(torch.add, a, b)
        assert derived(torch.add, a, b) is kept
        assert derived(torch.add, a, torch.full((2,), 5.0)).tolist() == [6, 6]
        b.add_(1)
        assert derived(torch.add, a, b).tolist() == [3, 3]


def test_what_is_kept_goes_with_the_weights_or_when_training_begins():
    gc.collect()
    before = len(module._kept)
    model = build()
    logits(model)
    weights = list(model.parameters())
    assert len(module._kept) > before
    model(TOKENS)
    assert not any(id(weight) in module._kept for weight in weights)
    logits(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), logits(model))
    forget(model.parameters())
    assert torch.equal(logits(again), logits(model))
    del model, again, weights
    gc.collect()
    assert len(module._kept) == before
