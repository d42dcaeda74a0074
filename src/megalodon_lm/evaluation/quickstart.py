"""What the quickstart measures: the whole text, the effect of context, the compressors, and a sample."""

from collections.abc import Callable

import numpy as np

from ..generation.generator import Generator
from ..generation.sampling import Sampling
from ..ops import backend
from ..training.trainer import Trainer
from .by_position import rise_by_position, window_starts
from .compressors import compressors
from .perplexity import LOG2, Losses, score
from .report import Report

WINDOWS = (64, 1024, 8192, 65_536)  # lengths in tokens
WINDOW_TOKENS = 1 << 14  # scored for each of them, or one window


def measure(
    trainer: Trainer, text: bytes, prompt: str, watch: Callable[[float, str], None] = lambda done, note: None
) -> Report:
    """Evaluate a trained model: read the text once as a whole, and windows of it as `by_position` says.

    Args:
        trainer: after training.
        text: the validation text.
        prompt: the beginning of the sample.
        watch: called with the fraction done and a note.
    """
    model, tokenizer = trainer.model.eval(), trainer.tokenizer
    tokens = tokenizer.encode(text)
    windows = [w for w in WINDOWS if w < len(tokens)]
    starts = {w: window_starts(len(tokens), w, WINDOW_TOKENS) for w in windows}
    work = len(tokens) + sum(w * len(starts[w]) for w in windows)
    done = 0

    def losses(part: np.ndarray, context: int | None) -> np.ndarray:
        nonlocal done
        note = "whole text" if context is None else f"context {context:,}"

        def move(so_far: Losses) -> None:
            watch((done + so_far.tokens) / work, note)

        kept: list[np.ndarray] = []
        score(model, [part], tokenizer.begin, context, trainer.precision, None, move, lambda n: kept.append(n.ravel()))
        done += len(part)
        return np.concatenate(kept) / LOG2

    whole = losses(tokens, None)
    rises = []
    for window in windows:
        places = starts[window][:, None] + np.arange(window)
        rises.append(losses(tokens[places].ravel(), window).reshape(places.shape) - whole[places])
    scale = len(tokens) / len(text)  # from tokens to bytes
    mean = float(whole.mean())
    by_position = {position: (mean + rise.mean, rise.error) for position, rise in rise_by_position(rises).items()}
    by_position[len(tokens)] = (mean, 0.0)
    generator = Generator(model, tokenizer, trainer.precision)
    written = generator.write([generator.read(prompt)], Sampling(600, temperature=0.8, top_p=0.95))[0]
    return Report(
        parameters=trainer.recipe.model.num_parameters,
        train_bytes=round(trainer.tokens / scale),  # as many a token as in this text
        train_seconds=trainer.seconds,
        total_seconds=0.0,
        bits_per_byte=scale * mean,
        bits_per_byte_by_position={position: scale * bits for position, (bits, _) in by_position.items()},
        error_by_position={position: scale * error for position, (_, error) in by_position.items()},
        baselines=compressors([text]),
        training_length=trainer.recipe.training.length,
        precision=trainer.precision,
        implementation=backend.describe(trainer.device),
        sample=prompt + written,
    )
