"""Measuring a model while it trains."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ..data.corpus import blocks, find_documents, size
from ..data.mixture import load_mixture
from ..data.shards import is_prepared
from ..data.tokenizer import Tokenizer
from ..generation.generator import Generator
from ..generation.sampling import Sampling
from ..model.decoder import Megalodon
from ..training.loss import token_losses
from ..training.precision import Precision, autocast, choose_precision
from .perplexity import LOG2, score

SAMPLE_TOKENS = 200
LENGTH = 4096  # tokens read at a time


class Validation:
    """Bits per byte of the validation text, read in one context; and a sample, if there is a prompt.

    Of a prepared folder each document is a context of its own, and of chats only the answers count.

    Args:
        sources: validation texts, see find_documents; or one prepared folder.
        num_bytes: to measure on, about; 0 for all.
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
        self.prepared = (
            load_mixture(sources, [], tokenizer, 0) if len(sources) == 1 and is_prepared(sources[0]) else None
        )
        self.documents = [] if self.prepared else list(find_documents(sources).values())
        total = sum(map(size, self.documents))
        self.num_bytes = num_bytes if self.prepared else min(num_bytes or total, total)
        self.tokenizer, self.precision, self.prompt, self.samples = tokenizer, precision, prompt, samples

    def __call__(self, model: Megalodon) -> float:
        """Bits per byte; the model is in evaluation mode."""
        if self.prepared:
            result = self._of_prepared(model)
        else:
            text = self.tokenizer.encode_blocks(_first(self.documents, self.num_bytes))
            losses = score(model, text, self.tokenizer.begin, precision=self.precision)
            result = losses.bits_per_byte(self.num_bytes)
        if self.prompt and self.samples is not None:
            with self.samples.open("a", encoding="utf-8") as file:
                file.write(f"{result:.4f} bits per byte\n{self._sample(model)}\n\n")
        return result

    @torch.inference_mode()
    def _of_prepared(self, model: Megalodon) -> float:
        assert self.prepared is not None
        sequence = self.prepared.sequences[0]
        device = next(model.parameters()).device
        decode = self.tokenizer.decoder()
        state, nats, seen = None, 0.0, 0
        for at in range(0, len(sequence) - 1, LENGTH):
            tokens, starts, learnt = sequence.read(at, min(LENGTH, len(sequence) - 1 - at) + 1)
            inputs, targets = (torch.from_numpy(part)[None].to(device) for part in (tokens[:-1], tokens[1:]))
            with autocast(choose_precision(self.precision, device), device):
                documents = torch.from_numpy(starts[:-1])[None]
                hidden, state = model.features(inputs, state, document_starts=documents if documents.any() else None)
                losses = token_losses(hidden, model.output.output.weight, targets)[0]
            counts = learnt[1:] & ~starts[1:]
            nats += losses[torch.from_numpy(counts).to(device)].double().sum().item()
            for token in tokens[1:][counts | starts[1:]].tolist():  # at a start, a text begins anew
                seen += len(decode(token))
            if self.num_bytes and seen >= self.num_bytes:
                break
        return nats / LOG2 / max(1, seen)

    def _sample(self, model: Megalodon) -> str:
        generator = Generator(model, self.tokenizer, self.precision)
        sampling = Sampling(SAMPLE_TOKENS, temperature=0.8, top_p=0.95)
        return self.prompt + generator.write([generator.read(self.prompt)], sampling)[0]


def _first(documents: list[Path | bytes], num_bytes: int) -> Iterator[bytes]:
    for block in blocks(documents):
        yield block[:num_bytes]
        num_bytes -= len(block)
        if num_bytes <= 0:
            return
