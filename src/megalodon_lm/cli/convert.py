"""megalodon convert"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from ..errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.tokenizer import Tokenizer


@dataclass
class Convert:
    """Write a model in another format.

    Which format MODEL has is seen from its files. Weights keep their type, and pass tensor by tensor from the files of
    the one to those of the other. The tokenizer goes with them; with a classifier, what its examples are made of.
    """

    model: Positional[Path]
    """A run folder, a saved model, a checkpoint of a run, a folder of transformers, a checkpoint of the code that
    Megalodon's authors published; or a Llama, as a folder of transformers or a .gguf file."""
    to: Literal["native", "transformers", "official"]
    """A folder as megalodon train leaves it; one that transformers reads too (docs/huggingface.md); or a checkpoint of
    the authors' code."""
    out: Path
    """The folder to make; one that is there must be empty."""
    parts: int = 1
    """Model-parallel parts of an official checkpoint."""

    def run(self) -> None:
        """Carry out the command."""
        from ..config import ModelConfig
        from ..files import make_folder
        from ..model.checkpoint import write_model
        from ..model.encoder_config import EncoderConfig
        from ..model.official import write_official

        if self.parts != 1 and self.to != "official":
            raise InputError(f"--parts {self.parts} is for --to official; other formats have one part")
        if self.out.is_dir() and any(self.out.iterdir()):
            raise InputError(f"--out {self.out} is not empty; name another folder")
        config, tensors, tokenizer = _opened(self.model)
        known = (ModelConfig, EncoderConfig) if self.to == "transformers" else ModelConfig
        if self.to != "native" and not isinstance(config, known):
            raise InputError(
                f"--to {self.to} is for Megalodon; {self.model} is a model of another kind, "
                f"{config.architecture}, which has no such form"
            )
        make_folder(self.out)
        if isinstance(config, EncoderConfig):
            write_model(config, tensors, self.out)
            classes = _describe_classes(self.model, config, self.to == "transformers", self.out)
            print(f"{self.out}: {config.num_parameters:,} parameters, {self.to}, {classes}")
            return
        if self.to == "official":
            unnamed = 0 if tokenizer is None else config.vocab_size - tokenizer.vocab_size
            write_official(config, tensors, self.out, self.parts, unnamed)
        else:
            write_model(config, tensors, self.out)
        if self.to == "transformers":
            _describe(config, tensors, tokenizer, self.out)
        elif tokenizer is not None:
            tokenizer.save(self.out)
        print(f"{self.out}: {config.num_parameters:,} parameters, {self.to}, tokenizer: {_name(tokenizer)}")


def _opened(folder: Path) -> "tuple[Any, Mapping[str, Tensor], Tokenizer | None]":
    """The configuration, the weights, still in their files, and the tokenizer if there is one."""
    from ..data.tokenizer import load_tokenizer
    from ..data.tokenizer_record import read_record
    from ..model.official import is_official, open_official, tokenizer_file
    from ..training.trained import open_trained

    config: Any
    tensors: Mapping[str, Tensor]
    if _is_llama(folder):
        from ..hub.llama import open_llama

        return open_llama(folder)
    if not is_official(folder):
        config, tensors = open_trained(folder)
        try:
            return config, tensors, load_tokenizer(folder)
        except InputError:
            return config, tensors, None
    config, tensors = open_official(folder)
    place = folder if read_record(folder) else tokenizer_file(folder)
    return config, tensors, None if place is None else load_tokenizer(place)


def _is_llama(source: Path) -> bool:
    """Whether it is a model of another program, which transformers reads."""
    from ..configuration import read_config
    from ..model.checkpoint import CONFIG_FILE

    if source.suffix == ".gguf":
        return True
    return (source / CONFIG_FILE).is_file() and read_config(source / CONFIG_FILE).get("model_type") == "llama"


def _describe(config: Any, tensors: "Mapping[str, Tensor]", tokenizer: "Tokenizer | None", folder: Path) -> None:
    """Put the config.json of transformers in the place of ours, and its tokenizer; the weights are the same file."""
    from ..data.subword import SentencePieceTokenizer
    from ..hub import MegalodonConfig, MegalodonForCausalLM
    from ..hub.tokenization import save_tokenizer, special_tokens

    tokens: dict[str, int] = {}
    if isinstance(tokenizer, SentencePieceTokenizer):  # which cannot be one of transformers
        tokens = {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end}
        tokenizer.save(folder)
    elif tokenizer is not None:
        tokens = special_tokens(tokenizer)
        save_tokenizer(tokenizer, folder)
    dtype = str(tensors["embed.weight"].dtype).removeprefix("torch.")
    named = {"architectures": [MegalodonForCausalLM.__name__], "dtype": dtype}
    MegalodonConfig.of(config, **named, **tokens).save_pretrained(folder)


def _describe_classes(source: Path, config: Any, for_transformers: bool, folder: Path) -> str:
    """Put beside a classifier's weights what its examples are made of, where that is known; a word on it."""
    from ..training.classification import FORM_FILE, load_form, save_form

    form = load_form(source) if (source / FORM_FILE).exists() else None
    if form is not None:
        save_form(form, folder)
    if for_transformers:
        from ..hub import MegalodonEncoderConfig, MegalodonForSequenceClassification

        names = {} if form is None else {"id2label": dict(enumerate(form.classes))}
        kind = MegalodonForSequenceClassification.__name__
        MegalodonEncoderConfig.of(config, architectures=[kind], **names).save_pretrained(folder)
    return f"classes: {config.num_classes}" if form is None else f"classes: {', '.join(form.classes)}"


def _name(tokenizer: "Tokenizer | None") -> str:
    if tokenizer is None:
        return "none; put its tokenizer.json or tokenizer.model into the folder"
    return str(getattr(tokenizer, "file", "bytes"))
