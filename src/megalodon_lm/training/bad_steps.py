"""Steps whose loss is not finite or spikes, and what the recipe says to do with them."""

import math

from ..errors import Diverged
from .recipe import TrainingRecipe

MOST_BAD_STEPS = 10  # skipped in a row, or gone back from to the same checkpoint, at which the run gives up
USUAL_LOSS_STEPS = 50  # of the running mean that spikes are measured from


class BadSteps:
    """What the loss usually is, and how often a step was bad.

    Args:
        recipe: of the run.

    Attributes:
        usual_loss: running mean in nats; NaN before the first good step.
        in_a_row: bad steps since the last good one.
    """

    def __init__(self, recipe: TrainingRecipe):
        self.recipe = recipe
        self.usual_loss = math.nan
        self.in_a_row = 0
        self._went_back = (-1, 0)  # to which step, and how many times

    def judge(self, step: int, loss: float, norm: float) -> str:
        """What is wrong with a step; if nothing, its loss counts towards the usual one.

        Args:
            step: steps before it.
            loss: in nats.
            norm: of the gradient.
        """
        if trouble := self._trouble(loss, norm):
            self.in_a_row += 1
            return trouble
        self.in_a_row = 0
        fresh = 1.0 if math.isnan(self.usual_loss) else 1 / min(step + 1, USUAL_LOSS_STEPS)
        self.usual_loss = loss if fresh == 1.0 else self.usual_loss + fresh * (loss - self.usual_loss)
        return ""

    def _trouble(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss + norm):
            return f"the loss is {loss} and the gradient's norm {norm}"
        if self.recipe.spike and loss > self.usual_loss + self.recipe.spike:
            return f"the loss is {loss:.3f}, usually {self.usual_loss:.3f}"
        return ""

    def pass_over(self, trouble: str, step: int) -> str:
        """Leave a bad step out.

        Returns:
            What was done, for the record.

        Raises:
            Diverged: the recipe says to stop, or too many steps in a row were bad.
        """
        if self.recipe.bad_step == "stop":
            raise Diverged(f"{trouble} at step {step}; {self._advice}, or set training.bad_step to skip or rewind")
        if self.in_a_row >= MOST_BAD_STEPS:
            raise Diverged(f"{trouble} at step {step}, the {self.in_a_row}th time in a row; {self._advice}")
        return f"skipped: {trouble}"

    def go_back(self, trouble: str, step: int, checkpoint: int | None) -> str:
        """Count a return to the step of the newest checkpoint.

        Returns:
            What is done, for the record.

        Raises:
            Diverged: there is no checkpoint, or the run went back to it too often.
        """
        if checkpoint is None:
            raise Diverged(f"{trouble} at step {step}, and there is no checkpoint yet to go back to; {self._advice}")
        times = self._went_back[1] + 1 if self._went_back[0] == checkpoint else 1
        if times >= MOST_BAD_STEPS:
            raise Diverged(f"{trouble} at step {step}, the {times}th time since step {checkpoint}; {self._advice}")
        self._went_back = (checkpoint, times)
        return f"went back from step {step}: {trouble}"

    @property
    def _advice(self) -> str:
        rate = self.recipe.learning_rate
        return f"lower training.learning_rate = {rate}, or raise training.warmup_steps"
