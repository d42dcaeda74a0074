"""megalodon classify"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, subcommand

from ..errors import InputError
from .options import Quiet

if TYPE_CHECKING:
    from ..data.examples import Form

REPORT, FIGURES_FILE, PICTURE = "classification.md", "classification.json", "classification.png"


@dataclass
class ClassifyTrain(Quiet):
    """Train an encoder from a recipe, as megalodon train does a language model.

    The table [data] names the examples, see docs/modalities.md. The run folder gets classification.md at the end: how
    many validation examples are right, and which classes are taken for which. Ctrl-C leaves a checkpoint.
    """

    recipe: Positional[Path]
    """The recipe: a TOML file, or the name of one in the package, such as classify_listops."""
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
        from ..evaluation.classification import ErrorRate, confusion, draw_confusion
        from ..files import write_atomically
        from ..model.encoder import Encoder
        from ..training.classification import Classification, ClassificationRecipe
        from ..training.metrics import EXAMPLES
        from ..training.report import reported
        from ..training.run_folder import free_run_folder
        from ..training.trainer import Trainer
        from .training import train_with_progress

        if self.resume != "no" and self.out is None:
            raise InputError(f"--resume {self.resume} needs --out, the folder of the run to go on with")
        recipe = ClassificationRecipe.load(self.recipe, self.set)
        folder = self.out or free_run_folder(Path("runs") / self.recipe.stem)
        examples = Classification(recipe)
        trainer = Trainer(recipe, folder, self.device, self.resume, examples)
        measure = ErrorRate(examples.validation, examples.form, trainer.precision)
        with reported(folder, 0.0, EXAMPLES):
            finished, _ = train_with_progress(trainer, self.tensorboard, measure, EXAMPLES)
        model = Encoder.load(folder, trainer.device).eval()
        found = confusion(model, examples.validation, examples.form, trainer.precision)
        draw_confusion(found, folder / PICTURE)
        if finished:
            write_atomically(folder / FIGURES_FILE, json.dumps(found.figures(), indent=2) + "\n")
        write_atomically(folder / REPORT, f"# Validation examples\n\n{found.markdown()}\n![]({PICTURE})\n")
        print(f"{found.accuracy:.2%} of {len(examples.validation.raw):,} validation examples are right")
        print(folder / REPORT)
        if not finished:
            sys.exit(130)


@dataclass
class ClassifyEvaluate(Quiet):
    """How many examples a trained encoder gets right, and which classes it takes for which."""

    model: Positional[Path]
    """A run folder or a saved model."""
    examples: Positional[list[str]]
    """Sources of examples with their classes; see docs/modalities.md."""
    label: str = ""
    """Of folders: a regular expression whose first group is the class in a file's name; empty for class folders."""
    json: Path | None = None
    """Write the figures to this file."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        from ..data.example_files import Taking
        from ..data.example_sources import load_examples
        from ..data.examples import joined
        from ..evaluation.classification import confusion
        from ..files import FIGURES, check_writable, write_atomically
        from ..training.precision import choose_precision

        if self.json:
            check_writable(self.json, FIGURES)
        model, form = _load(self.model, self.device)
        taking = Taking(self.label, form.size[0] if form.scaled else 0, form.colour, form.longest)
        parts = [load_examples(source, taking).with_classes(form.classes) for source in self.examples]
        for part in parts:
            form.check(part)
        found = confusion(model, joined(parts), form, choose_precision("auto", model.device))
        print(found.markdown(), end="")
        if self.json:
            write_atomically(self.json, json.dumps(found.figures(), indent=2) + "\n")


@dataclass
class ClassifyPredict(Quiet):
    """The class of each file, and how probable it is.

    A file that cannot be used gets one line on standard error, and the others follow; the exit code is then 2.
    """

    model: Positional[Path]
    """A run folder or a saved model."""
    files: Positional[list[str]]
    """Sound, picture or text files, by what the model takes; two in a row where it takes pairs; of ListOps expressions
    themselves. With --stream, - is sound on standard input: 16-bit WAV, or with --raw its samples alone."""
    stream: bool = False
    """Of sound: a decision every so many milliseconds, on all that was heard so far; for models of
    direction = "forward"."""
    every: float = 100.0
    """Milliseconds from one decision to the next."""
    raw: bool = False
    """What is on standard input has no header: it is little-endian 16-bit samples of one channel, at the model's
    rate."""
    latency: bool = False
    """With --stream: tell at the end of each sound, on standard error, how long decisions took."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        from ..data.example_files import read_example
        from ..evaluation.classification import probabilities

        model, form = _load(self.model, self.device)
        if self.stream and form.kind != "sound":
            raise InputError(f"{self.model} classifies {form.described}; --stream is for sound")
        if not 0 < self.every < math.inf:
            raise InputError(f"--every {self.every} must be a positive number of milliseconds")
        if self.raw and (not self.stream or self.files != ["-"]):
            raise InputError("--raw is for --stream - alone")
        if "-" in self.files and not self.stream:
            raise InputError("-, standard input, is for --stream")
        number = 2 if form.kind == "texts" else 1
        if len(self.files) % number:
            raise InputError(f"{self.model} classifies {form.described}: give an even number of files")
        failed = False
        for i in range(0, len(self.files), number):
            files = self.files[i : i + number]
            try:
                if self.stream:
                    self._listen(files[0], model, form)
                else:
                    self._show(" ".join(files), form, probabilities(model, form, read_example(files, form)))
            except InputError as error:
                print(error, file=sys.stderr, flush=True)
                failed = True
        if failed:
            sys.exit(2)

    def _listen(self, file: str, model: Any, form: "Form") -> None:
        """Show a decision on each piece of a sound."""
        from statistics import median

        import numpy as np

        from ..data.sound import pcm_blocks, sound_blocks, wav_blocks
        from ..data.sources import standard_input
        from ..evaluation.classification import decisions

        size = max(1, round(form.rate * self.every / 1000 / form.patch)) * form.patch
        silence = np.zeros(size, np.float32)
        list(decisions(model, form, [silence, silence]))  # loads the kernels, before anything waits for them
        if file != "-":
            blocks = sound_blocks(file, form.rate, size)
        elif self.raw:
            blocks = pcm_blocks(standard_input(), size)
        else:
            blocks = wav_blocks(standard_input(), form.rate, size)
        took = []
        for decision in decisions(model, form, blocks):
            took.append(decision.seconds)
            self._show(f"{file} {decision.heard / form.rate:.3f} s", form, decision.probabilities)
        if self.latency:
            times = f"{1000 * median(took):.1f} ms (median), {1000 * max(took):.1f} ms (longest)"
            note = f"{file}: {len(took)} decisions, one every {1000 * size / form.rate:g} ms, each there after {times}"
            print(note, file=sys.stderr, flush=True)

    def _show(self, name: str, form: "Form", found: Any) -> None:
        best = int(found.argmax())
        print(f"{name}\t{form.classes[best]}\t{float(found[best]):.3f}", flush=True)


@dataclass
class Classify:
    """Train encoders on examples with classes, measure them, and classify files."""

    task: (
        Annotated[ClassifyTrain, subcommand("train")]
        | Annotated[ClassifyEvaluate, subcommand("evaluate")]
        | Annotated[ClassifyPredict, subcommand("predict")]
    )
    """What to do."""

    def run(self) -> None:
        """Carry out the command."""
        self.task.run()


def _load(folder: Path, device: str) -> "tuple[Any, Form]":
    from ..model.encoder import Encoder
    from ..ops.device import choose_device
    from ..training.classification import load_form

    return Encoder.load(folder, choose_device(device)).eval(), load_form(folder)
