"""megalodon train"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ..errors import InputError
from .options import Quiet


@dataclass
class Train(Quiet):
    """Train a model from a recipe.

    A recipe is a TOML file with the tables [model], [data] and [training]; docs/recipes.md explains every key. Ctrl-C
    ends the run after the current step and leaves a checkpoint, from which --resume last goes on.
    """

    recipe: Positional[Path]
    """The recipe: a TOML file, or the name of one in the package, such as quickstart."""
    out: Path | None = None
    """Run folder to create; the default is runs/ and the recipe's name."""
    set: list[str] = field(default_factory=list)
    """Changes to the recipe, such as training.steps=2000 model.num_layers=4; values as in TOML."""
    resume: Literal["no", "last", "auto"] = "no"
    """last: go on from the newest checkpoint in --out; auto: the same, from the newest one that is whole, or begin."""
    tensorboard: bool = False
    """Write event files for TensorBoard into the run folder too."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        from ..training.recipe import Recipe
        from ..training.report import REPORT_MARKDOWN, bytes_per_token, write_report
        from ..training.run_folder import free_run_folder, recorded_recipe
        from ..training.tensorboard import summary_writer
        from ..training.trainer import Trainer
        from .training import train_with_progress

        if self.resume != "no" and self.out is None:
            raise InputError(f"--resume {self.resume} needs --out, the folder of the run to go on with")
        begun = recorded_recipe(self.out) if self.out and self.resume != "no" else None
        recipe = Recipe.load(self.recipe, self.set, begun)
        if self.tensorboard:
            summary_writer()
        folder = self.out or free_run_folder(Path("runs") / self.recipe.stem)
        trainer = Trainer(recipe, folder, self.device, self.resume)
        per_token = bytes_per_token(trainer.batches, trainer.tokenizer)
        try:
            finished, _ = train_with_progress(trainer, self.tensorboard)
        except InputError:  # what happened until then is worth a report too
            write_report(folder, per_token)
            raise
        write_report(folder, per_token)
        print(folder / REPORT_MARKDOWN)
        if not finished:
            sys.exit(130)
