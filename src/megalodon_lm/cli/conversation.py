"""What a chat is made of: turns that are whole or not at all, and commands that begin with /."""

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, nearest

if TYPE_CHECKING:
    from ..generation.generator import Generator
    from ..generation.sampling import Sampling

COMMANDS = {
    "/save FILE": "keep the conversation as a bookmark",
    "/load NAME": "go on from a fork, or from a bookmark file",
    "/fork NAME": "remember this point of the conversation under a name",
    "/stats": "tokens read, speed, size",
    "/help": "these lines",
    "/quit": "leave; so does the end of input",
}
"""A line that begins with a space is text, whatever follows."""


class Conversation:
    """A context that grows by turns. One that fails leaves it as it was.

    Args:
        generator: of the model.
        sampling: of the answers.
        state: a bookmark to begin from.
        roles: whether turns are messages of a user and an assistant, or text as it stands.
        system: read before everything else, if there is any.

    Raises:
        InputError: the bookmark cannot be used.
    """

    def __init__(
        self, generator: "Generator", sampling: "Sampling", state: Path | None = None, roles: bool = False,
        system: str = "",
    ):  # fmt: skip
        self.generator, self.sampling, self.roles = generator, sampling, roles
        self.context = generator.context(state)
        if system and roles:
            self._message("system", system)
        elif system:
            generator.read(f"{system}\n\n", self.context)
        self.forks = {"start": self.context.fork()}
        self.answers, self.speed = 0, 0.0

    def turn(self, text: str) -> None:
        """Read what the user said and answer. Ctrl-C ends the answer; while the text is read, it takes the turn back.

        Args:
            text: the content of a message, or all of the text, with what stands around it.
        """
        before = self.context.fork()
        try:
            if self.roles:
                self._message("user", text)
                self._open_answer()
            else:
                self.generator.read(text, self.context)
            self._answer()
        except BaseException:
            self.context = before
            raise

    def _message(self, role: str, content: str) -> None:
        from ..data.chat import Message, encode_message

        self.context.read(encode_message(Message(role, content), self.generator.tokenizer))

    def _open_answer(self) -> None:
        from ..data.chat import ANSWERS, encode_opening

        self.context.read(encode_opening(ANSWERS, self.generator.tokenizer))

    def _answer(self) -> None:
        import numpy as np

        from .progress import console

        began, count = time.perf_counter(), 0
        seed = self.sampling.seed + self.context.position
        answer = self.generator.stream([self.context], self.sampling, [seed], fresh=self.roles)
        try:
            if self.answers:
                delta = next(answer, None)
            else:
                with console.status("the first answer loads the compiled kernels, or compiles them once ..."):
                    delta = next(answer, None)
            while delta is not None:
                sys.stdout.write(delta.text)
                sys.stdout.flush()
                count += 1
                delta = next(answer, None)
        except KeyboardInterrupt:
            answer.close()
        if self.roles:
            self.context.read(np.array([self.generator.tokenizer.end]))
        self.answers += 1
        self.speed = count / (time.perf_counter() - began)
        print(flush=True)

    def command(self, line: str) -> str:
        """Carry out a line that begins with / and tell what was done.

        Raises:
            InputError: it cannot be done.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/save", "/load", "/fork") and not (rest and rest.isprintable()):
            raise InputError(f"{name} needs a name; /help lists the commands")
        if name == "/save":
            return self._save(Path(rest).expanduser())
        if name == "/load":
            path = Path(rest).expanduser()
            self.context = self.forks[rest].fork() if rest in self.forks else self.generator.context(path)
            return f"at {self.context.position:,} tokens"
        if name == "/fork":
            self.forks[rest] = self.context.fork()
            return f"/load {rest} comes back here; forks: {', '.join(self.forks)}"
        if name == "/stats":
            return (
                f"{self.context.position:,} tokens read, {self.context.loss() or 0:.3f} nats a token; state of "
                f"{self.context.nbytes / 1e6:.1f} MB; the last answer came at {self.speed:,.0f} tokens a second"
            )
        if name == "/help":
            lines = [f"{usage:<12} {what}" for usage, what in COMMANDS.items()]
            return "\n".join([*lines, "a line that begins with a space is text, whatever follows"])
        hint = nearest(name, (usage.split()[0] for usage in COMMANDS))
        raise InputError(f"no command {name}{hint}; /help lists the commands")

    def _save(self, path: Path) -> str:
        from ..files import BOOKMARK, check_writable

        check_writable(path, BOOKMARK)
        self.context.save(path, self.generator.tokenizer)
        return f"saved {self.context.position:,} tokens in {path}"


def read_line() -> str | None:
    """A line of input, without the line break; None at its end."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  so that lines can be edited
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
