"""What the quickstart measures: the whole text, the effect of context, the compressors, and a sample."""

from collections.abc import Callable

import numpy as np
import torch

from ..generation.stream import generate
from ..ops import backend
from ..training.precision import autocast
from ..training.trainer import Trainer
from .compressors import compressors
from .perplexity import Losses, score
from .report import Report

STRETCH_WINDOWS = 4  # windows of the longest context that the contexts are compared on


def measure(
    trainer: Trainer, text: bytes, prompt: str, watch: Callable[[float, str], None] = lambda done, note: None
) -> Report:
    """Evaluate a trained model.

    Args:
        trainer: after training.
        text: the validation text.
        prompt: the beginning of the sample.
        watch: called with the fraction done and a note.
    """
    model, tokenizer, length = trainer.model.eval(), trainer.tokenizer, trainer.recipe.training.length
    tokens = tokenizer.encode(text)
    contexts = [c for c in (length * 4**k // 16 for k in range(6)) if 1 <= c <= len(tokens)]
    stretch = tokens[: min(len(tokens), STRETCH_WINDOWS * 64 * length)]
    work = len(tokens) + len(contexts) * len(stretch)
    done = 0

    def run(part: np.ndarray, context: int | None) -> Losses:
        nonlocal done
        note = "whole text" if context is None else f"context {context:,}"
        losses = score(
            model, [part], tokenizer.begin, context, trainer.precision,
            watch=lambda losses: watch((done + losses.tokens) / work, note),
        )  # fmt: skip
        done += losses.tokens
        return losses

    losses = {context: run(stretch, context) for context in contexts}
    whole = run(tokens, None)
    sample_tokens = torch.from_numpy(tokenizer.encode(prompt, begin=True))[None].to(trainer.device)
    with autocast(trainer.precision, trainer.device):
        written = [int(t) for t in generate(model, sample_tokens, 600, temperature=0.8, top_p=0.95)]
    return Report(
        parameters=trainer.recipe.model.num_parameters,
        train_bytes=trainer.tokens,
        train_seconds=trainer.seconds,
        total_seconds=0.0,
        bits_per_byte=whole.bits_per_byte(len(text)),
        bits_per_byte_by_context={c: x.bits_per_byte(len(stretch)) for c, x in losses.items()},
        baselines=compressors([text]),
        training_length=length,
        bits_per_byte_by_position=losses[contexts[-1]].by_position(),
        precision=trainer.precision,
        implementation=backend.describe(trainer.device),
        sample=prompt + tokenizer.decode(written),
    )
