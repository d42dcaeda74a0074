"""megalodon train"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from ..errors import InputError
from .options import Shared

if TYPE_CHECKING:
    from ..parallel.ranks import Ranks
    from ..training.recipe import Recipe


@dataclass
class Train(Shared):
    """Train a model from a recipe.

    A recipe is a TOML file with the tables [model], [data] and [training]; docs/recipes.md explains every key. Ctrl-C
    ends the run after the current step and leaves a checkpoint, from which --resume last goes on. With --ranks, or
    under torchrun, several processes train together, in the mesh of the recipe's table [mesh]; see docs/distributed.md.
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
    restarts: int = 0
    """How often all are started again, from the last checkpoint, when one of them is lost."""

    def run(self) -> None:
        """Carry out the command."""
        from ..ops.device import choose_device
        from ..parallel.launch import restarted
        from ..parallel.ranks import join
        from ..parallel.started import started_ranks
        from ..training.recipe import Recipe
        from ..training.run_folder import free_run_folder, recorded_recipe
        from ..training.tensorboard import summary_writer

        if restarted():
            self.resume = "auto"
        if self.resume != "no" and self.out is None:
            raise InputError(f"--resume {self.resume} needs --out, the folder of the run to go on with")
        begun = recorded_recipe(self.out) if self.out and self.resume != "no" else None
        recipe = Recipe.load(self.recipe, self.set, begun)
        if self.tensorboard:
            summary_writer()
        if started_ranks() > 1 and self.out is None:
            raise InputError("several ranks need --out, the folder of the run that they share")
        folder = self.out or free_run_folder(Path("runs") / self.recipe.stem)
        if self.ranks > 1:
            recipe.mesh.check_rows(self.ranks, recipe.training.batch_size)
        if (code := self.launched(["--out", str(folder)], self.restarts)) is not None:
            sys.exit(code)
        ranks = join(recipe.mesh, choose_device(self.device))
        with ranks.together():
            finished = self._train(recipe, folder, ranks)
            ranks.leave(0 if finished else 130)
        if not finished:
            sys.exit(130)

    def _train(self, recipe: "Recipe", folder: Path, ranks: "Ranks") -> bool:
        """One process's share of the run; whether it reached its end."""
        from ..training.report import REPORT_MARKDOWN, bytes_per_token, reported
        from ..training.trainer import Trainer
        from .progress import console
        from .training import train_with_progress

        console.quiet = console.quiet or not ranks.is_first
        trainer = Trainer(recipe, folder, self.device, self.resume, ranks=ranks)
        per_token = bytes_per_token(trainer.batches, trainer.tokenizer)
        with reported(folder, per_token) if ranks.is_first else nullcontext():
            finished, _ = train_with_progress(trainer, self.tensorboard and ranks.is_first)
        if ranks.is_first:
            print(folder / REPORT_MARKDOWN)
        return finished
