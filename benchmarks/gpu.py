"""Training, reading and writing on a GPU, beside Llama of equal parameters, in one process and in turns.

python benchmarks/gpu.py [--sizes bench22M mega1.3B] [--json FILE]

Rounds alternate; a ratio is the median of the rounds' ratios of rates with the smallest and the largest. Beside each
rate stands the share of the GPU's own bf16 product rate that the model's operations come to.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.benchmark.peers import llama
from megalodon_lm.generation.engine import DecodingEngine

GPU = torch.device("cuda")
STEPS = 64  # tokens written in one run


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def product_rate() -> float:
    """Operations a second of a large bf16 product."""
    a, b = (torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * 8192**3 * 10 / seconds(lambda: [a @ b for _ in range(10)])


def works(size: str, length: int, batch: int) -> dict[str, dict[str, Callable[[], object]]]:
    """By measure and model: what is timed."""
    config = ModelConfig.named(size)
    torch.manual_seed(0)
    with GPU:
        ours, theirs = Megalodon(config), llama.build(config.num_parameters, config.vocab_size)
        tokens = torch.randint(config.vocab_size, (batch, length + 1))
        token = torch.zeros(1, 1, dtype=torch.int64)

    def train_ours():
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = ours(tokens[:, :-1], targets=tokens[:, 1:].contiguous())
        loss.backward()
        ours.zero_grad(set_to_none=True)

    def train_theirs():
        with torch.autocast("cuda", torch.bfloat16):
            loss = llama.loss(theirs, tokens[:, :-1])
        loss.backward()
        theirs.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def read_ours():
        with torch.autocast("cuda", torch.bfloat16):
            return ours(tokens[:1, :-1], logits_to_keep=1)

    @torch.inference_mode()
    def read_theirs():
        with torch.autocast("cuda", torch.bfloat16):
            return llama.prefill(theirs, tokens[:1, :-1])

    _, state = read_ours()
    with torch.inference_mode(), GPU:
        cache = llama.made_up_cache(theirs, "dynamic", length, STEPS, torch.bfloat16)

    def write_ours():
        decoder = DecodingEngine(ours, state, "bf16")
        step = token[:, 0]
        for _ in range(STEPS):
            step = decoder.step(step).argmax(-1)

    @torch.inference_mode()
    def write_theirs():
        step = token
        with torch.autocast("cuda", torch.bfloat16):
            for _ in range(STEPS):
                logits, _ = llama.step(theirs, step, cache)
                step = logits.argmax(-1, keepdim=True)
        llama.rewind(cache, STEPS)

    return {
        "training": {"megalodon": train_ours, "llama": train_theirs},
        "prefill": {"megalodon": read_ours, "llama": read_theirs},
        "decode": {"megalodon": write_ours, "llama": write_theirs},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["bench22M", "mega1.3B"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 32768])
    parser.add_argument("--tokens", type=int, default=32768, help="of a training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rate, records = product_rate(), []
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {rate / 1e12:.0f} TFLOP/s in bf16 products")
    for size in given.sizes:
        config = ModelConfig.named(size)
        for length in given.lengths:
            batch = max(1, given.tokens // length)
            for measure, models in works(size, length, batch).items():
                tokens = {"training": batch * length, "prefill": length, "decode": STEPS}[measure]
                try:
                    for work in models.values():
                        work(), work()
                    torch.cuda.reset_peak_memory_stats()
                    rounds = [
                        {name: tokens / seconds(work) for name, work in models.items()} for _ in range(given.rounds)
                    ]
                except torch.OutOfMemoryError:
                    print(f"{size:9} {measure:8} {length:6} out of memory")
                    continue
                ratios = sorted(r["megalodon"] / r["llama"] for r in rounds)
                ours = statistics.median(r["megalodon"] for r in rounds)
                share = ours * config.flops_per_token(backward=measure == "training") / rate
                records.append({
                    "size": size, "measure": measure, "length": length, "batch": batch, "tokens_per_second": ours,
                    "share_of_product_rate": share, "ratio_median": statistics.median(ratios), "ratio_low": ratios[0],
                    "ratio_high": ratios[-1], "device": torch.cuda.get_device_name(), "torch": torch.__version__,
                })  # fmt: skip
                print(
                    f"{size:9} {measure:8} {length:6} {ours:12,.0f} tokens/s, {100 * share:4.1f} % of products, "
                    f"{statistics.median(ratios):.2f} of llama ({ratios[0]:.2f} - {ratios[-1]:.2f})",
                    flush=True,
                )
                if given.json:
                    given.json.write_text(json.dumps(records, indent=1) + "\n")
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
