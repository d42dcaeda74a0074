"""What a checkpoint holds of a run beside its weights and its counts: moments, random numbers, the carried State."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..model.language_model import LanguageModel
from ..model.stored_tensors import shape_of
from ..parallel.ranks import held_as, whole
from ..state import State
from .averaging import WeightAverage, put
from .checkpoint import Checkpoint, prefixed, under


def capture(
    model: LanguageModel, optimizer: torch.optim.Optimizer, average: WeightAverage | None, state: State | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights to use the model with, and all tensors that training needs beside them, whole, copied to the CPU."""
    held = _held(model, optimizer, average, {} if state is None else state.used())
    weights, training = ({name: _copied(whole(t)) for name, t in part.items()} for part in held)
    return weights, training


def capture_shares(
    model: LanguageModel, optimizer: torch.optim.Optimizer, average: WeightAverage | None, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As capture, of everything what this rank holds.

    Args:
        model, optimizer, average: as there.
        state: the carried State as distributed_state gives it; nothing for none.
    """
    held = _held(model, optimizer, average, state)
    weights, training = ({name: _copied(t) for name, t in part.items()} for part in held)
    return weights, training


def _held(
    model: LanguageModel, optimizer: torch.optim.Optimizer, average: WeightAverage | None, state: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Weights to use the model with, and what training needs beside them, as they are."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    names = {parameter: name for name, parameter in weights.items()}
    training: dict[str, Tensor] = {"random": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        training["random_cuda"] = torch.cuda.get_rng_state(device)
    for parameter, moments in optimizer.state.items():
        training |= prefixed(f"optimizer.{names[parameter]}", moments)
    if average is not None:
        training |= prefixed("weights", weights)
    training |= prefixed("state", state)
    return (weights if average is None else average.weights), training


def reinstate(
    checkpoint: Checkpoint, model: LanguageModel, optimizer: torch.optim.Optimizer, average: WeightAverage | None
) -> State | None:
    """Put back what was captured, random numbers included.

    Returns:
        The State that was carried, if one was: of all rows, and of the whole model.

    Raises:
        InputError: the weights are not those of this model.
    """
    parameters = dict(model.named_parameters())
    names = parameters.keys() | checkpoint.weights.keys()
    if any(name not in parameters or shape_of(checkpoint.weights, name) != parameters[name].shape for name in names):
        raise InputError(f"the checkpoint of step {checkpoint.step} has other weights than the model of the recipe")
    training, device = checkpoint.training, next(model.parameters()).device
    put(model, under("weights", training) or checkpoint.weights)
    if average is not None:
        average.weights = {
            name: held_as(weight.to(device), parameters[name]) for name, weight in checkpoint.weights.items()
        }
    for name, parameter in parameters.items():
        moments = under(f"optimizer.{name}", training)
        if moments:
            optimizer.state[parameter] = {
                key: _moved(value, parameter, key != "step" or device.type != "cpu") for key, value in moments.items()
            }
    torch.set_rng_state(training["random"])
    if device.type == "cuda" and "random_cuda" in training:
        torch.cuda.set_rng_state(training["random_cuda"], device)
    carried = under("state", training)
    return State.from_tensors(carried, model, model.declare_state()).to(device) if carried else None


def _moved(moment: Tensor, parameter: Tensor, moves: bool) -> Tensor:
    """What the optimiser keeps of a parameter, where that is; of as many values, as it is held."""
    moment = moment.to(parameter.device) if moves else moment
    return held_as(moment, parameter) if moment.shape == parameter.shape else moment


def _copied(t: Tensor) -> Tensor:
    return t.detach().to("cpu", copy=True).contiguous()
