"""One token at a time on the CPU: each layer is one compiled call, and nothing is allocated from step to step."""

import math
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..layers.block import Block
from ..layers.gated_attention import GatedAttentionState
from ..model.decoder import Megalodon
from ..ops.cema import cema_coefficients
from ..ops.chunk_attention import KeyValueCache
from ..ops.cpu import decoding_kernels as kernels
from ..ops.cpu.scalars import array_of
from ..ops.cpu.simd import LANES, as_numpy
from ..ops.cpu.team import num_threads
from ..ops.derived import rounded
from ..ops.rotary import rotations
from ..ops.timestep_norm import NormState
from ..state import State


def fits(model: Megalodon) -> bool:
    """Whether the compiled step can run this model: float32 on the CPU, widths that are multiples of 16, no dropout."""
    c = model.config
    widths = (c.model_dim, c.ffn_hidden_dim, c.z_dim // c.num_heads, c.value_dim // c.num_heads)
    weight = model.embed.weight
    plain = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    dropped = model.training and any((c.dropout, c.hidden_dropout, c.attention_dropout))
    return plain and not dropped and all(width % LANES == 0 for width in widths)


class FusedStep:
    """A model, prepared for steps of one token, and the state of B rows that the steps change in place.

    Args:
        model: that `fits`; later changes of its weights may go unseen.
        state: after the prompt; it is copied.
        dtype: of the weights in products and of the attention cache, float32 or bf16. Weights of another type are
            rounded once for all steps and for reading.
    """

    def __init__(self, model: Megalodon, state: State, dtype: torch.dtype):
        c = self.config = model.config
        self.model = model
        self.dtype = dtype
        rows = state.batch_size
        heads = c.num_heads
        self.sizes = (
            rows, c.model_dim, c.norm_num_groups, _whole(c.cema_ndim), heads, c.z_dim // heads, c.value_dim // heads,
            c.ffn_hidden_dim, c.chunk_size, int(c.swiglu),
        )  # fmt: skip
        self.x = np.zeros(rows * c.model_dim, np.float32)
        self.logits = torch.zeros(rows, c.vocab_size)
        self.position = state.position.clone()
        self.room = self._room(rows)
        cos, sin = (as_numpy(t) for t in rotations(c.chunk_size, c.z_dim // heads, c.rope_base, torch.float32, _CPU))
        self.layers = []
        for block, layer in zip(model.layers, state.parts["layers"], strict=True):
            assert isinstance(block, Block)
            self.layers.append((self._weights(block, cos, sin), self._layer_state(layer)))
        final = model.output.final_norm
        output = model.output.output.weight
        self.head = (_scale_and_bias(final), (self._matrix(output), np.zeros(len(output), np.float32)))
        self.norm = _norm_state(state.parts["norm"])

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row.

        Args:
            tokens: (B,) int64, inside the vocabulary.

        Returns:
            logits (B, vocabulary) float32 of the next token, overwritten by the next step.
        """
        c, threads = self.config, num_threads()
        x = self.model.embed.weight.detach()[tokens].float().view(-1)
        self.x[:] = (x * math.sqrt(c.model_dim) if c.scale_emb else x).numpy()
        for weights, state in self.layers:
            kernels.layer(threads, self.sizes, c.norm_eps, self.x, self.room, weights, state)
        self.position += 1
        n, nothing, ones = self.room[0], self.room[-2], self.room[-1]
        kernels.head(
            threads, self.sizes[:3], c.norm_eps, self.x, (n, nothing, ones), self.head, self.norm, as_numpy(self.logits)
        )
        return self.logits

    def state(self) -> State:
        """A copy of the state, as the model takes it."""
        rows, dim, _, padded, heads, _, _, _, size, _ = self.sizes
        layers = []
        for _, (count, mean, var, h, *cache, fill) in self.layers:
            slots = torch.from_numpy(fill.copy())
            used = (torch.arange(size) < slots[:, None])[..., None, None]
            pairs = torch.from_numpy(h).view(rows, dim, 2, padded)[..., : self.config.cema_ndim].transpose(2, 3)
            cached = (torch.from_numpy(t).view(self.dtype).view(rows, size, heads, -1) for t in cache)
            keys, values = (torch.where(used, t, 0) for t in cached)
            norm, open_chunk = _exported(count, mean, var), KeyValueCache(keys, values, slots)
            layers.append(GatedAttentionState(norm, pairs.clone(), open_chunk))
        parts = {"layers": tuple(layers), "norm": _exported(*self.norm), "position": self.position.clone()}
        return State(parts, self.model.state_spec, weakref.ref(self.model))

    def _room(self, rows: int) -> tuple[np.ndarray, ...]:
        """Memory for one layer's step; see kernels.layer."""
        c = self.config
        splits = -(-c.chunk_size // kernels.SPLIT)
        d, z, v, f, heads = c.model_dim, c.z_dim, c.value_dim, c.ffn_hidden_dim, c.num_heads
        widths = (d, d, v, z, v, d, z, heads * splits * kernels.SPLIT, heads * splits * 2, v * splits, v, d, d, f, f, 2)
        arrays = (np.zeros(rows * width, np.float32) for width in widths)
        return (*arrays, np.zeros(1), np.ones(rows, np.int64))

    def _weights(self, block: Block, cos: np.ndarray, sin: np.ndarray) -> tuple[Any, ...]:
        c, mega, ffn = self.config, block.mega, block.nffn
        cema = mega.cema
        with torch.no_grad():
            p, q, g = cema_coefficients(cema.alpha, cema.delta, cema.theta, cema.gamma)
            parts = (p, *(torch.view_as_real(t).transpose(1, 2) for t in (q, g)))
            average = tuple(as_numpy(_pad(t).contiguous()) for t in parts)
            gamma = (mega.gamma.float() + 1) / math.sqrt(c.z_dim // c.num_heads)
        mixer = tuple((self._matrix(w.weight), _vector(w.bias)) for w in (mega.wv, mega.wz, mega.wr, mega.wh1))
        none, unscaled = (np.full(c.model_dim, value, np.float32) for value in (0, 1))
        fc1 = self._matrix(ffn.fc1.weight)
        return (
            _scale_and_bias(mega.timenorm),
            (*average, _vector(cema.omega)),
            mixer,
            (_vector(mega.rmsnorm.weight.float() + 1), none),
            (_vector(gamma), _vector(mega.beta), cos, sin),
            (self._matrix(mega.wh2.weight), none),
            _scale_and_bias(ffn.norm),
            (fc1, np.zeros(c.ffn_hidden_dim, np.float32)),
            fc1 if ffn.fc3 is None else self._matrix(ffn.fc3.weight),
            (self._matrix(ffn.fc2.weight), none),
            unscaled if ffn.alpha is None else _vector(ffn.alpha),
        )

    def _layer_state(self, layer: GatedAttentionState) -> tuple[np.ndarray, ...]:
        h = _pad(layer.cema.detach().float().transpose(2, 3)).clone(memory_format=torch.contiguous_format)
        keys, values, fill = layer.attention
        cached = (
            array_of(t.detach().to(self.dtype, memory_format=torch.contiguous_format, copy=True)).reshape(-1)
            for t in (keys, values)
        )
        return (*_norm_state(layer.norm), as_numpy(h), *cached, as_numpy(fill.clone()))

    def _matrix(self, weight: Tensor) -> np.ndarray:
        with torch.no_grad():  # so that it is the one that reading takes
            return as_numpy(rounded(weight, self.dtype).contiguous())


_CPU = torch.device("cpu")


def _whole(width: int) -> int:
    """The next multiple of LANES."""
    return -(-width // LANES) * LANES


def _pad(t: Tensor) -> Tensor:
    """The last dimension filled with zeros up to a multiple of LANES."""
    return torch.nn.functional.pad(t, (0, _whole(t.shape[-1]) - t.shape[-1]))


def _vector(t: Tensor) -> np.ndarray:
    return as_numpy(t.detach().float().contiguous())


def _scale_and_bias(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    return _vector(norm.weight.float() + 1), _vector(norm.bias)


def _norm_state(norm: NormState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count, mean, var = (as_numpy(t.detach().clone(memory_format=torch.contiguous_format)) for t in norm)
    return count, mean, var


def _exported(count: np.ndarray, mean: np.ndarray, var: np.ndarray) -> NormState:
    by_group = (torch.from_numpy(a.copy()).view(len(count), -1) for a in (mean, var))
    return NormState(torch.from_numpy(count.copy()), *by_group)
