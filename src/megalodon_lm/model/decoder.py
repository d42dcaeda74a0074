"""Decoder, the language model of any blocks: embedding, blocks, final norm and head."""

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..layers.linear import Linear
from ..ops.boundaries import Boundaries, Padding, lay_out
from ..ops.linear_cross_entropy import Reduction, linear_cross_entropy
from ..state import State
from ..state_spec import Sealed, Tree
from .backbone import Backbone


class Head(nn.Module):
    """Final norm and the linear map to the vocabulary or to the loss.

    Args:
        norm: of one token, x to x; or over time, with a running state of its own: one that has a `state_spec`.
        output: (D, vocabulary).
    """

    def __init__(self, norm: nn.Module, output: Linear):
        super().__init__()
        self.final_norm, self.output = norm, output
        self.loss: Callable[..., Tensor] = linear_cross_entropy  # over the weight of the output, whose rows may be cut
        self._over_time = hasattr(norm, "state_spec")

    @property
    def state_spec(self) -> Tree:
        """That of the final norm, if it has one."""
        return self.final_norm.state_spec if self._over_time else {}

    def forward(
        self,
        x: Tensor,
        state: Sealed | None = None,
        boundaries: Boundaries | None = None,
        padding: Padding | None = None,
        *,
        targets: Tensor | None = None,
        learnt: Tensor | None = None,
        reduction: Reduction = "mean",
        logits_to_keep: int | None = None,
    ) -> tuple[Tensor, Tree]:
        """What the body gave, (B, L, D), to logits or losses; arguments as in Decoder.forward.

        Args:
            x: without the padding.
            state: of the norm.
            boundaries: of x.
            padding: to be put back.
            targets, learnt, reduction, logits_to_keep: with the padding.
        """
        x, leaving = self.normalize(x, state, boundaries, padding)
        if targets is not None:
            return self.loss(x, self.output.weight, targets, learnt, reduction), leaving
        logits = self.output(x if logits_to_keep is None else x[:, max(0, x.shape[1] - logits_to_keep) :])
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), leaving

    def normalize(
        self,
        x: Tensor,
        state: Sealed | None = None,
        boundaries: Boundaries | None = None,
        padding: Padding | None = None,
    ) -> tuple[Tensor, Tree]:
        """What the linear map gets, (B, L, D) with the padding, and the norm's exit state; arguments as in forward."""
        leaving = None if state is None else state.tree
        if not self._over_time:
            x, leaving = self.final_norm(x), {}
        elif x.shape[1] or leaving is None:
            x, leaving = self.final_norm(x, leaving, boundaries)
        return (x if padding is None else padding.restore(x)), leaving


class Decoder(Backbone):
    """A decoder without a context limit: what every architecture has beside its blocks.

    `logits, state = model(tokens)`, then `logits, state = model(more, state)`: the pieces may have any length and give
    what the whole would give. With `targets` it gives the loss instead. Arguments as of Backbone, whose parts are an
    Embedding of tokens, blocks, and a Head.
    """

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        targets: Tensor | None = None,
        learnt: Tensor | None = None,
        reduction: Reduction = "mean",
        logits_to_keep: int | None = None,
        document_starts: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Logits of the next token after each token, or their loss, and the state after the last.

        Args:
            tokens: (B, L) int64; L may be anything from 0.
            state: what came before, or None for nothing.
            targets: (B, L) int64, the token after each: asks for the loss instead of logits, which then are never all
                in memory.
            learnt: (B, L) bool, the targets that count in the loss; None for all.
            reduction: of the loss: "mean" over the targets that count, 0 if none does; or "none".
            logits_to_keep: logits of so many tokens at the ends of the rows alone; None for all.
            document_starts: (B, L) bool, True at the first token of each document packed into the rows: statistics,
                CEMA, attention and rotary positions restart there.
            mask: (B, L) bool, False at padding, which may stand anywhere: its logits are meaningless, its targets do
                not count, and it leaves no trace in the state.

        Returns:
            logits (B, L, vocabulary), or with targets their cross-entropy in nats, a scalar or (B, L) with 0 where a
            target does not count, in float32 (float64 for a float64 model); and the State.

        Raises:
            InputError: tokens outside the vocabulary, wrong shapes, or a state of another model or batch.
        """
        self._check(tokens, state, targets, learnt, reduction, document_starts, mask)
        if mask is not None:
            learnt = mask if learnt is None else learnt & mask.to(learnt.device)
        padding, boundaries = lay_out(mask, document_starts)
        if padding is not None:
            tokens = padding.remove(tokens)
        batch, length = tokens.shape
        x = self.embed(tokens)
        if length == 0 and state is None:
            state = self.empty_state(batch, x.device, x.dtype)
        x, layers = self.body(x, None if state is None else state.parts["layers"], boundaries)
        made, norm = self.output(
            x, None if state is None else Sealed(state.parts["norm"]), boundaries, padding,
            targets=targets, learnt=learnt, reduction=reduction, logits_to_keep=logits_to_keep,
        )  # fmt: skip
        if state is not None and length == 0:
            return made, state
        return made, self.exit_state(state, layers, norm, tokens.shape, boundaries)

    def check_tokens(self, tokens: Tensor) -> None:
        """Refuse what is not a batch of tokens of this model; on the CPU also their values.

        Raises:
            InputError: with the shape, the type or the token, and the limit.
        """
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise InputError(f"tokens must be int64 of shape (B, L), not {tokens.dtype} of {tuple(tokens.shape)}")
        if tokens.device.type == "cpu" and tokens.numel():
            low, high = (int(t) for t in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise InputError(
                    f"token {wrong} is outside the vocabulary of {self.config.vocab_size}; "
                    "encode the text with the tokenizer of this model"
                )

    def _check(
        self,
        tokens: Tensor,
        state: State | None,
        targets: Tensor | None,
        learnt: Tensor | None,
        reduction: str,
        starts: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        if not torch.compiler.is_compiling():  # a graph cannot depend on values
            self.check_tokens(tokens)
            if targets is not None:
                self.check_tokens(targets)
        for name, t in (("document_starts", starts), ("mask", mask), ("learnt", learnt)):
            if t is not None and (t.shape != tokens.shape or t.dtype != torch.bool):
                raise InputError(
                    f"{name} must be bool of shape {tuple(tokens.shape)} like the tokens, "
                    f"not {t.dtype} of {tuple(t.shape)}"
                )
        if targets is not None:
            if targets.shape != tokens.shape:
                raise InputError(
                    f"targets must have the shape {tuple(tokens.shape)} of the tokens, not {tuple(targets.shape)}"
                )
            if reduction not in get_args(Reduction):
                raise InputError(f"reduction = {reduction!r} must be one of {', '.join(get_args(Reduction))}")
        if state is not None:
            state.check(self, len(tokens))
