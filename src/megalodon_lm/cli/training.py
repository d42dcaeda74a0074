"""Showing a training run, for the commands that train."""

from ..evaluation.validation import Validation
from ..training.memory import keep_freed_memory
from ..training.tensorboard import TensorBoard
from ..training.trainer import StepMetrics, Trainer
from .progress import console, progress_bar

SAMPLES_FILE = "samples.txt"


def train_with_progress(trainer: Trainer, tensorboard: bool = False) -> tuple[bool, list[tuple[int, float]]]:
    """Train to the end with a bar.

    Returns:
        Whether the end was reached, and the curve (bytes read, bits per byte smoothed over steps).
    """
    keep_freed_memory()
    config = trainer.recipe.model
    console.print(
        f"training {config.num_parameters:,} parameters on {trainer.device} in {trainer.precision}; {trainer.folder}",
    )
    for note in trainer.notes:
        console.print(note)
    if trainer.step:
        console.print(f"going on after step {trainer.step:,}, {trainer.tokens:,} tokens")
    data, validation = trainer.recipe.data, None
    if trainer.recipe.training.validate_steps:
        validation = Validation(
            data.validation, trainer.recipe.training.validate_bytes, trainer.tokenizer, trainer.precision, data.prompt,
            trainer.folder / SAMPLES_FILE,
        )  # fmt: skip
    board = TensorBoard(trainer.folder, trainer.step) if tensorboard else None
    curve: list[tuple[int, float]] = []
    loss = speed = 0.0

    with progress_bar("train", 1.0) as move:

        def watch(m: StepMetrics) -> None:
            nonlocal loss, speed
            fresh = max(0.02, 1 / m.step)
            loss += fresh * (m.bits_per_token - loss)
            speed += fresh * (m.tokens_per_second - speed)
            curve.append((m.tokens, loss))
            if board:
                board.write(m)
            if m.validation is not None:
                console.print(f"step {m.step}: {m.validation:.4f} bits per byte on the validation text")
            if m.event:
                console.print(f"step {m.step}: {m.event}")
            move(m.progress, f"step {m.step}  {loss:.3f} bits/token  {speed:,.0f} tokens/s  {m.utilisation:.0%}")

        finished = trainer.train(watch, validation)
    if board:
        board.close()
    if not finished:
        console.print(
            f"interrupted after {trainer.tokens:,} tokens; the weights are saved in {trainer.folder}; "
            "--resume last goes on"
        )
    return finished, curve
