"""Tensor parallelism: the ranks of one dimension of a mesh share each layer of a model.

A rank has its heads of attention, channels of the moving average, groups of norms over time, hidden features of the
feed-forward networks, and rows of the vocabulary; the residual stream is whole everywhere. Parameters keep their names
and become DTensors; a layer sees its shares as the plain tensors that its ops need, and computes as many heads as they
hold. What travels in a block of a Megalodon, each time a (B, L, D) over all ranks:

                                forward             backward
    norm over time              -                   all-gather
    its output, the average     two all-gathers     two reduce-scatters
    wh1                         all-gather          -
    wh2                         all-reduce          -
    feed-forward network        all-reduce          all-reduce
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from ..errors import InputError
from ..layers.convolutional_attention import ConvolutionalAttention
from ..layers.embedding import Embedding
from ..layers.feed_forward import FeedForward
from ..layers.gated_attention import GatedAttention
from ..layers.norms import NormOverTime
from ..model.decoder import Decoder, Head
from .borders import add_up, gather, join, join_uneven, split, spread, take
from .cut_module import CutRows, Part, shares_shown
from .vocabulary import cut_loss, shares


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Cut a model over the ranks of a mesh of one dimension; every rank must have the same model.

    Loss, logits and gradients are then those of the one process, on every rank; the model's states are this rank's
    share (see tensor_state). Dropout draws alike on all ranks, which need the same random numbers.

    Raises:
        InputError: what cannot be cut so, and by what it can; or an architecture that has no rules here.
    """
    plan = find_plan(model)
    _check(model, mesh.size())
    for module in model.modules():
        if isinstance(module, GatedAttention | ConvolutionalAttention):
            _count_unrotated(module.attention, int(model.config.num_heads), mesh)
    vocabulary = len(model.embed.weight)
    parallelize_module(model, mesh, plan)
    model.tie_weights()
    model.output.loss = partial(cut_loss, mesh=mesh, vocabulary=vocabulary)
    with shares_shown(model):
        model.state_spec = model.declare_state()


def find_plan(model: Decoder) -> dict[str, ParallelStyle]:
    """How each module of a model that has parameters is cut, by its name.

    Raises:
        InputError: an architecture with modules that have no rule.
    """
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        for part, style in RULES.get(type(module), _nothing)(module).items():
            plan[f"{name}.{part}".strip(".")] = style
    for name, module in model.named_modules():
        if name not in plan and any(True for _ in module.parameters(recurse=False)):
            raise InputError(
                f"tensor parallelism has no rule for {type(module).__name__} in {model.summary}: it cuts Megalodon "
                "and Gecko; give the ranks to replicas, shards or chunks"
            )
    return plan


def _nothing(module: nn.Module) -> dict[str, Part]:
    return {}


def _gated_attention(m: Any) -> dict[str, Part]:
    over_time = isinstance(m.timenorm, NormOverTime)
    plan = {
        "": Part({"gamma": 1, "beta": 1}),
        "timenorm": Part({"": 0}, entering=split) if over_time else Part(leaving=spread),
        "rmsnorm": Part(entering=gather if over_time or m.cema is not None else None, shared=True),
        "wv": Part({"": 0}, entering=gather if over_time else None),
        "wz": Part({"": 0}),
        "wr": Part({"": 0}),
        "wh1": Part({"": 0}, leaving=join),
        "wh2": Part({"weight": 1}, leaving=add_up),
    }
    return plan if m.cema is None else {**plan, "cema": Part({"": 0}, entering=None if over_time else take)}


def _convolutional_attention(m: Any) -> dict[str, Part]:
    over_time = isinstance(m.timenorm, NormOverTime)
    return {
        "": Part({"gamma": 1}),
        "timenorm": Part({"": 0}, entering=split, leaving=gather) if over_time else Part(leaving=spread),
        **{name: Part({"": 0}) for name in ("wq", "wk", "wv", "wr")},
        **{f"convolutions.{name}": Part({"": 0}) for name in m.convolutions},
        "wo": Part({"weight": 1}, leaving=add_up),
    }


def _feed_forward(m: Any) -> dict[str, Part]:
    assert m.fc2.bias is None  # every rank would add it
    plan = {"norm": Part(leaving=spread), "fc1": Part({"": 0}), "fc2": Part({"weight": 1}, leaving=add_up)}
    return {
        **plan,
        **({} if m.fc3 is None else {"fc3": Part({"": 0})}),
        **({} if m.alpha is None else {"": Part()}),
    }


def _embedding(m: Any) -> dict[str, Part]:
    return {"": CutRows({"": 0})}


def _head(m: Any) -> dict[str, Part]:
    over_time = isinstance(m.final_norm, NormOverTime)
    return {
        "final_norm": Part({"": 0}, entering=split, leaving=gather) if over_time else Part(leaving=spread),
        "output": Part({"": 0}, leaving=partial(join_uneven, features=len(m.output.weight))),
    }


RULES: dict[type[nn.Module], Callable[[Any], dict[str, Part]]] = {
    GatedAttention: _gated_attention,
    ConvolutionalAttention: _convolutional_attention,
    FeedForward: _feed_forward,
    Embedding: _embedding,
    Head: _head,
}
"""How modules are cut: the parts by their names within the module, itself as ""."""


def _count_unrotated(attention: Any, heads: int, mesh: DeviceMesh) -> None:
    """Leave those of the last heads that are not rotated to the ranks that have them."""
    share = heads // mesh.size()
    behind = share * (mesh.size() - 1 - mesh.get_local_rank())  # heads of the ranks after this one
    attention.heads_without_rope = min(max(attention.heads_without_rope - behind, 0), share)


def _check(model: Decoder, size: int) -> None:
    """Refuse sizes that so many ranks cannot share.

    Raises:
        InputError: with the first of them, and the numbers of ranks that can.
    """
    c = model.config
    counts = {
        "attention heads": c.num_heads,
        "groups of the norm over time": c.norm_num_groups,
        "channels": c.model_dim,
        "hidden features of the feed-forward network": c.ffn_hidden_dim,
    }
    can = [n for n in range(1, c.num_heads + 1) if math.gcd(*counts.values()) % n == 0]
    for what, count in counts.items():
        if count % size:
            raise InputError(
                f"{size} tensor ranks cannot share {count} {what}: this model can be cut over "
                f"{', '.join(map(str, can))}; give the other ranks to replicas, shards or chunks"
            )
    if 0 in (sizes := shares(c.vocab_size, size)):
        raise InputError(
            f"{size} tensor ranks cannot share a vocabulary of {c.vocab_size}: {sizes.count(0)} would have none"
        )
