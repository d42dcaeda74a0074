"""Encoder, the classifier of long sequences: blocks that see the whole sequence, or what came so far, and a mean."""

import weakref
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..layers.bidirectional_attention import BidirectionalAttention
from ..layers.bidirectional_ema import BidirectionalEMA
from ..layers.block import Block
from ..layers.chunk_attention import ChunkAttention
from ..layers.complex_ema import ComplexEMA
from ..layers.embedding import Embedding
from ..layers.gated_attention import GatedAttention
from ..layers.initialization import INITIALISERS
from ..layers.inputs import NumberEmbedding, PatchEmbedding
from ..layers.linear import Linear
from ..layers.norms import RMSNorm, TimestepNorm
from ..layers.sequence_norm import SequenceNorm
from ..ops.boundaries import Boundaries, Padding
from ..ops.gates import silu
from ..ops.padding import zero_padding
from ..state import State
from ..state_spec import Sealed, Tree, declare
from .assembly import build_feed_forward, mixer_sizes
from .backbone import Backbone
from .encoder_config import EncoderConfig


class ClassificationHead(nn.Module):
    """Final norm, silu(proj(x) + x), the mean over all steps, and a linear map to the classes.

    Args:
        norm: of the sequence, or over time.
        config: of pairs, rows 2i and 2i + 1 are one example, with the features a, b, a * b and a - b of their means.
    """

    def __init__(self, norm: SequenceNorm | TimestepNorm, config: EncoderConfig):
        super().__init__()
        dim = config.model_dim
        self.final_norm, self.pairs = norm, config.pairs
        self.proj = Linear(dim, dim, True, INITIALISERS[config.init_mode])
        self.output = Linear(4 * dim if self.pairs else dim, config.num_classes, False, INITIALISERS["xavier"])

    @property
    def state_spec(self) -> Tree:
        """That of the norm, and the sum of features so far; nothing where the norm carries nothing."""
        if self.final_norm.state_spec is None:
            return {}
        return {"final": self.final_norm.state_spec, "sum": declare(self.proj.in_features, dtype=torch.float64)}

    def forward(
        self, x: Tensor, state: Sealed | None, boundaries: Boundaries | None, count: Tensor
    ) -> tuple[Tensor, Tree]:
        """What the body gave, (B, L, D), to logits (B, classes), or of pairs (B / 2, classes), and the exit state.

        Args:
            x: L from 0.
            state: of `state_spec`.
            boundaries: of x.
            count: (B,) int64, steps so far with these.
        """
        entry = None if state is None or not state.tree else state.tree
        carries, leaving = self.final_norm.state_spec is not None, {}
        if x.shape[1]:
            x, final = self.final_norm(x, None if entry is None else entry["final"], boundaries)
            x = silu(self.proj(x) + x)
            x = x.to(torch.promote_types(x.dtype, torch.float64 if carries else torch.float32))
            if boundaries is not None and boundaries.lengths is not None:
                x = zero_padding(x, boundaries.lengths)
            total = x.sum(1) if entry is None else entry["sum"] + x.sum(1)
            leaving = {"final": final, "sum": total} if carries else {}
        else:
            assert entry is not None
            total, leaving = entry["sum"], entry
        mean = (total / count.clamp(min=1)[:, None].to(total.device)).to(self.proj.weight.dtype)
        if self.pairs:
            a, b = mean[0::2], mean[1::2]
            mean = torch.cat([a, b, a * b, a - b], -1)
        logits = self.output(mean)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), leaving


class Encoder(Backbone):
    """Classifies sequences of tokens, of numbers or of patches.

    `logits, _ = model(inputs, mask=mask)`. With `direction = "forward"` a sequence may come in pieces of any length:
    `logits, state = model(piece, state)` are those of everything so far.

    Args:
        config: the architecture; see EncoderConfig.named.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    config: EncoderConfig
    config_class = EncoderConfig

    def __init__(self, config: EncoderConfig, activation_checkpointing: bool = False):
        super().__init__(
            config,
            _build_input(config),
            (_build_block(config, i) for i in range(config.num_layers)),
            ClassificationHead(_build_norm(config), config),
            activation_checkpointing,
        )

    def forward(
        self,
        inputs: Tensor,
        state: State | None = None,
        *,
        targets: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
        mask: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """Logits of the classes of the sequences so far, or their loss.

        Args:
            inputs: (B, L) int64 tokens or numbers, or (B, L, patch_dim); of pairs (B, 2, L) and (B, 2, L, patch_dim).
            state: what came before, where `direction` is "forward"; None for nothing.
            targets: (B,) int64 classes: asks for the loss instead of logits.
            reduction: of the loss: "mean" over the examples, or "none".
            mask: (B, L) bool, or (B, 2, L) of pairs; False at padding, which may stand anywhere and leaves no trace.

        Returns:
            logits (B, classes), or with targets their cross-entropy in nats, a scalar or (B,), in float32 (float64 for
            a float64 model); and the State, None where the whole sequence must be there at once.

        Raises:
            InputError: wrong shapes, tokens outside the vocabulary, a sequence of no steps, a state of another model.
        """
        self._check(inputs, state, targets, mask)
        if self.config.pairs:
            inputs, mask = inputs.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
        boundaries = None
        if mask is not None:
            padding = Padding.of(mask)
            if inputs.is_floating_point():  # whatever stands at padding, it shall not meet a weight
                inputs = inputs.masked_fill(~mask.view(*mask.shape, *(1,) * (inputs.dim() - 2)), 0)
            inputs = padding.remove(inputs)
            boundaries = Boundaries(None, padding.lengths)
        batch, length = inputs.shape[:2]
        entry = self.empty_state(batch) if length == 0 and state is None else state
        where = boundaries or Boundaries()
        before = torch.zeros(batch, dtype=torch.int64) if entry is None else entry.position
        position = where.exit_position(before, length)
        if self.config.direction == "both" and not torch.compiler.is_compiling() and (position == 0).any():
            raise InputError("a sequence of no steps has no class; leave it out")
        x, layers = self.body(self.embed(inputs), None if entry is None else entry.parts["layers"], boundaries)
        of_head = None if entry is None else Sealed(entry.parts["norm"])
        logits, head = self.output(x, of_head, boundaries, position)
        made = logits if targets is None else F.cross_entropy(logits, targets, reduction=reduction)
        if self.config.direction == "both":
            return made, None
        parts = {"layers": layers, "norm": head, "position": position}
        return made, State(parts, self.state_spec, weakref.ref(self))

    def _check(self, inputs: Tensor, state: State | None, targets: Tensor | None, mask: Tensor | None) -> None:
        c = self.config
        lead = ("B", 2, "L") if c.pairs else ("B", "L")
        shape = (*lead, c.patch_dim) if c.input == "patches" else lead
        fits = inputs.dim() == len(shape) and all(
            isinstance(n, str) or n == inputs.shape[i] for i, n in enumerate(shape)
        )
        typed = inputs.dtype == torch.int64 if c.input == "tokens" else inputs.is_floating_point()
        if not (fits and typed):
            kind = "int64" if c.input == "tokens" else "floating-point"
            wanted = ", ".join(map(str, shape))
            raise InputError(
                f"{c.input} must be {kind} of shape ({wanted}), not {inputs.dtype} of {tuple(inputs.shape)}"
            )
        if c.input == "tokens" and inputs.numel() and not torch.compiler.is_compiling():
            low, high = (int(t) for t in inputs.aminmax())
            if low < 0 or high >= c.vocab_size:
                raise InputError(f"token {low if low < 0 else high} is outside the vocabulary of {c.vocab_size}")
        steps = inputs.shape[: len(lead)]
        if mask is not None and (mask.shape != steps or mask.dtype != torch.bool):
            raise InputError(f"mask must be bool of shape {tuple(steps)}, not {mask.dtype} of {tuple(mask.shape)}")
        if targets is not None and (targets.shape != inputs.shape[:1] or targets.dtype != torch.int64):
            raise InputError(
                f"targets must be int64 of shape {tuple(inputs.shape[:1])}, not {targets.dtype} of "
                f"{tuple(targets.shape)}"
            )
        if state is not None:
            if c.direction == "both":
                raise InputError('this encoder sees whole sequences and takes no state; direction = "forward" does')
            state.check(self, len(inputs) * (2 if c.pairs else 1))


def _build_input(config: EncoderConfig) -> Embedding | NumberEmbedding | PatchEmbedding:
    """What comes in to the input of the first block."""
    c = config
    if c.input == "tokens":
        return Embedding(c.vocab_size, c.model_dim, False, c.dropout)
    if c.input == "numbers":
        return NumberEmbedding(c.model_dim, c.dropout)
    return PatchEmbedding(c.patch_dim, c.model_dim, c.dropout, INITIALISERS[c.init_mode])


def _build_block(config: EncoderConfig, layer: int) -> Block:
    """Block number `layer`, from 0: that of the decoder, of other parts."""
    c = config
    average: ComplexEMA | None = None
    if c.cema != "none":
        average = (BidirectionalEMA if c.direction == "both" else ComplexEMA)(
            c.model_dim, c.cema_ndim, c.cema == "complex"
        )
    attention: BidirectionalAttention | ChunkAttention
    if c.direction == "both":
        attention = BidirectionalAttention(c.chunk_size, c.rope_base, c.attention, c.attention_dropout)
    else:
        attention = ChunkAttention(c.chunk_size, c.rope_base, c.attention_dropout, False)
    after = RMSNorm(c.model_dim, c.norm_eps) if c.after_cema == "rmsnorm" else nn.SiLU()
    mixer = GatedAttention(_build_norm(c), average, after, attention, None, normalized=True, **mixer_sizes(c))
    return Block(mixer, build_feed_forward(c, layer), two_hop=c.residual == "two_hop")


def _build_norm(config: EncoderConfig) -> SequenceNorm | TimestepNorm:
    """That of a block, or the final one."""
    norm = SequenceNorm if config.direction == "both" else TimestepNorm
    return norm(config.model_dim, config.model_dim // config.groups, config.norm_eps)
