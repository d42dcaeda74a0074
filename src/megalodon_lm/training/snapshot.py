"""What a checkpoint holds of a run beside its weights and its counts: moments, random numbers, the carried State.

Every rank gives what it holds. Of what differs from rank to rank the names tell whose it is: of random numbers the
place among ranks that draw their own, of a carried State the first row; those of the first rank have neither.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..model.language_model import LanguageModel
from ..model.stored_tensors import shape_of
from ..parallel.ranks import Ranks, held_as
from ..state import State
from .averaging import WeightAverage
from .checkpoint import Checkpoint, prefixed, under


def capture(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    state: State | None,
    ranks: Ranks,
    batch_size: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights to use the model with, and all tensors that training needs beside them, copied to the CPU.

    Args:
        model, optimizer, average: as this rank has them; DTensors where it holds a part.
        state: that is carried, of this rank's rows.
        ranks: that train together.
        batch_size: rows of all of them.
    """
    weights: dict[str, Tensor] = dict(model.named_parameters())
    names = {parameter: name for name, parameter in weights.items()}
    training: dict[str, Tensor] = {_of("random", ranks.place): torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        training[_of("random_cuda", ranks.place)] = torch.cuda.get_rng_state(device)
    for parameter, moments in optimizer.state.items():
        training |= prefixed(f"optimizer.{names[parameter]}", moments)
    if average is not None:
        training |= prefixed("weights", weights)
    if state is not None:
        training |= prefixed(_of("state", ranks.rows(batch_size).start), ranks.carried(state))
    used = weights if average is None else average.weights
    return {name: _copied(t) for name, t in used.items()}, {name: _copied(t) for name, t in training.items()}


def reinstate(
    checkpoint: Checkpoint,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    ranks: Ranks,
    batch_size: int,
) -> State | None:
    """Put back what was captured, by whatever ranks; random numbers too, where there was a rank of this one's place.

    Args:
        checkpoint: of the run.
        model, optimizer, average: as this rank has them.
        ranks: that go on.
        batch_size: rows of all of them.

    Returns:
        The State that was carried, if one was, of this rank's rows.

    Raises:
        InputError: the weights are not those of this model.
    """
    parameters = dict(model.named_parameters())
    names = parameters.keys() | checkpoint.weights.keys()
    if any(name not in parameters or shape_of(checkpoint.weights, name) != parameters[name].shape for name in names):
        raise InputError(f"the checkpoint of step {checkpoint.step} has other weights than the model of the recipe")
    training, device = checkpoint.training, next(model.parameters()).device
    trained = under("weights", training) or checkpoint.weights
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_held(trained, name, parameter))
            if average is not None:
                average.weights[name] = _held(checkpoint.weights, name, parameter)
            moments = under(f"optimizer.{name}", training)
            if moments:
                optimizer.state[parameter] = {
                    key: _held(moments, key, parameter)
                    if shape_of(moments, key) == parameter.shape
                    else moments[key].to("cpu" if key == "step" and device.type == "cpu" else device)
                    for key in moments
                }
    if (own := _of("random", ranks.place)) in training:
        torch.set_rng_state(training[own])
    if device.type == "cuda" and (own := _of("random_cuda", ranks.place)) in training:
        torch.cuda.set_rng_state(training[own], device)
    carried = _carried(training, ranks.rows(batch_size), model)
    return None if carried is None else ranks.own_share(carried.to(device))


def _of(kind: str, place: int) -> str:
    return f"{kind}-{place}" if place else kind


def _held(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Of a tensor, what is held here as a parameter of its shape is."""
    read = getattr(tensors, "held_as", None)
    return held_as(tensors[name].to(like.device), like) if read is None else read(name, like)


def _carried(training: Mapping[str, Tensor], rows: range, model: LanguageModel) -> State | None:
    """Of the State that was carried, these rows, of the whole model: from whatever shares of rows they lie in."""
    found = []
    for name in training:
        if share := re.fullmatch(r"(state(?:-(\d+))?)\.position", name):
            first = int(share[2] or 0)
            (count,) = shape_of(training, name) or ()
            own = range(max(first, rows.start), min(first + count, rows.stop))
            if own:
                found.append((own.start, share[1], [row - first for row in own]))
    spec = model.declare_state()
    states = [State.from_tensors(dict(under(p, training)), model, spec).select(own) for _, p, own in sorted(found)]
    return State.cat(states) if states else None


def _copied(t: Tensor) -> Tensor:
    return t.detach().to("cpu", copy=True).contiguous()
