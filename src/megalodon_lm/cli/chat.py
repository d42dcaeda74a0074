"""megalodon chat"""

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from ..errors import InputError

if TYPE_CHECKING:
    from ..generation.generator import Generator
    from ..generation.sampling import Sampling

COMMANDS = """/save FILE   keep the conversation as a bookmark
/load NAME   go on from a fork, or from a bookmark file
/fork NAME   remember this point of the conversation under a name
/stats       tokens read, speed, size
/help        these lines
/quit        leave; so does the end of input"""


@dataclass
class Chat:
    """Talk with a model in the terminal; its context is never cut.

    What you type is read by the model as it stands, and the model writes on until it writes a stop string. A model that
    was trained on chats wants --roles. Lines that begin with / are commands; /help lists them.
    """

    model: Positional[Path]
    """A run folder or a saved model."""
    state: Path | None = None
    """A bookmark to talk about."""
    roles: bool = False
    """Talk in messages of a user and an assistant, as in chats that megalodon prepare --chats made; what you type is a
    whole message, and --before, --after and --stop are not used."""
    before: str = ""
    """Put before what you type, such as "User: "."""
    after: str = "\n"
    """Put behind it, such as a line break and "Assistant: "."""
    stop: tuple[str, ...] = ("\n\n",)
    """Strings that end an answer; the model reads them as part of it."""
    max_tokens: int = 300
    """Longest answer."""
    temperature: float = 0.8
    """0 takes the most likely token each time; higher is wilder."""
    top_p: float = 0.95
    """Draw from the most likely tokens that together hold this probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already written become less likely."""
    seed: int = 0
    """The same seed and the same conversation give the same answers."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of matrix products; auto takes bf16 where the device multiplies it natively."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        from ..generation.generator import Generator
        from ..generation.sampling import Sampling
        from .models import load_trained

        sampling = Sampling(
            self.max_tokens, self.temperature, top_p=self.top_p, repetition_penalty=self.repetition_penalty,
            stop=() if self.roles else self.stop, seed=self.seed,
        )  # fmt: skip
        model, tokenizer = load_trained(self.model, self.device)
        conversation = _Conversation(Generator(model, tokenizer, self.precision), sampling, self.state)
        print("/help lists the commands", file=sys.stderr)
        while (line := _ask()) is not None:
            if line.startswith("/"):
                if line.split()[0] == "/quit":
                    return
                try:
                    print(conversation.command(line))
                except ValueError as error:
                    print(error, file=sys.stderr)
            elif line and self.roles:
                conversation.ask(line)
            elif line:
                conversation.say(self.before + line + self.after)


def _ask() -> str | None:
    """A line of input; None at its end."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  so that lines can be edited
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


class _Conversation:
    def __init__(self, generator: "Generator", sampling: "Sampling", state: Path | None):
        self.generator, self.sampling = generator, sampling
        self.context = generator.context(state)
        self.forks = {"start": self.context.fork()}
        self.speed = 0.0

    def say(self, text: str) -> None:
        """Read what the user said and answer. Ctrl-C ends the answer, not the conversation."""
        self.generator.read(text, self.context)
        self._answer()

    def ask(self, text: str) -> None:
        """The same in messages of roles."""
        import numpy as np

        from ..data.chat import ANSWERS, Message, encode_message, encode_opening

        tokenizer = self.generator.tokenizer
        self.context.read(encode_message(Message("user", text), tokenizer))
        self.context.read(encode_opening(ANSWERS, tokenizer))
        self._answer(fresh=True)
        self.context.read(np.array([tokenizer.end]))

    def _answer(self, fresh: bool = False) -> None:
        began, count = time.perf_counter(), 0
        seed = self.sampling.seed + self.context.position
        answer = self.generator.stream([self.context], self.sampling, [seed], fresh=fresh)
        try:
            for piece in answer:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                count += 1
        except KeyboardInterrupt:
            answer.close()
        self.speed = count / (time.perf_counter() - began)
        print()

    def command(self, line: str) -> str:
        """Carry out a line that begins with / and tell what was done.

        Raises:
            InputError: it cannot be done.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/save", "/load", "/fork") and not rest:
            raise InputError(f"{name} needs a name; /help lists the commands")
        if name == "/save":
            self.context.save(rest, self.generator.tokenizer)
            return f"saved {self.context.position:,} tokens in {rest}"
        if name == "/fork":
            self.forks[rest] = self.context.fork()
            return f"/load {rest} comes back here; forks: {', '.join(self.forks)}"
        if name == "/load":
            self.context = self.forks[rest].fork() if rest in self.forks else self.generator.context(Path(rest))
            return f"at {self.context.position:,} tokens"
        if name == "/stats":
            return (
                f"{self.context.position:,} tokens read, {self.context.loss():.3f} nats a token; state of "
                f"{self.context.nbytes / 1e6:.1f} MB; the last answer came at {self.speed:,.0f} tokens a second"
            )
        if name == "/help":
            return COMMANDS
        raise InputError(f"no command {name}; /help lists the commands")
