"""Training and reading with an encoder beside PyTorch's own Transformer encoder of as many parameters.

    python benchmarks/encoders.py --json encoders.json

Both take one sequence of numbers and give ten logits. The Transformer is `torch.nn.TransformerEncoder` as its makers
advise: norm first, GELU, batch first, PyTorch's fused attention, as deep as ours; reading, it takes its fast path, and
in bf16 the faster of weights in bf16 and autocast. They take turns, and the ratio of each round counts: its median,
smallest and largest.
"""

import json
import time
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from megalodon_lm import Encoder, EncoderConfig
from megalodon_lm.files import write_atomically
from megalodon_lm.pairs import alternate, rate_ratio
from megalodon_lm.training.machine import describe

HEADS = 4


@dataclass
class Encoders:
    """See the head of the file."""

    size: str = "encoder_small"
    """A named size."""
    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 16384])
    """Steps of the sequence."""
    chunk_size: int = 128
    """Steps in an attention chunk of ours; 0 for one of all steps."""
    types: list[str] = field(default_factory=lambda: ["float32", "bf16"])
    """float32, or bf16 for products by autocast."""
    rounds: int = 5
    """Of each length."""
    json: Path | None = None
    """File for the figures."""

    def run(self) -> None:
        """Time all, and show them."""
        ours = Encoder(EncoderConfig.named(self.size, input="numbers", chunk_size=self.chunk_size))
        theirs = Transformer.like(ours, max(self.lengths))
        sizes = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
        found: dict[str, Any] = {"machine": describe("float32", torch.device("cpu")), "parameters": sizes, "rows": []}
        table = Table("", "type", "steps", "ours, steps/s", "Transformer, steps/s", "ratio")
        for work in ("training", "reading"):
            for name in self.types:
                for length in self.lengths:
                    row = {"work": work, "type": name, "length": length, **self._pair(ours, theirs, work, name, length)}
                    found["rows"].append(row)
                    low, middle, high = row["ratio"]
                    table.add_row(
                        work, name, f"{length:,}", f"{row['ours']:,.0f}", f"{row['theirs']:,.0f}",
                        f"{middle:.2f} ({low:.2f} to {high:.2f})",
                    )  # fmt: skip
                    if self.json:
                        write_atomically(self.json, json.dumps(found, indent=2) + "\n")
        machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
        Console().print(f"{machine}; parameters: ours {sizes[0]:,}, Transformer {sizes[1]:,}")
        Console().print(table)

    def _pair(self, ours: Encoder, theirs: nn.Module, work: str, name: str, length: int) -> dict[str, Any]:
        numbers = torch.randn(1, length, generator=torch.Generator().manual_seed(0))
        forms = [theirs, deepcopy(theirs).bfloat16()] if (work, name) == ("reading", "bf16") else [theirs]
        own, *others = (partial(timed, model, work, name, numbers) for model in (ours, *forms))
        for timer in (own, *others):
            timer()
        seconds = alternate([own, min(others, key=lambda timer: timer())], self.rounds)
        ratio = rate_ratio(*seconds)
        rates = [length / median(times) for times in seconds]
        return {"ours": rates[0], "theirs": rates[1], "ratio": [ratio.low, ratio.median, ratio.high]}


class Transformer(nn.Module):
    """Numbers with the vectors of their places through PyTorch's encoder; the mean of all steps is classified.

    Args:
        depth: layers.
        width: of the stream.
        inner: width inside the feed-forward network.
        longest: positions.
        classes: to tell apart.
    """

    def __init__(self, depth: int, width: int, inner: int, longest: int, classes: int):
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.register_buffer("places", torch.randn(longest, width) / width**0.5)  # no parameters: sizes are compared
        layer = nn.TransformerEncoderLayer(width, HEADS, inner, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    @classmethod
    def like(cls, model: Encoder, longest: int) -> "Transformer":
        """That of as many layers, and nearest to as many parameters, with a network of about four times the width."""
        config = model.config
        wanted = sum(p.numel() for p in model.parameters())

        def made(width: int, inner: int) -> "Transformer":
            return cls(config.num_layers, width, inner, longest, config.num_classes)

        def distance(width: int, inner: int) -> int:
            with torch.device("meta"):
                return abs(sum(p.numel() for p in made(width, inner).parameters()) - wanted)

        width = min(range(8, 1024, 4), key=lambda width: distance(width, 4 * width))
        return made(width, min(range(3 * width, 5 * width), key=lambda inner: distance(width, inner)))

    def forward(self, numbers: Tensor) -> Tensor:
        """Logits of numbers (B, L)."""
        places: Tensor = self.places[: numbers.shape[1]]  # type: ignore[index]
        x = self.embed(numbers[..., None]) + places
        logits: Tensor = self.head(self.layers(x).mean(1))
        return logits


def timed(model: nn.Module, work: str, name: str, numbers: Tensor) -> float:
    """Seconds of a pass forward and backward, or of one that reads."""
    model.train(work == "training")
    whole = next(model.parameters()).dtype == torch.bfloat16
    started = time.perf_counter()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16" and not whole),
        torch.inference_mode(work == "reading"),
    ):
        out = model(numbers.bfloat16() if whole else numbers)
        logits = out[0] if isinstance(out, tuple) else out
        if work == "training":
            nn.functional.cross_entropy(logits.float(), torch.tensor([3])).backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    tyro.cli(Encoders).run()
