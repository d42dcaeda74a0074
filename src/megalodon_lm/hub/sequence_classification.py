"""MegalodonForSequenceClassification: the native encoder behind the interface of transformers; see native_model."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from ..model.encoder import Encoder
from ..ops.boundaries import Padding
from .encoder_configuration import MegalodonEncoderConfig
from .native_model import NativeModel


class MegalodonForSequenceClassification(NativeModel):
    """Classifies sequences of tokens, numbers or patches, or pairs of them. `model.native` is the native model."""

    config: MegalodonEncoderConfig
    config_class = MegalodonEncoderConfig
    native_class = Encoder
    remote_family = "megalodon_encoder"
    _native: Encoder
    layers: nn.ModuleList

    def __init__(self, config: MegalodonEncoderConfig, native: Encoder | None = None):
        super().__init__(config, native)
        self.main_input_name = "input_ids" if config.input == "tokens" else "input_values"
        self.post_init()

    @classmethod
    def of(cls, model: Encoder, **values: Any) -> Self:
        """A native model behind the interface of transformers: the same weights, not a copy.

        Args:
            model: the native model.
            values: of the configuration, such as `id2label`.
        """
        return cls(MegalodonEncoderConfig.of(model.config, **values), model).train(model.training)

    @property
    def native(self) -> Encoder:
        """The native model: the same weights."""
        return self._native

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits of the classes, and with labels their loss.

        Args:
            input_ids: (B, L) int64 tokens, or (B, 2, L) pairs; where the model's `input` is "tokens".
            attention_mask: of the shape of the steps, (B, L) or (B, 2, L); 0 at padding, which may stand anywhere.
            input_values: (B, L) numbers or (B, L, patch_dim) patches, or pairs of these; for all other models.
            labels: (B,) classes; or what `config.problem_type` says.
            output_hidden_states: whether to return the input of every block, and of the head; 0 at padding.
            output_attentions: refused.
            kwargs: of the loss.

        Raises:
            ValueError: the wrong one of input_ids and input_values, both or none, or what the native model refuses.
        """
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: an encoder computes attention without keeping its weights")
        kind = self.config.input
        wanted, other = ("input_ids", input_values) if kind == "tokens" else ("input_values", input_ids)
        inputs = input_ids if kind == "tokens" else input_values
        if inputs is None or other is not None:
            raise ValueError(f"this model classifies {kind}: give them as {wanted}, and nothing else")
        if kind == "tokens":
            inputs = inputs.long()
        else:
            inputs = inputs.to(self.dtype)
        mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        shown = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        seen: list[Tensor] = []
        read: Any = [*self.layers, self.output] if shown else []
        hooks = [part.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for part in read]
        try:
            logits, _ = self._native(inputs, mask=mask)
        finally:
            for hook in hooks:
                hook.remove()
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        hidden = tuple(_restored(x, mask, self.config.pairs) for x in seen) if shown else None
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden)


def _restored(x: Tensor, mask: Tensor | None, pairs: bool) -> Tensor:
    """What was read without its padding, (B, L, D), or of pairs (B, 2, L, D), where it was."""
    if mask is not None:
        rows = mask.flatten(0, -2)
        x = torch.where(rows[..., None], Padding.of(rows).restore(x), 0)
    return x.unflatten(0, (-1, 2)) if pairs else x
