"""Measuring a model while it trains."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from ..data.batches import Stream
from ..data.corpus import blocks, find_documents, size
from ..data.mixture import load_mixture
from ..data.shards import is_prepared
from ..data.tokenizer import Tokenizer
from ..generation.stream import generate
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
        length = min(LENGTH, len(self.prepared.sequences[0]) - 1)
        stream = Stream(self.prepared, 1, length)
        device = next(model.parameters()).device
        place, state, nats, seen, read = stream.begin(), None, 0.0, 0, 0
        while read < len(self.prepared.sequences[0]) and not (self.num_bytes and seen >= self.num_bytes):
            batch = stream.read(place)
            place, targets = batch.place, batch.targets.to(device)
            with autocast(choose_precision(self.precision, device), device):
                hidden, state = model.features(batch.inputs.to(device), state, document_starts=batch.starts)
                losses = token_losses(hidden, model.output.output.weight, targets)
            counts = torch.ones_like(targets, dtype=torch.bool) if batch.learnt is None else batch.learnt.to(device)
            counts &= torch.arange(read + 1, read + 1 + length, device=device) < len(self.prepared.sequences[0])
            counts &= targets != self.tokenizer.begin
            nats += losses[counts].double().sum().item()
            seen += len(self.tokenizer.decode_bytes(targets[counts].tolist()))
            read += length
        return nats / LOG2 / max(1, seen)

    def _sample(self, model: Megalodon) -> str:
        device = next(model.parameters()).device
        tokens = torch.from_numpy(self.tokenizer.encode(self.prompt, begin=True))[None].to(device)
        random = torch.get_rng_state()
        written = generate(model, tokens, SAMPLE_TOKENS, temperature=0.8, top_p=0.95, precision=self.precision)
        text = self.prompt + self.tokenizer.decode([int(t) for t in islice(written, SAMPLE_TOKENS)])
        torch.set_rng_state(random)  # what is trained does not depend on whether samples are drawn
        return text


def _first(documents: list[Path | bytes], num_bytes: int) -> Iterator[bytes]:
    for block in blocks(documents):
        yield block[:num_bytes]
        num_bytes -= len(block)
        if num_bytes <= 0:
            return
