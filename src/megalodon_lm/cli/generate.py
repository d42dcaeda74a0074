"""megalodon generate"""

import sys
from codecs import getincrementaldecoder
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional


@dataclass
class Generate:
    """Continue a text, printed as it is written.

    The prompt may be of any length: it is read in pieces, in constant memory.
    """

    model: Positional[Path]
    """A run folder or a saved model."""
    prompt: str = ""
    """The text to continue."""
    prompt_file: Path | None = None
    """Take the prompt from a file; - for standard input."""
    max_tokens: int = 500
    """Tokens to write."""
    temperature: float = 0.8
    """0 takes the most likely token each time; higher is wilder."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0 for all."""
    top_p: float = 0.95
    """Draw from the most likely tokens that together hold this probability."""
    seed: int = 0
    """The same seed gives the same text."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of matrix products; auto takes bf16 where the device multiplies it natively."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        import torch

        from ..data.corpus import read_text
        from ..data.tokenizer import ByteTokenizer
        from ..generation.stream import generate
        from .models import load_trained

        if self.max_tokens < 0:
            raise ValueError(f"--max-tokens {self.max_tokens} must be at least 0")
        prompt = self.prompt.encode()
        if self.prompt_file is not None:
            prompt = sys.stdin.buffer.read() if str(self.prompt_file) == "-" else read_text(self.prompt_file)
        model, tokenizer = load_trained(self.model, self.device), ByteTokenizer()
        tokens = torch.from_numpy(tokenizer.encode(prompt, begin=True))[None].to(self.device)
        sys.stdout.write(prompt.decode("utf-8", errors="replace"))
        decoder = getincrementaldecoder("utf-8")("replace")
        sampling = (self.temperature, self.top_k, self.top_p, self.seed)
        for token in generate(model, tokens, self.max_tokens, None, *sampling, self.precision):
            if int(token) == tokenizer.end:
                break
            sys.stdout.write(decoder.decode(tokenizer.decode_bytes([int(token)])))
            sys.stdout.flush()
        print(decoder.decode(b"", True))
