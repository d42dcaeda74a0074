"""What a recipe names beside its numbers, found and checked before a run writes anything."""

from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from ..architectures import build
from ..data.batches import Batch, Batches, SequentialBatches, ShuffledBatches
from ..data.corpus import Texts
from ..data.mixture import load_mixture
from ..data.shards import is_prepared
from ..data.subword import SubwordTokenizer, train_bpe
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..errors import InputError
from ..model.language_model import LanguageModel
from ..ops.device import check_memory
from .compiling import trial_batches
from .passes import Forward, Pass
from .recipe import Recipe
from .segments import build_pass
from .trained import load


class Subject(Protocol):
    """What a run learns, and how a batch of it becomes gradients."""

    batches: Any
    """Of a `begin`, a `read` and a `fingerprint`; see data.batches."""
    of_chats: bool
    """Whether it learns the answers of chats."""

    def base(self) -> LanguageModel | None:
        """The model to begin from, if there is one."""

    def passes(self, model: LanguageModel, precision: Any, device: torch.device, in_step: bool) -> Pass:
        """From batches to gradients; see passes.Forward."""

    def trials(self) -> list[Any]:
        """Batches that run every kernel once."""

    def save(self, folder: Path) -> None:
        """Write what the model is used with, such as its tokenizer, into the folder of the run."""


class Text:
    """What a language model learns: see Subject.

    Args:
        recipe: of the run.
        begun: see find_tokenizer.
    """

    def __init__(self, recipe: Recipe, begun: Path | None):
        self.recipe, self.tokenizer = recipe, find_tokenizer(recipe, begun)
        self.batches = open_text(recipe, self.tokenizer)
        self.of_chats = any(s.of_chats for s in self.batches.mixture.sequences)

    def base(self) -> LanguageModel | None:
        """See load_base."""
        return load_base(self.recipe, self.tokenizer)

    def passes(
        self, model: LanguageModel, precision: Literal["bf16", "float32"], device: torch.device, in_step: bool
    ) -> Pass:
        """See build_pass."""
        return build_pass(Forward(model, precision, device, in_step), self.recipe.training)

    def trials(self) -> list[Batch]:
        """With a document's start, and without."""
        return trial_batches(self.recipe.training)

    def save(self, folder: Path) -> None:
        """The tokenizer."""
        self.tokenizer.save(folder)


def check_size(recipe: Recipe, device: torch.device) -> None:
    """Refuse a training that needs more memory than the device has, as far as one can tell.

    Raises:
        InputError: with both sizes.
    """
    t = recipe.training
    with torch.device("meta"):
        model = build(recipe.model)
    state_bytes = model.state_bytes(t.batch_size)
    at_once = min(t.length, t.segment or t.length)
    activations = t.batch_size * (4 * at_once * model.width + 8 * t.length)  # of one of many, and the tokens
    check_memory(
        16 * recipe.model.num_parameters + state_bytes + activations,
        device, "this training", "lower the sizes in [model], training.batch_size, training.length or training.segment",
    )  # fmt: skip


def find_tokenizer(recipe: Recipe, begun: Path | None) -> Tokenizer:
    """The tokenizer of a run; bpe:N is trained on the text.

    Args:
        recipe: of the run.
        begun: the folder of a run that goes on, which holds the tokenizer it began with.

    Raises:
        InputError: missing or unreadable file, or one that does not fit the vocabulary.
    """
    d, t = recipe.data, recipe.training
    kind, _, size = d.tokenizer.partition(":")
    saved = begun is not None and any((begun / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    if begun is not None and (saved or d.tokenizer == t.begin_from):  # what it began from is no longer needed
        tokenizer = load_tokenizer(begun)
    elif kind == "bpe" and size.isdecimal():
        texts = (b"".join(text.blocks).decode("utf-8", "replace") for text in Texts(d.train))
        tokenizer = SubwordTokenizer(train_bpe(texts, int(size)))
    else:
        tokenizer = load_tokenizer(d.tokenizer)
    if recipe.model.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"vocab_size = {recipe.model.vocab_size} is too small for the tokenizer {d.tokenizer} and its special "
            f"tokens; use {tokenizer.vocab_size}"
        )
    tokenizer.begins = True  # from now on, whatever the model was used to
    return tokenizer


def open_text(recipe: Recipe, tokenizer: Tokenizer) -> Batches:
    """The batches of a run; that there is a validation text, if it is to be measured on, is looked at too.

    Raises:
        InputError: missing or unreadable text, too little of it, or one prepared with another tokenizer.
    """
    d, t = recipe.data, recipe.training
    mixture = load_mixture(d.train, d.weights, tokenizer, t.seed, d.section)
    if t.validate_steps and len(d.validation) == 1 and is_prepared(d.validation[0]):
        load_mixture(d.validation, [], tokenizer, t.seed)
    elif t.validate_steps:
        Texts(d.validation)
    if d.order == "shuffled":
        return ShuffledBatches(mixture, t.batch_size, t.length, t.seed)
    return SequentialBatches(mixture, t.batch_size, t.length)


def load_base(recipe: Recipe, tokenizer: Tokenizer) -> LanguageModel | None:
    """The model a run begins from, if it does, which must be of the recipe's kind.

    Raises:
        InputError: missing or damaged, of another shape, or with another tokenizer.
    """
    if not recipe.training.begin_from:
        return None
    folder = Path(recipe.training.begin_from)
    base = load(folder)
    if load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
        raise InputError(f"{folder} has another tokenizer than the data; set data.tokenizer to {folder}")
    if recipe.model.architecture != base.config.architecture:
        raise InputError(
            f"{folder} holds a {base.config.architecture}, and the recipe asks for a {recipe.model.architecture}"
        )
    ours, theirs = recipe.model.to_dict(), base.config.to_dict()
    changed = [key for key in ours if ours[key] != theirs[key] and "drop" not in key]
    if changed:
        raise InputError(
            f"{folder} differs from the recipe in model.{', model.'.join(changed)}; set them as in its config.json"
        )
    return base
