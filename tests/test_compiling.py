"""A model in one graph: torch.compile(fullgraph=True) computes what the model does, forward and backward."""

import pytest
import torch

from megalodon_lm.config import GECKO, LATER_GECKO
from megalodon_lm.ops.backend import set_backend

from .test_cut_invariant import CHUNK, build


def run(model, compiled, tokens, state, given):
    """Outputs, and the gradients of the weights and of the entry state."""
    entry = [t for t in state.tensors().values() if t.is_floating_point()] if state is not None else []
    for t in entry:
        t.requires_grad_()
    made, leaving = compiled(tokens, state, **given)
    outputs = {"made": made, **leaving.tensors()}
    loss = sum(t.square().mean() for t in outputs.values() if t.is_floating_point())
    grads = torch.autograd.grad(loss, [*model.parameters(), *entry], allow_unused=True)
    return [*outputs.values(), *grads]


def compare(backend, piece, choices, compiler, tolerance):
    set_backend(backend)
    model = build(torch.float32, num_layers=1, **choices)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 30, (2, 3 * CHUNK - 1), generator=g)
    state, given = None, {}
    if piece != "first":
        state = model(tokens[:, : CHUNK + 5])[1].detach()
    if piece == "packed":
        starts, mask, learnt = (torch.rand(tokens.shape, generator=g) < share for share in (0.1, 0.9, 0.8))
        given = {"document_starts": starts, "mask": mask, "targets": tokens.roll(-1, 1), "learnt": learnt}
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    found, expected = (run(model, m, tokens, state, given) for m in (compiled, model))
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if f is not None:
            torch.testing.assert_close(f, e, atol=tolerance, rtol=tolerance)


REAL = {"cema": "real", "heads_without_rope": 1, "memory": "adaptive", "attention_norm": "layer"}
CASES = [("auto", "packed", {}), ("portable", "packed", {}), ("auto", "packed", GECKO)]
MORE = [
    ("auto", "first", {}), ("portable", "first", {}), ("portable", "carried", {}), ("auto", "first", GECKO),
    ("portable", "packed", GECKO), ("portable", "packed", REAL), ("auto", "packed", LATER_GECKO),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    set_backend("auto")
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("backend", "piece", "choices"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in MORE)]
)
def test_one_graph_computes_what_the_model_does(backend, piece, choices):
    """Of a first piece; of one with an entry state; of one with documents, padding, and targets not all learnt, too."""
    compare(backend, piece, choices, "aot_eager", 1e-5 if choices else 1e-6)  # attention is laid out in another way


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize(("backend", "piece", "choices"), [*CASES, *MORE])
def test_compiled_code_computes_what_the_model_does(backend, piece, choices):
    compare(backend, piece, choices, "inductor", 1e-4)
