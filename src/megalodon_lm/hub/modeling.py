"""MegalodonModel and MegalodonForCausalLM: the native model behind the interface of transformers.

No model code is here, see native_model.
"""

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from ..model.decoder import Head
from ..model.megalodon import Megalodon
from ..ops.boundaries import Padding, lay_out
from ..state_spec import Sealed
from .cache import MegalodonCache
from .configuration import MegalodonConfig
from .native_model import NativeModel

_HEAD, _EMBEDDING = "output.output.weight", "embed.weight"


class _Read(NamedTuple):
    """What reading a piece gave: the input of the head, (B, L, D), the cache, and that of every block and the head."""

    last: Tensor
    cache: MegalodonCache | None
    hidden: tuple[Tensor, ...] | None


class MegalodonPreTrainedModel(NativeModel):
    """What both classes share: reading, resizing, tying; see NativeModel."""

    config: MegalodonConfig
    config_class = MegalodonConfig
    native_class = Megalodon
    _native: Megalodon
    output: Head
    _is_stateful = True  # no token can be taken back: assisted generation is refused

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding.

        Raises:
            ValueError: the model scales its embeddings, and this one would not.
        """
        if self.config.scale_emb and not getattr(value, "scaled", False):
            raise ValueError("this model multiplies embeddings by sqrt(D); give a megalodon_lm Embedding with scaled")
        self.embed = value

    def _read(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: MegalodonCache | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None = None,
    ) -> _Read:
        """Run the native model's parts; arguments as in forward."""
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: a Megalodon computes attention in tiles and never has its weights")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        if cache is not None and not isinstance(cache, MegalodonCache):
            raise ValueError(f"cache must be a MegalodonCache, not a {type(cache).__name__}")
        native, given = self._native, inputs_embeds if input_ids is None else input_ids
        assert given is not None
        batch, length = given.shape[:2]
        entry = None if cache is None else cache.state
        if entry is not None:
            entry.check(native, batch)
        elif length == 0:
            raise ValueError("nothing was read yet; give at least one token")
        mask = _mask(attention_mask, batch, length)
        padding, boundaries = lay_out(mask, _document_starts(position_ids, mask, batch, length))
        if input_ids is not None:
            native.check_tokens(input_ids.long())
            x = self.embed(input_ids if padding is None else padding.remove(input_ids))
        else:
            x = given if padding is None else padding.remove(given)

        inputs = [x]
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hooks = [b.register_forward_hook(lambda _, __, out: inputs.append(out[0])) for b in self.layers if wanted]
        try:
            x, layers = native.body(x, None if entry is None else entry.parts["layers"], boundaries)
        finally:
            for hook in hooks:
                hook.remove()
        normed, norm = self.output.normalize(
            x, None if entry is None else Sealed(entry.parts["norm"]), boundaries, padding
        )
        hidden = (*(_restored(h, padding) for h in inputs[: len(self.layers)]), normed) if wanted else None

        if use_cache if use_cache is not None else (self.config.use_cache and not self.training):
            cache = MegalodonCache() if cache is None else cache
            state = entry if length == 0 else native.exit_state(entry, layers, norm, x.shape[:2], boundaries)
            assert state is not None
            cache.advance(state, length)
        return _Read(normed, cache, hidden)


class MegalodonModel(MegalodonPreTrainedModel):
    """The decoder without its head; `last_hidden_state` is what the head would get."""

    _keys_to_ignore_on_load_unexpected = [rf"^{_HEAD}$"]  # noqa: RUF012

    def __init__(self, config: MegalodonConfig, native: Megalodon | None = None):
        super().__init__(config, native or Megalodon(config.choices))
        self.output.register_module("output", None)
        self.post_init()

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MegalodonCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See MegalodonForCausalLM.forward."""
        read = self._read(
            input_ids, inputs_embeds, attention_mask, position_ids, cache, use_cache, output_hidden_states,
            output_attentions,
        )  # fmt: skip
        return BaseModelOutputWithPast(last_hidden_state=read.last, cache=read.cache, hidden_states=read.hidden)


class MegalodonForCausalLM(MegalodonPreTrainedModel, GenerationMixin):
    """Megalodon, the language model. `model.native` is the same model with the native interface."""

    _tied_weights_keys = {_HEAD: _EMBEDDING}  # noqa: RUF012

    def __init__(self, config: MegalodonConfig, native: Megalodon | None = None):
        super().__init__(config, native)
        self.post_init()

    @classmethod
    def of(cls, model: Megalodon, **values: Any) -> Self:
        """A native model behind the interface of transformers: the same weights, not a copy.

        Args:
            model: the native model.
            values: of the configuration, such as `eos_token_id`.
        """
        return cls(MegalodonConfig.of(model.config, **values), model).train(model.training)

    @property
    def native(self) -> Megalodon:
        """The native model: the same weights, for `Generator`, `Context` and all else."""
        return self._native

    def get_output_embeddings(self) -> nn.Module:
        """The linear map to the vocabulary."""
        return self.output.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Take over the weight of a linear map to the vocabulary."""
        self.output.output.weight = new_embeddings.weight
        self.output.output.out_features = new_embeddings.weight.shape[0]

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MegalodonCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token after each token, and with labels their loss.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L) or, with what the cache has read before it, (B, columns + L); 0 at padding, which
                may stand anywhere.
            position_ids: (B, L) or (1, L). Only where they start again at 0 counts: a packed document begins there.
            cache: what was read before; it is advanced in place.
            inputs_embeds: (B, L, D) instead of input_ids: what `get_input_embeddings()` gives, or anything else.
            labels: (B, L) the tokens themselves, shifted here; -100 where none is learnt.
            use_cache: whether to return a cache; by default outside training.
            output_hidden_states: whether to return the input of every block, and of the head.
            logits_to_keep: of so many last tokens; 0 for all; or a tensor of positions.
            output_attentions: refused.
            kwargs: of the loss, such as `num_items_in_batch`.

        Raises:
            ValueError: both or none of input_ids and inputs_embeds, another cache than a MegalodonCache, or what the
                native model refuses.
        """
        read = self._read(
            input_ids, inputs_embeds, attention_mask, position_ids, cache, use_cache, output_hidden_states,
            output_attentions,
        )  # fmt: skip
        logits = self.output.output(slice_logits_to_keep(read.last, logits_to_keep))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = None
        if labels is not None:
            labels = _learnt(labels, attention_mask)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=read.cache, hidden_states=read.hidden)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        base: Any = super()  # typed for a protocol
        base._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if generation_config.use_cache is not False and model_kwargs.get("cache") is None:
            model_kwargs["cache"] = MegalodonCache()  # before the first piece, for a prompt that is read in several


def _restored(x: Tensor, padding: Padding | None) -> Tensor:
    return x if padding is None else padding.restore(x)


def _mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """(B, L) bool of the last L columns; None where nothing is padding.

    Raises:
        ValueError: another shape.
    """
    if attention_mask is None or length == 0:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must be of shape ({batch}, {length}), or wider by what was read before, not "
            f"{tuple(attention_mask.shape)}: 0 at padding; which tokens see each other is the model's own affair"
        )
    mask = attention_mask[:, -length:].bool()
    return None if bool(mask.all()) else mask


def _learnt(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Labels (B, L) with -100 at padding and at the first token behind it, which nothing before it foretells."""
    mask = _mask(attention_mask, *labels.shape)
    if mask is None:
        return labels
    return labels.masked_fill(~(mask & F.pad(mask[:, :-1], (1, 0), value=True)), -100)


def _document_starts(position_ids: Tensor | None, mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """(B, L) bool where packed documents begin: positions that start again behind a row's first token."""
    if position_ids is None or length < 2:
        return None
    starts = (position_ids[:, -length:] == 0).expand(batch, length)
    valid = torch.ones_like(starts) if mask is None else mask
    starts = starts & valid & (valid.cumsum(1) > 1)
    return starts if bool(starts.any()) else None
