"""What the tests of steps of one token share."""

import torch

from megalodon_lm import Megalodon


def model_of(config, seed=0):
    """A model whose every parameter counts: nothing left at 0."""
    torch.manual_seed(seed)
    model = Megalodon(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def in_float64(model):
    """The same weights, to be the judge."""
    judge = Megalodon(model.config).eval().double()
    judge.load_state_dict(model.state_dict())
    return judge


def with_rounded_weights(model):
    """The same weights, those of products rounded to bf16."""
    rounded = Megalodon(model.config).eval()
    rounded.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, p in rounded.named_parameters():
            if p.dim() == 2 and name.split(".")[-2] not in ("embed", "mega", "cema"):
                p.copy_(p.bfloat16())
    return rounded


def tokens_of(rows, length, seed=0):
    return torch.randint(0, 259, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model, tokens, **others):
    """Logits of all tokens, and the state after them."""
    with torch.no_grad():
        return model(tokens, **others)


def steps(engine, tokens):
    return torch.stack([engine.step(t).clone() for t in tokens.unbind(1)], 1)


def assert_same_state(found, expected, atol):
    for name, t in expected.tensors().items():
        torch.testing.assert_close(
            found.tensors()[name], t, atol=atol, rtol=atol, check_dtype=False, msg=lambda m, n=name: f"{n}: {m}"
        )
