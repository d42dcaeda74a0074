"""megalodon chat"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from ..errors import InputError
from .conversation import Conversation, read_line

if TYPE_CHECKING:
    from concurrent.futures import Future

PLAIN = "was trained on plain text, not on chats: it writes on from what you type, and answers only as such text would"
UNKNOWN = "does not tell whether it was trained on chats; if it was, --roles yes talks with it as it was taught"


@dataclass
class Chat:
    """Talk with a model in the terminal; its context is never cut.

    A model that was trained on chats is talked with in messages; of any other one, what you type is read as it stands,
    and the model writes on until it writes a stop string. Lines that begin with / are commands; /help lists them.
    Ctrl-C ends an answer, or clears the line.
    """

    model: Positional[Path]
    """A run folder or a saved model."""
    state: Path | None = None
    """A bookmark to talk about."""
    system: str = ""
    """Read before everything else: a message of the role system, or text with an empty line behind it."""
    roles: Literal["auto", "yes", "no"] = "auto"
    """Talk in messages of a user and an assistant, as in chats that megalodon prepare --chats made: what you type is a
    whole message, and --before, --after and --stop are not used; auto does so where a model was trained on chats."""
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
    top_k: int = 0
    """Draw from the k most likely tokens; 0 for all."""
    top_p: float = 0.95
    """Draw from the most likely tokens that together hold this probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this fraction of the most likely one."""
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
        from concurrent.futures import ThreadPoolExecutor

        from .progress import console

        with console.status(f"loading {self.model} ..."):
            conversation = self._begin()
        console.print("/help lists the commands; /save FILE keeps the conversation")
        with ThreadPoolExecutor(1) as thread:  # so that the first answer does not wait for what typing leaves time for
            warm = thread.submit(conversation.generator.warm_up) if sys.stdin.isatty() else None
            self._talk(conversation, warm)

    def _begin(self) -> Conversation:
        from ..generation.generator import Generator
        from ..generation.sampling import Sampling
        from ..training.run_record import learnt_chats
        from .models import load_trained
        from .progress import console

        learnt = learnt_chats(self.model)
        roles = bool(learnt) if self.roles == "auto" else self.roles == "yes"
        sampling = Sampling(
            self.max_tokens, self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
            () if roles else self.stop, self.seed,
        )  # fmt: skip
        model, tokenizer = load_trained(self.model, self.device)
        if not learnt and self.roles != "no":
            console.print(f"{self.model} {PLAIN if learnt is False else UNKNOWN}")
        return Conversation(Generator(model, tokenizer, self.precision), sampling, self.state, roles, self.system)

    def _talk(self, conversation: Conversation, warm: "Future[None] | None") -> None:
        """Take lines until the input ends; nothing that a line brings about loses the conversation.

        Args:
            conversation: to go on with.
            warm: waited for before the first answer.
        """
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # a byte that is no text shall not end it
        cleared = False
        while True:
            try:
                line = read_line()
            except KeyboardInterrupt:
                if cleared or not sys.stdin.isatty():
                    raise
                cleared = True
                print("\nCtrl-C again leaves, without keeping the conversation; /save FILE keeps it", file=sys.stderr)
                continue
            cleared = False
            if line is None or line.strip() == "/quit":
                return
            try:
                if line.startswith("/"):
                    print(conversation.command(line), flush=True)
                elif text := line.strip():
                    if warm is not None:
                        first, warm = warm, None
                        first.result()
                    conversation.turn(text if conversation.roles else self.before + text + self.after)
            except BrokenPipeError:
                raise
            except (InputError, OSError, MemoryError) as error:
                print(" ".join(str(error).split()) or "not enough memory", file=sys.stderr)
            except KeyboardInterrupt:
                print("interrupted; the conversation is as it was before this line", file=sys.stderr)
