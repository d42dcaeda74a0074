"""What a tokenizer.json says about its tokens: which are special, and which stand for bytes."""

import json
import secrets
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from ..errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BEGIN_NAMES = ("<|begin|>", "<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|endoftext|>", "</s>")
END_NAMES = ("<|end|>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[SEP]")
_TOKENWISE = {"ByteLevel", "WordPiece", "Metaspace", "BPEDecoder", "Replace", "ByteFallback", "Strip", "Fuse"}


class Step(TypedDict):
    """A normalizer, pre-tokenizer or decoder."""

    type: str
    stop: NotRequired[int]


class Added(TypedDict):
    """A token that is found in a text before the model sees it."""

    id: int
    content: str
    special: bool


class Model(TypedDict):
    """What makes tokens of words. Unigrams are pairs of piece and score, in the order of the tokens."""

    vocab: dict[str, int] | list[tuple[str, float]]
    merges: NotRequired[list[list[str]]]
    unk_token: NotRequired[str | None]
    unk_id: NotRequired[int | None]


class Description:
    """A tokenizer as the `tokenizers` library writes it down, whatever file it was read from.

    Attributes:
        added: tokens beside those of the model.
        specials: of these, the ones marked as special, by name; an ordinary token of the same name is none.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        self._whole: dict[str, Any] = json.loads(tokenizer.to_str())
        self._model: Model = self._whole["model"]
        self._encoders = _steps(self._whole["normalizer"], "normalizers")
        self._encoders += _steps(self._whole["pre_tokenizer"], "pretokenizers")
        self._decoders = _steps(self._whole["decoder"], "decoders")
        self.added: list[Added] = self._whole["added_tokens"]
        self.specials = {token["content"]: token["id"] for token in self.added if token["special"]}

    def special(self, names: tuple[str, ...], path: object) -> int:
        """The special token with the first of some names.

        Raises:
            InputError: there is none.
        """
        found = next((self.specials[name] for name in names if name in self.specials), None)
        if found is None:
            raise InputError(f"the tokenizer {path} has none of the special tokens {', '.join(names)}; add one")
        return found

    @property
    def spells_bytes(self) -> bool:
        """Whether each letter of a piece stands for a byte, as the decoder says, or where there is none the encoder."""
        return any(step["type"] == "ByteLevel" for step in self._decoders or self._encoders)

    @property
    def falls_back_to_bytes(self) -> bool:
        """Whether pieces such as <0x0A> stand for a byte."""
        return any(step["type"] == "ByteFallback" for step in self._decoders)

    def check_tokenwise(self, path: object) -> None:
        """Refuse decoders whose text of a token depends on more than the token before it.

        Raises:
            InputError: there is one.
        """
        kinds = [step["type"] for step in self._decoders]
        joined = self._decoders[kinds.index("Fuse") + 1 :] if "Fuse" in kinds else []
        beyond = any(step["type"] != "Strip" or step.get("stop") for step in joined)
        if set(kinds) - _TOKENWISE or beyond or ("ByteLevel" in kinds and len(kinds) > 1):
            raise InputError(f"the tokenizer {path} decodes by {', '.join(kinds)}, which cannot be done token by token")

    def unspellable(self) -> "Tokenizer":
        """The tokenizer with the special tokens of its vocabulary under names that no text can spell.

        Many a vocabulary holds them among the pieces that text is made of: with merges that lead to them, or with the
        best score of all. The token for what is unknown keeps its name, since text may hold that.
        """
        model, secret = self._model, secrets.token_hex(16)
        vocabulary = model["vocab"]
        pieces = vocabulary.keys() if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
        names = (self.specials.keys() & pieces) - {self._unknown()}
        if not names:
            return self._tokenizer
        renamed = {name: f"\U0010ffff{secret}{name}" for name in names}
        if isinstance(vocabulary, dict):
            vocabulary = {renamed.get(piece, piece): token for piece, token in vocabulary.items()}
        else:
            vocabulary = [(renamed.get(piece, piece), score) for piece, score in vocabulary]
        model = {**model, "vocab": vocabulary}
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if not names & {*pair, "".join(pair)}]
        added = [{**token, "content": renamed.get(token["content"], token["content"])} for token in self.added]
        whole = {**self._whole, "model": model, "added_tokens": added, "post_processor": None}
        return self._tokenizer.from_str(json.dumps(whole))

    def _unknown(self) -> str | None:
        """The name of the token for what the vocabulary cannot spell."""
        vocabulary, number = self._model["vocab"], self._model.get("unk_id")
        if isinstance(vocabulary, dict) or number is None:
            return self._model.get("unk_token")
        return vocabulary[number][0]


def _steps(part: Any, inner: str) -> list[Step]:
    """What a part of a tokenizer does, one after the other; a Sequence holds others under the name `inner`."""
    if part is None:
        return []
    return [step for one in part[inner] for step in _steps(one, inner)] if part["type"] == "Sequence" else [part]
