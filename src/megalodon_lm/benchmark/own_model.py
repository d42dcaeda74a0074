"""A model of the registry as a contender: Megalodon and every baseline, in one and the same way."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from ..architectures import build
from ..config import ModelConfig
from ..generation.engine import DecodingEngine
from ..layers.complex_ema import ComplexEMA
from ..ops import backend
from ..pairs import Timer
from ..state import State
from ..state_spec import named
from ..training.precision import autocast
from .measures import CPU, STEPS, Measure, Numbers, random_tokens, timed

PREFILL_LENGTH = 4096  # tokens read at once


class OwnModel:
    """A model of a configuration. Above 64K tokens a step recomputes activations in the backward pass.

    A model with a window gets one that holds all tokens, so that it is a transformer with full attention.
    """

    CHECKPOINT_FROM = 65_536  # tokens of a step

    def __init__(self, config: Any, precision: Numbers):
        self.config, self.precision = config, precision
        self.model: Any = self._build()

    def _build(self) -> Any:
        torch.manual_seed(0)
        return build(self.config)

    def settle(self, measure: Measure, batch: int, length: int) -> str:
        """See Contender."""
        self.timer(measure, batch, min(length, 256))()
        if measure == "cema":
            return f"float32, {backend.describe(CPU)}"
        again = ", activations recomputed" if measure == "training" and batch * length >= self.CHECKPOINT_FROM else ""
        return f"{self.config.num_parameters:,} parameters, {self.precision}, {backend.describe(CPU)}{again}"

    def timer(self, measure: Measure, batch: int, length: int) -> Timer:
        """See Contender."""
        if measure == "cema":
            return timed(self._cema(batch, length))
        seen = length + STEPS + 1 if measure == "decode" else length
        if getattr(self.config, "window", seen) != seen:
            self.config = dataclasses.replace(self.config, window=seen)
            self.model = self._build()
        if measure == "training":
            return timed(self._training(batch, length))
        self.model.eval()
        if measure == "decode":
            return self._decode(length)
        tokens = random_tokens(batch, length, self.config.vocab_size)
        return timed(lambda: self._read(tokens))

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

    def _context(self, length: int) -> State:
        """As after `length` tokens, and half a unit of reading, so that an unfinished chunk is as full as on average.

        Where a window holds all tokens, reading takes time by the square of them: what the cache holds is made up.
        """
        if not hasattr(self.config, "window"):
            read = random_tokens(1, length + self.config.reading_unit // 2, self.config.vocab_size)
            state: State = self._read(read)[1]
            return state
        made_up: State = self.model.empty_state(1, dtype=torch.bfloat16 if self.precision == "bf16" else torch.float32)
        tensors = made_up.tensors()
        for name, leaf in named(self.model.state_spec):
            if leaf.fill:
                tensors[name][:, :length].normal_()
            else:
                tensors[name].fill_(length)
        return made_up

    def _decode(self, length: int) -> Timer:
        state = self._context(length)

        def timer() -> float:
            engine = DecodingEngine(self.model, state, self.precision)
            token = torch.zeros(1, dtype=torch.int64)
            began = time.perf_counter()
            for _ in range(STEPS):
                token = engine.step(token).argmax(-1)
            return time.perf_counter() - began

        return timer

    def _cema(self, batch: int, length: int) -> Callable[[], None]:
        config: ModelConfig = self.config
        torch.manual_seed(0)
        layer = ComplexEMA(config.model_dim, config.cema_ndim)
        layer.init_weights()
        x = torch.randn(batch, length, config.model_dim, requires_grad=True)
        weight = torch.randn(batch, length, config.model_dim)

        def step() -> None:
            y, _ = layer(x)
            y.backward(weight)
            x.grad = None
            layer.zero_grad(set_to_none=True)

        return step
