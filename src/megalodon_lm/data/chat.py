"""Chats as tokens: messages of roles, with those tokens marked that are an answer, on which alone the loss counts.

A chat is the begin token and, for each message, its role, a line break, its content and the end token. The end token
cannot be written in a text, so nothing inside a message can pass for another one, and no tokenizer needs new tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..errors import InputError
from .tokenizer import Tokenizer

ANSWERS = "assistant"
"""The role whose messages are learnt."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + '\\n' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + ANSWERS + "\\n' }}{% endif %}"
)
"""The form of a chat in Jinja, for other programs."""


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@runtime_checkable
class ChatTemplate(Protocol):
    """A tokenizer of another program with a form of chats of its own, of special tokens that texts can spell."""

    def chat_template(self) -> str:
        """The form, in Jinja."""

    def chat_text(self, messages: Sequence[Message], answer: bool) -> str:
        """A chat as a text; open an answer behind it, or else leave the last message open."""

    def encode_chat_text(self, text: str) -> np.ndarray:
        """The tokens (L,) int64 of such a text."""


def messages_of(value: Any) -> list[Message]:
    """The messages of a value read from JSON: a list of objects with the strings `role` and `content`.

    Raises:
        InputError: of another form, or without any message; in a few words.
    """
    if not isinstance(value, list) or not value:
        raise InputError("no list of messages")
    found = []
    for message in value:
        role, content = (message.get(key) if isinstance(message, dict) else None for key in Message._fields)
        if not isinstance(role, str) or not isinstance(content, str) or not role or "\n" in role:
            raise InputError("a message without role or content")
        found.append(Message(role, content))
    return found


def encode_opening(role: str, tokenizer: Tokenizer) -> np.ndarray:
    """What stands before the content of a message: tokens (L,) int64."""
    return tokenizer.encode(f"{role}\n")


def encode_message(message: Message, tokenizer: Tokenizer) -> np.ndarray:
    """A whole message with its end token: tokens (L,) int64."""
    content = tokenizer.encode(message.content)
    return np.concatenate([encode_opening(message.role, tokenizer), content, [tokenizer.end]])


def encode_chat(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """A chat.

    Returns:
        Tokens (L,) int64 from the begin token on, and which of them are answers (L,) bool: the content of the messages
        of the role `assistant`, and the end token behind it.
    """
    tokens, answers = [np.array([tokenizer.begin])], [np.zeros(1, np.bool_)]
    for message in messages:
        whole = encode_message(message, tokenizer)
        opening = len(encode_opening(message.role, tokenizer))
        tokens.append(whole)
        answers.append((np.arange(len(whole)) >= opening) & (message.role == ANSWERS))
    return np.concatenate(tokens), np.concatenate(answers)
