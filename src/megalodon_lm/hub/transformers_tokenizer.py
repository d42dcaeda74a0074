"""A tokenizer of transformers as one of ours, with its own begin and end tokens and its own form of chats."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from ..data.chat import Message
from ..data.subword import SubwordTokenizer
from ..data.token_text import without_halves
from ..errors import InputError


class TransformersTokenizer(SubwordTokenizer):
    """See Tokenizer and ChatTemplate.

    Args:
        theirs: of the library.
        name: for messages.

    Raises:
        InputError: one that the `tokenizers` library does not run, or without begin and end.
    """

    def __init__(self, theirs: Any, name: str | Path):
        backend = getattr(theirs, "backend_tokenizer", None)
        begin, end = theirs.bos_token or theirs.eos_token, theirs.eos_token or theirs.bos_token
        if backend is None or begin is None:
            what = "is not one of the tokenizers library" if backend is None else "has neither a begin nor an end token"
            raise InputError(f"the tokenizer of {name} {what}")
        begins = theirs.encode("a")[:1] == [theirs.convert_tokens_to_ids(begin)]
        super().__init__(backend.to_str().encode(), name, begin, end, begins)
        self._theirs, self._name = theirs, name

    def chat_template(self) -> str:
        """The form of chats, in Jinja.

        Raises:
            InputError: there is none.
        """
        try:
            return str(self._theirs.get_chat_template())
        except ValueError:
            raise InputError(
                f"the tokenizer of {self._name} has no chat template: the model knows no chats; ask it without one"
            ) from None

    def chat_text(self, messages: Sequence[Message], answer: bool) -> str:
        """A chat as a text with special tokens in it.

        Where the form has no place for the system's words, they are left out, as the harness's own class does.

        Args:
            messages: of the chat.
            answer: open an answer behind them; otherwise the last of them stays open.

        Raises:
            InputError: no form, or none for such a chat.
        """
        assert self.chat_template()
        form = partial(
            self._theirs.apply_chat_template,
            tokenize=False, add_generation_prompt=answer, continue_final_message=not answer,
        )  # fmt: skip
        turns = [message._asdict() for message in messages]
        try:
            return str(form(turns))
        except TemplateError:
            try:
                return str(form([turn for turn in turns if turn["role"] != "system"]))
            except TemplateError as error:
                raise InputError(f"the chat template of {self._name} refuses a chat: {error}") from None

    def encode_chat_text(self, text: str) -> np.ndarray:
        """The tokens of a text (L,) int64, with the special tokens that are spelt in it, and no others."""
        return np.array(self._theirs.encode(without_halves(text), add_special_tokens=False), np.int64)
