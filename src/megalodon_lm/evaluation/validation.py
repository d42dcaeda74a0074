"""Measuring a model while it trains."""

from itertools import islice
from pathlib import Path

import torch

from ..data.corpus import blocks, find_documents, size
from ..data.tokenizer import Tokenizer
from ..generation.stream import generate
from ..model.decoder import Megalodon
from ..training.precision import Precision
from .perplexity import score

SAMPLE_TOKENS = 200


class Validation:
    """Bits per byte of the validation text, read in one context; and a sample, if there is a prompt.

    Args:
        sources: validation texts, see find_documents.
        num_bytes: to measure on; 0 for all.
        tokenizer: of the model.
        precision: of matrix products.
        prompt: beginning of the sample; empty for none.
        samples: file that samples are appended to.
    """

    def __init__(
        self,
        sources: list[str],
        num_bytes: int,
        tokenizer: Tokenizer,
        precision: Precision,
        prompt: str = "",
        samples: Path | None = None,
    ):
        self.documents = list(find_documents(sources).values())
        self.num_bytes = min(num_bytes or sum(map(size, self.documents)), sum(map(size, self.documents)))
        self.tokenizer, self.precision, self.prompt, self.samples = tokenizer, precision, prompt, samples

    def __call__(self, model: Megalodon) -> float:
        """Bits per byte; the model is in evaluation mode."""
        text = self.tokenizer.encode_blocks(_first(self.documents, self.num_bytes))
        losses = score(model, text, self.tokenizer.begin, precision=self.precision)
        if self.prompt and self.samples is not None:
            with self.samples.open("a", encoding="utf-8") as file:
                file.write(f"{losses.bits_per_byte(self.num_bytes):.4f} bits per byte\n{self._sample(model)}\n\n")
        return losses.bits_per_byte(self.num_bytes)

    def _sample(self, model: Megalodon) -> str:
        device = next(model.parameters()).device
        tokens = torch.from_numpy(self.tokenizer.encode(self.prompt, begin=True))[None].to(device)
        random = torch.get_rng_state()
        written = generate(model, tokens, SAMPLE_TOKENS, temperature=0.8, top_p=0.95, precision=self.precision)
        text = self.prompt + self.tokenizer.decode([int(t) for t in islice(written, SAMPLE_TOKENS)])
        torch.set_rng_state(random)  # what is trained does not depend on whether samples are drawn
        return text


def _first(documents: list[Path | bytes], num_bytes: int):  # type: ignore[no-untyped-def]
    for block in blocks(documents):
        yield block[:num_bytes]
        num_bytes -= len(block)
        if num_bytes <= 0:
            return
