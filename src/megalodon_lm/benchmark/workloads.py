"""Who is timed, by name: models of the registry, of transformers, or the faster of both, and the machine itself."""

import dataclasses

import torch

from ..architectures import ARCHITECTURES, config_class
from ..config import GECKO, ModelConfig
from ..ops import backend
from ..pairs import Timer, least
from .floor import floor_timer
from .library_model import LibraryModel
from .measures import STEPS, Contender, Measure, Numbers
from .own_model import OwnModel
from .peers import NAMES, library_name, missing

TRIAL_LENGTH = 1024  # of the input that decides which form of a model is faster; decoding is tried at the full context


def contender(name: str, config: ModelConfig, precision: Numbers) -> Contender:
    """By name: megalodon, gecko (the same sizes), portable (CEMA without native kernels), floor, or a rival.

    A rival has as many parameters. If both the registry and transformers have it, the faster form is taken, or with
    "transformers_" before its name the latter.
    """
    if name == "floor":
        return Floor(config, precision)
    if name == "portable":
        backend.set_backend("portable")
    if name in ("megalodon", "portable"):
        return OwnModel(config, precision)
    if name == "gecko":
        return OwnModel(dataclasses.replace(config, **GECKO), precision)
    if (library := library_name(name)) != name:
        return LibraryModel(library, config, precision)
    forms: dict[str, Contender] = {}
    if name in ARCHITECTURES:
        forms["ours"] = OwnModel(config_class(name).sized(config.num_parameters, config.vocab_size), precision)
    if name in NAMES and not missing(name):
        forms["transformers"] = LibraryModel(name, config, precision)
    return Fastest(forms)


class Fastest:
    """One model in several forms, of which the fastest runs, at each measure.

    Args:
        forms: by name.
    """

    def __init__(self, forms: dict[str, Contender]):
        self.forms = forms
        self.chosen = next(iter(forms))

    def settle(self, measure: Measure, batch: int, length: int) -> str:
        """See Contender."""
        notes = {name: form.settle(measure, batch, length) for name, form in self.forms.items()}
        if len(self.forms) > 1:
            tried = length if measure == "decode" else min(length, TRIAL_LENGTH)
            timers = [form.timer(measure, batch, tried) for form in self.forms.values()]
            seconds = dict(zip(self.forms, least(timers), strict=True))
            self.chosen = min(seconds, key=lambda name: seconds[name])
        return f"{notes[self.chosen]}, {self.chosen}"

    def timer(self, measure: Measure, batch: int, length: int) -> Timer:
        """See Contender."""
        return self.forms[self.chosen].timer(measure, batch, length)


class Floor:
    """The machine itself; see floor.py."""

    def __init__(self, config: ModelConfig, precision: Numbers):
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
