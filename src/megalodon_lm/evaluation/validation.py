"""Measuring a model while it trains."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ..data.corpus import Texts
from ..data.mixture import load_mixture
from ..data.shards import is_prepared
from ..data.tokenizer import Tokenizer
from ..errors import InputError
from ..generation.generator import Generator
from ..generation.sampling import Sampling
from ..generation.scoring import token_losses
from ..model.language_model import LanguageModel
from ..training.precision import Precision
from .perplexity import LOG2, score_texts

SAMPLE_TOKENS = 200
LENGTH = 4096  # tokens read at a time


class Validation:
    """Bits per byte of the validation text; and a sample, if there is a prompt.

    Each document is a context of its own. Of chats only the answers count.

    Of ranks that share weights, all measure and write a sample together, and one keeps it.

    Args:
        sources: validation texts, see Texts; or one prepared folder.
        num_bytes: to measure on, about; 0 for all.
        tokenizer: of the model.
        precision: of matrix products.
        prompt: beginning of the sample; empty for none.
        samples: file that samples are appended to; None keeps none.
        writer: of the sample, where it is not the model that is measured, such as one process of several.
    """

    def __init__(
        self,
        sources: list[str],
        num_bytes: int,
        tokenizer: Tokenizer,
        precision: Precision,
        prompt: str = "",
        samples: Path | None = None,
        writer: LanguageModel | None = None,
    ):
        self.prepared = (
            load_mixture(sources, [], tokenizer, 0) if len(sources) == 1 and is_prepared(sources[0]) else None
        )
        self.texts = None if self.prepared else Texts(sources)
        self.num_bytes = num_bytes
        self.tokenizer, self.precision = tokenizer, precision
        self.prompt, self.samples, self.writer = prompt, samples, writer

    def __call__(self, model: LanguageModel) -> float:
        """Bits per byte; the model is in evaluation mode.

        Raises:
            InputError: the file of samples cannot be written.
        """
        if self.texts is None:
            result = self._of_prepared(model)
        else:
            losses = score_texts(model, beginning(self.texts, self.num_bytes), self.tokenizer, precision=self.precision)
            result = losses.bits_per_byte(losses.num_bytes)
        if self.prompt:
            sample = self._sample(self.writer or model)
            if self.samples is not None:
                try:
                    with self.samples.open("a", encoding="utf-8") as file:
                        file.write(f"{result:.4f} bits per byte\n{sample}\n\n")
                except OSError as error:
                    raise InputError(f"cannot write {self.samples}: {error.strerror}") from None
        return result

    @torch.inference_mode()
    def _of_prepared(self, model: LanguageModel) -> float:
        assert self.prepared is not None
        sequence = self.prepared.sequences[0]
        decode = self.tokenizer.decoder()
        state, nats, seen = None, 0.0, 0
        for at in range(0, len(sequence) - 1, LENGTH):
            tokens, starts, learnt = sequence.read(at, min(LENGTH, len(sequence) - 1 - at) + 1)
            inputs, targets = (torch.from_numpy(part)[None] for part in (tokens[:-1], tokens[1:]))
            documents = torch.from_numpy(starts[:-1])[None] if starts[:-1].any() else None
            losses, state = token_losses(model, inputs, targets, state, self.precision, documents)
            counts = learnt[1:] & ~starts[1:]
            nats += losses[0, torch.from_numpy(counts)].sum().item()
            for token in tokens[1:][counts | starts[1:]].tolist():  # at a start, a text begins anew
                seen += len(decode(token))
            if self.num_bytes and seen >= self.num_bytes:
                break
        return nats / LOG2 / max(1, seen)

    def _sample(self, model: LanguageModel) -> str:
        generator = Generator(model, self.tokenizer, self.precision)
        sampling = Sampling(SAMPLE_TOKENS, temperature=0.8, top_p=0.95)
        return self.prompt + generator.write([generator.read(self.prompt)], sampling)[0]


def beginning(texts: Texts, num_bytes: int) -> Iterator[Iterator[bytes]]:
    """As many documents as it takes for so many bytes, the last one cut; of 0 bytes, all."""
    if not num_bytes:
        yield from (text.blocks for text in texts)
        return
    left = num_bytes

    def begun(blocks: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal left
        for block in blocks:
            yield block[:left]
            left -= len(block)
            if left <= 0:
                return

    for text in texts:
        yield begun(text.blocks)
        if left <= 0:
            return
