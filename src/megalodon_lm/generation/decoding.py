"""Decoder: one token after another, from any state."""

import torch
from torch import Tensor

from ..errors import InputError
from ..model.decoder import Megalodon
from ..ops import backend
from ..state import State
from ..training.precision import Precision, autocast, choose_precision


class Decoder:
    """Steps of one token for B rows, which may stand at different positions.

    On the CPU each layer is one compiled call on a preallocated state; elsewhere, and for widths that are no multiples
    of 16, the model itself takes each step. Both give the same logits up to rounding.

    Args:
        model: in evaluation mode; later changes of its weights may go unseen.
        state: what was read; it stays as it is.
        precision: of matrix products and the attention cache: "bf16", "float32", or "auto" for bf16 where the device
            multiplies it natively.
    """

    def __init__(self, model: Megalodon, state: State, precision: Precision = "auto"):
        self.model = model
        self.device = model.embed.weight.device
        self.precision = choose_precision(precision, self.device)
        state.check(model, state.batch_size)
        self.rows = state.position.shape
        self._state = state
        self._fused = None
        if backend.runs_natively(model.embed.weight):
            from . import fused_step

            if fused_step.fits(model):
                dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
                self._fused = fused_step.FusedStep(model, state, dtype)

    @property
    def fused(self) -> bool:
        """Whether compiled steps run."""
        return self._fused is not None

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
            raise InputError(f"the decoder has {self.rows[0]} rows but the tokens are {tuple(tokens.shape)}")
        if self._fused is None:
            with autocast(self.precision, self.device):
                logits, self._state = self.model(tokens[:, None], self._state)
            return logits[:, 0]
        self.model.check_tokens(tokens[:, None])
        return self._fused.step(tokens)

    def state(self) -> State:
        """The state after the last step, to be saved, forked or read on from."""
        return self._state if self._fused is None else self._fused.state()
