"""What is timed: one training step, reading a prompt, writing tokens, and the CEMA operation alone.

A training step is the forward pass, the loss and the backward pass; no model takes an optimiser step, whose cost
depends on the number of parameters alone. Tokens are random. Every contender reads the same number of them.
"""

import copy
import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ..config import GECKO, ModelConfig
from ..generation.engine import DecodingEngine
from ..layers.complex_ema import ComplexEMA
from ..model.megalodon import Megalodon
from ..ops import backend
from ..training.precision import autocast
from .floor import floor_timer
from .pairs import Timer
from .peers import peer

Measure = Literal["training", "prefill", "decode", "cema"]
PREFILL_LENGTH = 4096  # tokens read at once
STEPS = 64  # tokens written in one run of decode
TRIAL_STEPS = 4
CPU = torch.device("cpu")


class Contender(Protocol):
    """Something that can be timed at a measure."""

    def settle(self, measure: Measure, batch: int, length: int) -> str:
        """Compile, and choose the fastest settings; returns them in a few words."""

    def timer(self, measure: Measure, batch: int, length: int) -> Timer:
        """The work at full size."""


def contender(name: str, config: ModelConfig, precision: Literal["bf16", "float32"]) -> Contender:
    """By name: megalodon, gecko (the same sizes), portable (CEMA without native kernels), floor, or a peer."""
    if name == "megalodon":
        return Ours(config, precision)
    if name == "gecko":
        return Ours(dataclasses.replace(config, **GECKO), precision)
    if name == "portable":
        backend.set_backend("portable")
        return Ours(config, precision)
    if name == "floor":
        return Floor(config, precision)
    return Peer(name, config, precision)


def timed(work: Callable[[], Any]) -> Timer:
    """Measure the seconds of a call."""

    def timer() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return timer


def random_tokens(batch: int, length: int, vocabulary: int) -> torch.Tensor:
    """(batch, length) int64, the same in every process."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


class Ours:
    """Megalodon. Above 32K tokens a step recomputes activations in the backward pass, to bound its memory."""

    CHECKPOINT_FROM = 65_536  # tokens of a step

    def __init__(self, config: ModelConfig, precision: Literal["bf16", "float32"]):
        self.config, self.precision = config, precision
        torch.manual_seed(0)
        self.model = Megalodon(config)

    def settle(self, measure: Measure, batch: int, length: int) -> str:
        """See Contender."""
        self.timer(measure, batch, min(length, 256))()
        if measure == "cema":
            return f"float32, {backend.describe(CPU)}"
        again = ", activations recomputed" if measure == "training" and batch * length >= self.CHECKPOINT_FROM else ""
        return f"{self.precision}, {backend.describe(CPU)}{again}"

    def timer(self, measure: Measure, batch: int, length: int) -> Timer:
        """See Contender."""
        if measure == "training":
            return timed(self._training(batch, length))
        if measure == "prefill":
            self.model.eval()
            tokens = random_tokens(batch, length, self.config.vocab_size)
            return timed(lambda: self._read(tokens))
        return self._decode(length) if measure == "decode" else timed(self._cema(batch, length))

    def _training(self, batch: int, length: int) -> Callable[[], None]:
        model = self.model.train()
        model.activation_checkpointing = batch * length >= self.CHECKPOINT_FROM
        tokens = random_tokens(batch, length + 1, self.config.vocab_size)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

        def step() -> None:
            with autocast(self.precision, CPU):
                loss, _ = model(inputs, targets=targets)
            loss.backward()
            model.zero_grad(set_to_none=True)

        return step

    @torch.inference_mode()
    def _read(self, tokens: torch.Tensor) -> Any:
        with autocast(self.precision, CPU):
            state = None
            for piece in tokens.split(PREFILL_LENGTH, dim=1):
                logits, state = self.model(piece, state, logits_to_keep=1)
            return logits[:, 0], state

    def _decode(self, length: int) -> Timer:
        """Half a chunk is read after the context, so that the unfinished chunk is as full as it is on average."""
        self.model.eval()
        _, state = self._read(random_tokens(1, length + self.config.chunk_size // 2, self.config.vocab_size))

        def timer() -> float:
            engine = DecodingEngine(self.model, state, self.precision)
            token = torch.zeros(1, dtype=torch.int64)
            began = time.perf_counter()
            for _ in range(STEPS):
                token = engine.step(token).argmax(-1)
            return time.perf_counter() - began

        return timer

    def _cema(self, batch: int, length: int) -> Callable[[], None]:
        torch.manual_seed(0)
        layer = ComplexEMA(self.config.model_dim, self.config.cema_ndim)
        layer.init_weights()
        x = torch.randn(batch, length, self.config.model_dim, requires_grad=True)
        weight = torch.randn(batch, length, self.config.model_dim)

        def step() -> None:
            y, _ = layer(x)
            y.backward(weight)
            x.grad = None
            layer.zero_grad(set_to_none=True)

        return step


class Peer:
    """A model of transformers of equal parameters, with the weights and the cache that are fastest here."""

    def __init__(self, name: str, config: ModelConfig, precision: Literal["bf16", "float32"]):
        self.module, self.precision, self.vocabulary = peer(name), precision, config.vocab_size
        torch.manual_seed(0)
        self.model = self.module.build(config.num_parameters, config.vocab_size)
        self._cast: nn.Module | None = None
        self.weights: Literal["autocast", "bf16", "float32"] = "float32"
        self.cache = self.module.CACHES[0]

    def settle(self, measure: Measure, batch: int, length: int) -> str:
        """See Contender. A few runs of each choice decide: of a short prompt, or of steps at the full context."""
        parameters = f"{sum(p.numel() for p in self.model.parameters()):,} parameters"
        if measure == "training":
            self.weights = "autocast" if self.precision == "bf16" else "float32"
            self._training(batch, min(length, 64))()
            return f"{parameters}, {self.precision}"
        if measure == "prefill":
            choices = [(weights, self.cache) for weights in self._weights()]
        else:
            choices = [(weights, cache) for weights in self._weights() for cache in self.module.CACHES]
        seconds = {choice: self._try(measure, length, *choice) for choice in choices}
        self.weights, self.cache = min(seconds, key=lambda choice: seconds[choice])
        return f"{parameters}, {self.weights}" + (f", {self.cache} cache" if measure == "decode" else "")

    def timer(self, measure: Measure, batch: int, length: int) -> Timer:
        """See Contender."""
        if measure == "training":
            return timed(self._training(batch, length))
        if measure == "prefill":
            return timed(self._prefill(batch, length))
        return self._decode(length, STEPS)

    def _weights(self) -> tuple[Literal["autocast", "bf16", "float32"], ...]:
        return ("autocast", "bf16", "float32") if self.precision == "bf16" else ("float32",)

    def _try(self, measure: Measure, length: int, weights: Any, cache: str) -> float:
        self.weights, self.cache = weights, cache
        try:
            if measure == "decode":
                timer = self._decode(length, TRIAL_STEPS)
            else:
                timer = timed(self._prefill(1, min(length, 512)))
            return min(timer(), timer())
        except RuntimeError:  # no static cache takes what autocast computes, no scan of mambapy takes bf16 weights
            return float("inf")

    def _evaluated(self) -> nn.Module:
        if self.weights != "bf16":
            return self.model.eval()
        if self._cast is None:
            self._cast = copy.deepcopy(self.model).to(torch.bfloat16)
        return self._cast.eval()

    def _precision(self) -> Any:
        return autocast("bf16" if self.weights == "autocast" else "float32", CPU)

    def _training(self, batch: int, length: int) -> Callable[[], None]:
        model = self.model.train()
        tokens = random_tokens(batch, length, self.vocabulary)

        def step() -> None:
            with self._precision():
                loss = self.module.loss(model, tokens)
            loss.backward()
            model.zero_grad(set_to_none=True)

        return step

    def _prefill(self, batch: int, length: int) -> Callable[[], None]:
        model, tokens = self._evaluated(), random_tokens(batch, length, self.vocabulary)

        def run() -> None:
            with torch.inference_mode(), self._precision():
                self.module.prefill(model, tokens)

        return run

    def _decode(self, length: int, steps: int) -> Timer:
        model = self._evaluated()
        with torch.inference_mode(), self._precision():
            dtype = torch.float32 if self.weights == "float32" else torch.bfloat16
            cache = self.module.made_up_cache(model, self.cache, length, steps, dtype)

        def timer() -> float:
            nonlocal cache
            token = torch.zeros(1, 1, dtype=torch.int64)
            with torch.inference_mode(), self._precision():
                began = time.perf_counter()
                for _ in range(steps):
                    logits, cache = self.module.step(model, token, cache)
                    token = logits.argmax(-1, keepdim=True)
                seconds = time.perf_counter() - began
                self.module.rewind(cache, steps)
            return seconds

        return timer


class Floor:
    """The machine itself; see floor.py."""

    def __init__(self, config: ModelConfig, precision: Literal["bf16", "float32"]):
        self.config = config
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def settle(self, measure: Measure, batch: int, length: int) -> str:
        """See Contender."""
        floor = floor_timer(measure, self.config, batch, length, STEPS, self.dtype)
        floor()
        self._settled = floor
        return floor.describe(floor())

    def timer(self, measure: Measure, batch: int, length: int) -> Timer:
        """See Contender."""
        return self._settled
