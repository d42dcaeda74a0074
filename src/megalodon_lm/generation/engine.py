"""DecodingEngine: one token after another, from any state, for several rows at once."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..model.language_model import LanguageModel
from ..ops import backend
from ..state import State
from ..training.precision import Precision, autocast, choose_precision

if TYPE_CHECKING:
    from .fused_step import FusedStep


class DecodingEngine:
    """Steps of one token for B rows, which may stand at different positions.

    On the CPU each layer is one compiled call on a preallocated state; elsewhere, for widths that are no multiples of
    16, and where it cannot be compiled, the model itself takes each step. Both give the same logits up to rounding.

    Args:
        model: in evaluation mode; later changes of its weights may go unseen.
        state: what was read; it stays as it is.
        precision: of matrix products and the attention cache: "bf16", "float32", or "auto" for bf16 where the device
            multiplies it natively.
    """

    def __init__(self, model: LanguageModel, state: State, precision: Precision = "auto"):
        self.model = model
        self.device = model.device
        self.precision = choose_precision(precision, self.device)
        state.check(model, state.batch_size)
        self.rows = state.position.shape
        self._entry: State | None = state  # until the first step has shown that its kernels can be compiled
        self._stepper = self._make_stepper(state)

    def _make_stepper(self, state: State) -> "FusedStep | _ModelStep":
        if backend.runs_natively(next(self.model.parameters())):
            from .decodable import fits
            from .fused_step import FusedStep

            if fits(self.model):
                return FusedStep(self.model, state, torch.bfloat16 if self.precision == "bf16" else torch.float32)
        return _ModelStep(self.model, state, self.precision)

    @property
    def fused(self) -> bool:
        """Whether compiled steps run."""
        return not isinstance(self._stepper, _ModelStep)

    @torch.no_grad()  # not inference mode: its states could never be trained on
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row.

        Args:
            tokens: (B,) int64.

        Returns:
            (B, vocabulary) float32 logits of the next token, valid until the next step.

        Raises:
            InputError: a token outside the vocabulary, or another number of them than rows.
        """
        if tokens.shape != self.rows:
            raise InputError(f"the engine has {self.rows[0]} rows but the tokens are {tuple(tokens.shape)}")
        self.model.check_tokens(tokens[:, None])
        entry, self._entry = self._entry, None
        try:
            return self._stepper.step(tokens)
        except backend.KernelError as error:
            assert entry is not None
            backend.give_up(self.device.type, error)
            self._stepper = _ModelStep(self.model, entry, self.precision)
            return self._stepper.step(tokens)

    def state(self) -> State:
        """The state after the last step, to be saved, forked or read on from."""
        return self._stepper.state()


class _ModelStep:
    """Steps that the model itself takes, on any device and of any parts."""

    def __init__(self, model: LanguageModel, state: State, precision: Literal["bf16", "float32"]):
        self._model, self._state, self._precision = model, state, precision

    def step(self, tokens: Tensor) -> Tensor:
        with autocast(self._precision, tokens.device):
            logits, self._state = self._model(tokens[:, None], self._state)
        return logits[:, 0]

    def state(self) -> State:
        return self._state
