"""megalodon generate"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from ..errors import InputError
from .options import Quiet

if TYPE_CHECKING:
    from ..generation.context import Context
    from ..generation.generator import Generator
    from ..generation.sampling import Sampling

MOST_SAMPLES = 10_000


@dataclass
class Generate(Quiet):
    """Continue a text, printed as it is written.

    The text may be of any length: it is read in pieces, in constant memory. It is what a bookmark holds (`--state`),
    then a file, then the prompt; only the prompt is printed again.
    """

    model: Positional[Path]
    """A run folder or a saved model."""
    prompt: str = ""
    """The text to continue."""
    prompt_file: Path | None = None
    """Read this file before the prompt, as megalodon read does; - for standard input."""
    state: Path | None = None
    """A bookmark to continue from; it stays as it is."""
    save: Path | None = None
    """Save all that was read and written as a bookmark; with several samples, one for each: NAME.1.state, ..."""
    samples: int = 1
    """Continuations of the same text, with seeds that follow each other."""
    max_tokens: int = 500
    """Tokens to write; fewer if the text ends before."""
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
    stop: tuple[str, ...] = ()
    """Stop before any of these strings."""
    json: bool = False
    """Print JSON at the end: of each sample its text, tokens, their log-probabilities by the model in nats (before
    temperature and limits), why it ended (length, stop, end), and its seed."""
    seed: int = 0
    """The same seed gives the same text."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of matrix products; auto takes bf16 where the device multiplies it natively."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        from ..data.corpus import Texts
        from ..files import BOOKMARK, check_writable
        from ..generation.generator import Generator
        from ..generation.sampling import Sampling
        from ..ops.device import check_memory
        from .models import load_trained

        if not 1 <= self.samples <= MOST_SAMPLES:
            raise InputError(f"--samples {self.samples} must be at least 1 and at most {MOST_SAMPLES:,}")
        sampling = Sampling(
            self.max_tokens, self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
            self.stop, self.seed,
        )  # fmt: skip
        for path in self._bookmarks():
            check_writable(path, BOOKMARK)
        model, tokenizer = load_trained(self.model, self.device)
        check_memory(model.state_bytes(self.samples), self.device, "these samples", "lower --samples")
        generator = Generator(model, tokenizer, self.precision)
        context = generator.context(self.state)
        if self.prompt_file is not None:
            generator.read(Texts([self.prompt_file], "once"), context)
        generator.read(os.fsencode(self.prompt), context)  # the bytes that were typed
        contexts = [context.fork() for _ in range(self.samples)]
        seeds = [self.seed + number for number in range(self.samples)]
        if self.json:
            self._print_json(generator, contexts, sampling, seeds)
        elif self.samples == 1:
            sys.stdout.write(self.prompt)
            for delta in generator.stream(contexts, sampling):
                sys.stdout.write(delta.text)
                sys.stdout.flush()
            print()
        else:
            for seed, text in zip(seeds, generator.write(contexts, sampling, seeds), strict=True):
                print(f"--- seed {seed}\n{self.prompt}{text}")
        for path, grown in zip(self._bookmarks(), contexts, strict=False):
            grown.save(path, tokenizer)

    def _print_json(
        self, generator: "Generator", contexts: "list[Context]", sampling: "Sampling", seeds: list[int]
    ) -> None:
        import json

        found: list[dict[str, Any]] = [
            {"seed": seed, "text": "", "tokens": [], "logprobs": [], "finish_reason": "length"} for seed in seeds
        ]
        for delta in generator.stream(contexts, sampling, seeds, logprobs=True):
            row = found[delta.row]
            row["text"] += delta.text
            row["tokens"].append(delta.token)
            row["logprobs"].append(delta.logprob)
            row["finish_reason"] = delta.finish_reason
        try:
            print(json.dumps({"prompt": self.prompt, "samples": found}, indent=2, allow_nan=False))
        except ValueError:
            raise InputError(f"a log-probability is not finite; the weights in {self.model} are damaged") from None

    def _bookmarks(self) -> list[Path]:
        """Where to save each continuation."""
        if self.save is None or self.samples == 1:
            return [self.save] if self.save else []
        return [
            self.save.parent / f"{self.save.stem}.{number}{self.save.suffix}" for number in range(1, self.samples + 1)
        ]
