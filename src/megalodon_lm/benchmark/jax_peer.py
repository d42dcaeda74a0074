"""megalodon-jax as a contender: run by the interpreter that has it, not by ours.

    python jax_peer.py CONFIG PRECISION

CONFIG is a ModelConfig as JSON. Speaks the protocol of worker.py, and imports nothing of megalodon_lm.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import equinox as eqx
import jax
import jax.numpy as jnp
from megalodon_jax import MegalodonConfig, MegalodonForCausalLM, generate

SHARED = (
    "vocab_size", "model_dim", "num_layers", "num_heads", "z_dim", "value_dim", "ffn_hidden_dim", "cema_ndim",
    "chunk_size", "norm_num_groups", "norm_eps", "rope_base", "swiglu", "rescale_nffn", "scale_emb", "share_emb",
    "init_mode", "dropout", "attention_dropout", "hidden_dropout",
)  # fmt: skip


STEPS = 64  # tokens written in one run of decode, as in workloads.py
SHORT = 2.0  # as in worker.py


@eqx.filter_jit
def train(model: MegalodonForCausalLM, tokens: jax.Array) -> Any:
    """Loss and gradients: forward and backward."""
    return eqx.filter_value_and_grad(lambda m: m.compute_loss(tokens, tokens))(model)


@eqx.filter_jit
def prefill(model: MegalodonForCausalLM, tokens: jax.Array) -> Any:
    """Logits after the last token, and the cache."""
    logits, cache = model(tokens, return_cache=True)
    return logits[:, -1], cache


def work(model: MegalodonForCausalLM, measure: str, batch: int, length: int) -> Callable[[], Any]:
    """What one run does.

    Decoding goes on after one and a half chunks, whatever the length: the cache is then full and grows no further.
    """
    if measure == "decode":
        length = model.config.chunk_size * 3 // 2
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, model.config.vocab_size)
    if measure != "decode":
        run = train if measure == "training" else prefill
        return lambda: run(model, tokens)
    key, empty = jax.random.key(2), tokens[:, :0]
    _, state, _ = generate(model, tokens, 1, key, temperature=0.0, return_state=True)
    return lambda: generate(model, empty, STEPS, key, temperature=0.0, state=state)[0]


def memory(key: str) -> int | None:
    """VmRSS or VmHWM of this process in bytes; None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(key)), None)


def forget_peak() -> None:
    """See worker.py."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        pass


def serve(config: dict[str, Any], precision: str) -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(reply: dict[str, Any]) -> None:
        answers.write(json.dumps(reply) + "\n")
        answers.flush()

    compute = jnp.bfloat16 if precision == "bf16" else jnp.float32
    chosen = MegalodonConfig(**{key: config[key] for key in SHARED}, compute_dtype=compute)
    model = MegalodonForCausalLM(chosen, key=jax.random.key(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    once: Callable[[], Any] = lambda: None  # noqa: E731

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(once())
        return time.perf_counter() - began

    answer({})
    seconds = 0.0
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "run" in request:
                if seconds < SHORT:
                    run()
                seconds = run()
                answer({"seconds": seconds})
            elif "release" in request:
                once = lambda: None  # noqa: E731
                answer({})
            else:
                once = work(model, **request)
                run()  # compiles
                forget_peak()
                before = memory("VmRSS")
                seconds = run()
                after = memory("VmHWM")
                used = None if before is None or after is None else max(0, after - before)
                note = f"{parameters:,} parameters, {precision} compute, megalodon-jax {version('megalodon-jax')}"
                answer({"note": note, "seconds": seconds, "memory": used})
        except (RuntimeError, ValueError, MemoryError) as error:
            answer({"error": str(error).splitlines()[0] if str(error) else type(error).__name__})


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]), sys.argv[2])
