"""Our tokenizers as PreTrainedTokenizerFast, of bytes too, in folders that both sides read."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..data.chat import TEMPLATE
from ..data.subword import SubwordTokenizer
from ..data.token_text import byte_level
from ..data.tokenizer import ByteTokenizer, Tokenizer
from ..errors import InputError

_OWN_FILE = "native_tokenizer.json"  # the library writes one of its own beside it, with what it adds
_PAD = "<|pad|>"


def transformers_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers knows them: the same tokens for a text, the begin token before it as in training.

    Special tokens are found in a text, as everywhere in that library; `split_special_tokens=True` makes them text. It
    pads on the left, where `generate` wants it, and knows the form of chats that models are trained with here.

    Args:
        tokenizer: of bytes, or a tokenizer.json.

    Raises:
        InputError: a SentencePiece model, which the library converts by rules of its own.
    """
    if isinstance(tokenizer, ByteTokenizer):
        backend = _bytes()
    elif isinstance(tokenizer, SubwordTokenizer):
        backend = tokenizers.Tokenizer.from_buffer(tokenizer.content)
    else:
        raise InputError("a SentencePiece model cannot be one of transformers here; give a tokenizer.json")
    begin, end = (backend.id_to_token(token) for token in (tokenizer.begin, tokenizer.end))
    before = f"{begin} " * tokenizer.begins
    backend.post_processor = processors.TemplateProcessing(
        single=f"{before}$A", pair=f"{before}$A $B", special_tokens=[(begin, tokenizer.begin)]
    )
    pad = _PAD if backend.token_to_id(_PAD) is not None else end
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=begin, eos_token=end, pad_token=pad, padding_side="left",
        clean_up_tokenization_spaces=False, chat_template=TEMPLATE, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a tokenizer into the folder of a model, so that transformers and `load_tokenizer` both find theirs.

    Args:
        tokenizer: as for transformers_tokenizer.
        folder: of the model.
    """
    folder = Path(folder)
    transformers_tokenizer(tokenizer).save_pretrained(folder)
    if isinstance(tokenizer, SubwordTokenizer):
        tokenizer.save(folder, _OWN_FILE)
    else:
        tokenizer.save(folder)


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """What a MegalodonConfig says of them: `bos_token_id`, `eos_token_id` and `pad_token_id`."""
    known = transformers_tokenizer(tokenizer)
    return {name: getattr(known, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _bytes() -> tokenizers.Tokenizer:
    """Tokens 0 to 255 are bytes; no merges."""
    pieces = {byte_level(piece)[0]: piece for piece in pre_tokenizers.ByteLevel.alphabet()}
    backend = tokenizers.Tokenizer(models.BPE(vocab={pieces[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(sorted(ByteTokenizer.specials, key=ByteTokenizer.specials.__getitem__))
    assert json.loads(backend.to_str())["added_tokens"][0]["id"] == ByteTokenizer.begin
    return backend
