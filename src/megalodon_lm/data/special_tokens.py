"""Special tokens of a tokenizer.json: those it marks as special, under names that no text can spell."""

import secrets
from typing import Any

from ..errors import InputError

BEGIN_NAMES = ("<|begin|>", "<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|endoftext|>", "</s>")
END_NAMES = ("<|end|>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[SEP]")


def special_tokens(description: dict[str, Any]) -> dict[str, int]:
    """The special tokens by name; an ordinary token of the same name is none."""
    return {token["content"]: token["id"] for token in description.get("added_tokens") or () if token.get("special")}


def named(specials: dict[str, int], names: tuple[str, ...], path: object) -> int:
    """The special token with the first of some names.

    Raises:
        InputError: there is none.
    """
    found = next((specials[name] for name in names if name in specials), None)
    if found is None:
        raise InputError(f"the tokenizer {path} has none of the special tokens {', '.join(names)}; add one")
    return found


def unspellable(description: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer with the special tokens of its vocabulary under other names.

    Many a vocabulary holds them among the pieces that text is made of: with merges that lead to them, or with the best
    score of all. The token for what is unknown keeps its name, since text may hold that.
    """
    model = description["model"]
    vocabulary = model["vocab"]
    scored = isinstance(vocabulary, list)  # unigrams: pairs of piece and score, in the order of the tokens
    unknown = model.get("unk_token") or (scored and model.get("unk_id") is not None and vocabulary[model["unk_id"]][0])
    present = {piece for piece, _ in vocabulary} if scored else vocabulary.keys()
    secret = secrets.token_hex(16)
    renamed = {
        name: f"\U0010ffff{secret}{name}" for name in special_tokens(description) if name in present and name != unknown
    }
    if not renamed:
        return description
    model = dict(model)
    if scored:
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {renamed.get(piece, piece): token for piece, token in vocabulary.items()}
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & renamed.keys()]
    added = [{**t, "content": renamed.get(t["content"], t["content"])} for t in description["added_tokens"]]
    return {**description, "model": model, "added_tokens": added, "post_processor": None}
