"""Figures of a model's layers that tell how it remembers and attends, and with how many bytes."""

import math

import torch

from ..errors import InputError
from ..layers.block import Block
from ..layers.gated_attention import GatedAttention
from ..model.language_model import LanguageModel
from ..state_spec import named


@torch.no_grad()
def inspect_layers(model: LanguageModel) -> list[dict[str, float]]:
    """For each block: how long CEMA remembers, and how strongly attention differs from an even mean.

    Returns:
        `decay`: mean size of the states' factors |q|; `half_life`, `longest_half_life`: tokens after which a state has
        lost half, median and largest over channels and states; `query_gain`, `key_gain`: root mean square of the scales
        on normalised queries and keys, and `memory_query_gain`, `memory_key_gain` on those of a memory; `output`: norm
        of CEMA's output weights gamma. Without CEMA there are the gains alone, of convolutions that of the queries.

    Raises:
        InputError: the model is made of other blocks than a Megalodon.
    """
    found = []
    for block in model.layers:
        if not isinstance(block, Block):
            raise InputError(f"nothing is known of the layers of {model.summary}: they have neither CEMA nor its gains")
        mega, figures = block.mega, {}
        cema = mega.cema if isinstance(mega, GatedAttention) else None
        if cema is not None:
            _, q, _ = cema.coefficients()
            size = q.abs().double().clamp(max=1 - 1e-12)
            half_life = math.log(0.5) / size.log()
            figures["decay"] = size.mean().item()
            figures["half_life"] = half_life.median().item()
            figures["longest_half_life"] = half_life.max().item()
        gains = (mega.gamma.float() + 1).square().mean(1).sqrt().tolist()
        figures |= zip(("query_gain", "key_gain", "memory_query_gain", "memory_key_gain"), gains, strict=False)
        if cema is not None:
            figures["output"] = cema.gamma.norm().item()
        found.append(figures)
    return found


def state_bytes_by_part(model: LanguageModel, dtype: torch.dtype, at_chunk_end: bool = False) -> dict[str, int]:
    """Bytes of a state of one row, of all layers together, by the name of the part that carries them.

    Args:
        model: may be on the meta device.
        dtype: of the caches.
        at_chunk_end: of each cache only what is used at the end of a reading unit, as in a bookmark.

    Returns:
        Of a Megalodon those of "norm" with the final one, and of "cema", "convolution", "attention" and "memory" where
        there are such parts; the position is left out.
    """
    sizes: dict[str, int] = {}
    for tree in ({"norm": model.state_spec["norm"]}, *model.state_spec["layers"]):
        for name, leaf in named(tree):
            part = name.partition(".")[0]
            sizes[part] = sizes.get(part, 0) + leaf.nbytes(dtype, at_chunk_end)
    return sizes
