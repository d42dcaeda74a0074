"""What a checkpoint holds of a run beside its weights and its counts: moments, random numbers, the carried State."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..model.language_model import LanguageModel
from ..state import State
from .averaging import WeightAverage, put
from .checkpoint import Checkpoint, prefixed, under


def capture(
    model: LanguageModel, optimizer: torch.optim.Optimizer, average: WeightAverage | None, state: State | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights to use the model with, and all tensors that training needs beside them, copied to the CPU."""
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
    if state is not None:
        training |= prefixed("state", state.used())
    return _copied(weights if average is None else average.weights), _copied(training)


def reinstate(
    checkpoint: Checkpoint, model: LanguageModel, optimizer: torch.optim.Optimizer, average: WeightAverage | None
) -> State | None:
    """Put back what was captured, random numbers included.

    Returns:
        The State that was carried, if one was.

    Raises:
        InputError: the weights are not those of this model.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if shapes != {name: weight.shape for name, weight in checkpoint.weights.items()}:
        raise InputError(f"the checkpoint of step {checkpoint.step} has other weights than the model of the recipe")
    training, device = checkpoint.training, next(model.parameters()).device
    put(model, under("weights", training) or checkpoint.weights)
    if average is not None:
        average.weights = {name: weight.to(device) for name, weight in checkpoint.weights.items()}
    for name, parameter in model.named_parameters():
        moments = under(f"optimizer.{name}", training)
        if moments:
            optimizer.state[parameter] = {
                key: value if key == "step" and device.type == "cpu" else value.to(device)
                for key, value in moments.items()
            }
    torch.set_rng_state(training["random"])
    if device.type == "cuda" and "random_cuda" in training:
        torch.cuda.set_rng_state(training["random_cuda"], device)
    carried = under("state", training)
    return State.from_tensors(carried, model).to(device) if carried else None


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
