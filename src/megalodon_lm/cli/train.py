"""megalodon train"""

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass
class Train:
    """Train a model from a recipe.

    A recipe is a TOML file with the tables [model], [data] and [training]; docs/recipes.md explains every key. Ctrl-C
    ends the run after the current step and saves the weights.
    """

    recipe: Positional[Path]
    """The recipe: a TOML file, or the name of one in the package, such as quickstart."""
    out: Path | None = None
    """Run folder to create; the default is runs/ and the recipe's name."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        from ..training.recipe import Recipe
        from ..training.run_folder import free_run_folder
        from ..training.trainer import Trainer
        from .training import train_with_progress

        recipe = Recipe.load(self.recipe)
        folder = self.out or free_run_folder(Path("runs") / self.recipe.stem)
        finished, _ = train_with_progress(Trainer(recipe, folder, self.device))
        print(folder)
        if not finished:
            sys.exit(130)
