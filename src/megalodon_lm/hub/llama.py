"""A Llama of transformers, or in a GGUF file, as the native `llama`: the same function under other names."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..baselines.llama import Llama, LlamaConfig
from ..data.tokenizer import Tokenizer
from ..errors import InputError
from ..model.identity import weights
from ..model.stored_tensors import StoredTensors
from .transformers_model import find_pretrained
from .transformers_tokenizer import TransformersTokenizer

_BLOCK = {
    "norm": "input_layernorm", "mixer.wq": "self_attn.q_proj", "mixer.wk": "self_attn.k_proj",
    "mixer.wv": "self_attn.v_proj", "mixer.wo": "self_attn.o_proj", "feed_forward.norm": "post_attention_layernorm",
    "feed_forward.fc1": "mlp.gate_proj", "feed_forward.fc2": "mlp.down_proj", "feed_forward.fc3": "mlp.up_proj",
}  # fmt: skip
_MODEL = {"embed": "model.embed_tokens", "output.final_norm": "model.norm", "output.output": "lm_head"}


def open_llama(source: Path) -> tuple[LlamaConfig, StoredTensors, Tokenizer | None]:
    """The configuration, the weights in float32, and the tokenizer of a Llama, if the library has it as ours do.

    Heads that share keys and values get copies of them, and a head tied to the embedding a copy of that: the native
    model has neither choice, and computes the same. Rows of queries and keys change from halves to adjacent pairs.

    Args:
        source: a folder of transformers, or a .gguf file.

    Raises:
        InputError: not a Llama, or one with what the native model has not: biases, heads of another width, scaled
            positions.
    """
    found, given = find_pretrained(source)
    try:
        theirs = AutoConfig.from_pretrained(found, **given)
        config = _config(theirs, source)
        stored = AutoModelForCausalLM.from_pretrained(found, **given, dtype=torch.float32).state_dict()
    except InputError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{source} is no model that transformers can load: {first}") from None
    kept = getattr(theirs, "num_key_value_heads", None) or config.num_heads

    def read(name: str) -> Tensor:
        tensor = stored[_their_name(name)]
        heads = kept if name.endswith(("wk.weight", "wv.weight")) else config.num_heads
        if name.endswith(("wq.weight", "wk.weight")):
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        if heads != config.num_heads:
            tensor = tensor.unflatten(0, (heads, -1)).repeat_interleave(config.num_heads // heads, 0).flatten(0, 1)
        return tensor - 1 if "norm" in name else tensor

    with torch.device("meta"):
        layout = weights(Llama(config))
    tokenizer: Tokenizer | None = None
    with suppress(OSError, ValueError):  # none there, or one of another kind
        tokenizer = TransformersTokenizer(AutoTokenizer.from_pretrained(found, **given), source)
    return config, StoredTensors(layout, read), tokenizer


def _their_name(name: str) -> str:
    part, _, last = name.rpartition(".")
    if part in _MODEL:
        return f"{_MODEL[part]}.{last}"
    _, layer, own = part.split(".", 2)
    return f"model.layers.{layer}.{_BLOCK[own]}.{last}"


def _config(theirs: Any, source: Path) -> LlamaConfig:
    """Ours from theirs."""
    if theirs.model_type != "llama":
        raise InputError(f"{source} holds a {theirs.model_type}; of other programs' models a Llama can be converted")
    heads, rope = theirs.num_attention_heads, theirs.rope_parameters
    for key, found, wanted in (
        ("attention_bias", theirs.attention_bias, False),
        ("mlp_bias", theirs.mlp_bias, False),
        ("hidden_act", theirs.hidden_act, "silu"),
        ("head_dim", theirs.head_dim, theirs.hidden_size // heads),
        ("rope_type", rope.get("rope_type", "default"), "default"),
    ):
        if found != wanted:
            raise InputError(f"{source}: {key} = {found!r}; the native llama has {wanted!r} alone")
    return LlamaConfig(
        vocab_size=theirs.vocab_size,
        num_layers=theirs.num_hidden_layers,
        model_dim=theirs.hidden_size,
        num_heads=heads,
        ffn_hidden_dim=theirs.intermediate_size,
        window=theirs.max_position_embeddings,
        norm_eps=theirs.rms_norm_eps,
        rope_base=rope["rope_theta"],
    )
