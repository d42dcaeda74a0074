"""The checkpoints of the authors' code: a folder of consolidated model-parallel parts, read and written.

A folder holds config.json, whose table "model" is the configuration; consolidate_config.json with the number of parts
and their type; and consolidated.pth, or consolidated.00.pth and so on, each a state dict under the names that this
package has too, with buffers besides. Norms store scales as offsets from 1 and CEMA its gamma as real pairs, as here.
Facts from the code published as XuezheMax/megalodon (2024).
"""

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..configuration import read_config
from ..errors import InputError, InputNote, nearest
from ..files import replacing, write_atomically
from ..ops.rotary import frequencies
from ..tables import read_table
from .identity import weights
from .megalodon import Megalodon
from .stored_tensors import StoredTensors, shape_of

CONFIG_FILE, PARTS_FILE, TOKENIZER_FILE = "config.json", "consolidate_config.json", "tokenizer.model"
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ALIKE = (
    "num_layers", "model_dim", "z_dim", "value_dim", "num_heads", "ffn_hidden_dim", "cema_ndim", "chunk_size",
    "vocab_size", "norm_num_groups", "norm_eps", "dropout", "hidden_dropout", "attention_dropout", "swiglu",
    "rescale_nffn", "scale_emb", "share_emb",
)  # fmt: skip
"""Keys with the same meaning in both configurations."""
_DEFAULTS: dict[str, Any] = {
    "num_layers": 8, "model_dim": 1024, "z_dim": 256, "value_dim": 2048, "num_heads": 1, "ffn_hidden_dim": 2048,
    "cema_ndim": 16, "chunk_size": 2048, "efficient_attn": None, "init_mode": "he", "vocab_size": -1,
    "output_size": -1, "norm_num_groups": 32, "norm_affine": True, "norm_eps": 1e-5, "rope_base": None,
    "dropout": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0, "swiglu": False, "rescale_nffn": False,
    "scale_emb": False, "share_emb": False, "layerwise_ckpt": False,
}  # fmt: skip
"""Every key of the authors' configuration, at what it is where it is left out."""
_BASE = 10_000.0  # of the rotary frequencies, where rope_base is None
_ROUNDED = 2**-7  # of frequencies that were stored in bf16 or fp16

_FREQUENCIES = "rope.freqs"
_PRIORS = ("prior_count", "prior_mean", "prior_logv")  # of every norm over time: statistics before the first token
_WHOLE = ("rmsnorm.weight", "nffn.norm.weight", "nffn.norm.bias", "nffn.alpha", _FREQUENCIES, "prior_count")
_CUT_IN_COLUMNS = ("embed.weight", "output.output.weight", "wh2.weight", "fc2.weight", "mega.gamma", "mega.beta")


def is_official(folder: Path) -> bool:
    """Whether a folder is a checkpoint of the authors' code that was consolidated."""
    return (folder / PARTS_FILE).is_file()


def open_official(folder: Path) -> tuple[ModelConfig, StoredTensors]:
    """The configuration of a checkpoint, and its weights by name, which are merged one by one when they are asked for.

    Args:
        folder: with parts of a model-parallel run, consolidated.

    Raises:
        InputError: a file is missing or damaged, the configuration has what this package has not, or a tensor is
            unknown, missing, of a wrong shape, or not alike in all parts that hold all of it.
    """
    said = read_table(folder / PARTS_FILE, "JSON", "how the checkpoint was consolidated")
    parts, kind = said.get("model_parallel_size"), said.get("dtype")
    if type(parts) is not int or parts < 1 or kind not in _DTYPES:
        raise InputError(
            f"{folder / PARTS_FILE}: model_parallel_size = {parts!r} must be a whole number of at least 1, and "
            f"dtype = {kind!r} one of {', '.join(_DTYPES)}"
        )
    opened = {path: _open_part(path) for path in _part_files(folder, parts)}
    first = next(iter(opened.values()))
    config = _read_config(folder / CONFIG_FILE, first)
    _check_parts(config, parts)
    for path, part in opened.items():
        _check_names(path, part, config, parts)
    _check_buffers(folder, first, config)
    if config.share_emb:
        for path, part in opened.items():
            if not torch.equal(part.get("output.output.weight", part["embed.weight"]), part["embed.weight"]):
                raise InputError(f"{path}: output.output.weight is not embed.weight, and share_emb is set")
    own = _own_layout(config)
    merged = {n: t.to("meta", first[n].dtype) for n, t in own.items()}
    return config, StoredTensors(merged, lambda name: _merge(name, opened))


def tokenizer_file(folder: Path) -> Path | None:
    """The SentencePiece model of a checkpoint: beside it, or where its configuration says it is; None if neither is."""
    named = (read_config(folder / CONFIG_FILE).get("tokenizer") or {}).get("path")
    places = [folder / TOKENIZER_FILE, *([Path(named)] if isinstance(named, str) else [])]
    return next((place for place in places if place.is_file()), None)


def write_official(
    config: ModelConfig, tensors: Mapping[str, Tensor], folder: Path, parts: int = 1, unnamed_tokens: int = 0
) -> None:
    """Write a checkpoint that the authors' code reads. It looks for the tokenizer as tokenizer.model in the folder.

    Args:
        config: of a Megalodon.
        tensors: its weights by name, tied ones once; one part of them at a time is in memory.
        folder: is there, and is empty.
        parts: of model parallelism.
        unnamed_tokens: of the vocabulary, that the tokenizer has not.

    Raises:
        InputError: a choice that their code has not, or a number of parts that does not divide the model; or the
            folder cannot be written.
    """
    values = _official_config(config)
    _check_parts(config, parts)
    dtype = tensors["embed.weight"].dtype
    names = {kept: name for name, kept in _DTYPES.items()}
    if dtype not in names:
        raise InputError(f"weights of {dtype} have no name in the authors' format; it knows {', '.join(_DTYPES)}")
    for rank, path in enumerate(_part_files(folder, parts)):
        with replacing(path) as file:
            torch.save(_part(config, tensors, parts, rank), file)
    tokenizer = {"path": str((folder / TOKENIZER_FILE).resolve()), "additional_vocab_size": unnamed_tokens}
    of_parts = {"model_parallel_size": parts, "dtype": names[dtype]}
    write_atomically(folder / CONFIG_FILE, json.dumps({"model": values, "tokenizer": tokenizer}, indent=2) + "\n")
    write_atomically(folder / PARTS_FILE, json.dumps(of_parts) + "\n")  # last: it makes the folder a checkpoint


def _part(config: ModelConfig, tensors: Mapping[str, Tensor], parts: int, rank: int) -> dict[str, Tensor]:
    """The state dict of one part."""
    dtype = tensors["embed.weight"].dtype
    made = {n: _cut(n, tensors[n].detach().cpu(), parts, rank).to(dtype) for n in tensors}
    made |= {n: _cut(n, t, parts, rank) for n, t in _buffers(config, dtype).items()}
    return made | ({"output.output.weight": made["embed.weight"]} if config.share_emb else {})


def _part_files(folder: Path, parts: int) -> list[Path]:
    return [folder / ("consolidated.pth" if parts == 1 else f"consolidated.{i:02d}.pth") for i in range(parts)]


def _open_part(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, mapped into memory and not read."""
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); it may be truncated: copy it again"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise InputError(f"{path} is not a state dict: it must hold tensors by name")
    return found


def _read_config(path: Path, part: Mapping[str, Tensor]) -> ModelConfig:
    """Ours from theirs; older files leave the vocabulary to the tokenizer, so it is that of the embedding."""
    given = read_config(path).get("model")
    if not isinstance(given, dict):
        raise InputError(f"{path} has no table 'model'")
    for key in given:
        if key not in _DEFAULTS:
            raise InputError(f"{path}: unknown key {key!r} in 'model'{nearest(key, _DEFAULTS)}")
    values = _DEFAULTS | given
    if values["vocab_size"] == -1:
        values["vocab_size"] = len(part.get("embed.weight", ()))
    if values["output_size"] not in (-1, values["vocab_size"]):
        raise InputError(f"{path}: output_size = {values['output_size']!r} is not the vocabulary's size")
    if values["norm_affine"] is not True:
        raise InputError(f"{path}: norm_affine = {values['norm_affine']!r}, but norms have scales and shifts here")
    base = values["rope_base"]
    try:
        return ModelConfig(
            **{key: values[key] for key in _ALIKE},
            rope_base=_BASE if base is None else base,
            drop_keys=values["efficient_attn"] is not None,  # what their fused kernels do
            # that of weights which are loaded does not matter, and they know further ones
            init_mode=values["init_mode"] if values["init_mode"] in ("he", "bert", "xavier") else "he",
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _official_config(config: ModelConfig) -> dict[str, Any]:
    """Theirs from ours."""
    values = _DEFAULTS | {key: getattr(config, key) for key in (*_ALIKE, "rope_base", "init_mode")}
    values["efficient_attn"] = "fused" if config.drop_keys else None
    plain, default = config.to_dict(), ModelConfig().to_dict()
    for key in plain:
        if key not in values and key != "drop_keys" and plain[key] != default[key]:
            raise InputError(f"{key} = {plain[key]!r} is a choice that the authors' code of Megalodon has not")
    if config.norm_num_groups == config.model_dim:
        raise InputError(f"norm_num_groups = {config.model_dim}, one a feature, is refused by the authors' code")
    return values


def _check_parts(config: ModelConfig, parts: int) -> None:
    for key in ("num_heads", "norm_num_groups", "ffn_hidden_dim"):
        if parts < 1 or getattr(config, key) % parts:
            raise InputError(f"{parts} parts must divide {key} = {getattr(config, key)}")


def _own_layout(config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a whole model on the meta device."""
    with torch.device("meta"):
        return weights(Megalodon(config))


def part_shapes(config: ModelConfig, parts: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all that each part of a checkpoint holds, by name."""
    own = _own_layout(config)
    tied = {"output.output.weight": own["embed.weight"]} if config.share_emb else {}
    found = {}
    for name, whole in (own | tied | _buffers(config, torch.float32)).items():
        shape, dim = list(whole.shape), _dimension(name)
        if dim is not None:
            shape[dim] //= parts
        found[name] = tuple(shape)
    return found


def _buffers(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a checkpoint holds besides: rotary frequencies, and where norms would start if their count were not 0."""
    found = {_FREQUENCIES: frequencies(config.z_dim // config.num_heads, config.rope_base).to(dtype)}
    for norm in (*(f"layers.{i}.mega.timenorm" for i in range(config.num_layers)), "output.final_norm"):
        count, *statistics = (f"{norm}.{prior}" for prior in _PRIORS)
        found[count] = torch.zeros((), dtype=torch.int64)
        found |= {n: torch.zeros(config.norm_num_groups, dtype=dtype) for n in statistics}
    return found


def _dimension(name: str) -> int | None:
    """Along which a tensor is cut into parts; None for one that each part holds whole.

    Maps to heads or hidden features are cut by their rows, those back by their columns, and everything over features
    of the residual stream by these: CEMA, norms over time, and the embedding, in all of the vocabulary.
    """
    return None if name.endswith(_WHOLE) else 1 if name.endswith(_CUT_IN_COLUMNS) else 0


def _cut(name: str, whole: Tensor, parts: int, rank: int) -> Tensor:
    """A part's own copy: of a view, torch.save would write everything that it is a view of."""
    dim = _dimension(name)
    return (whole if dim is None else whole.chunk(parts, dim)[rank]).clone()


def _merge(name: str, opened: Mapping[Path, Mapping[str, Tensor]]) -> Tensor:
    dim, found = _dimension(name), [part[name] for part in opened.values()]
    if dim is not None:
        return torch.cat(found, dim)
    for path, other in zip(opened, found, strict=True):
        if not torch.equal(other, found[0]):
            raise InputError(f"{path}: {name} is not that of the others; they are parts of different checkpoints")
    return found[0]


def _check_names(path: Path, part: Mapping[str, Tensor], config: ModelConfig, parts: int) -> None:
    """Refuse a part that does not hold what it must; buffers, and a head that is tied, may be missing."""
    wanted = part_shapes(config, parts)
    for name in part:
        if name not in wanted:
            raise InputError(f"{path}: unknown tensor {name}{nearest(name, wanted)}")
    for name, shape in wanted.items():
        found = shape_of(part, name)
        optional = name == _FREQUENCIES or name.endswith(_PRIORS)
        if found is None and not optional and not (name == "output.output.weight" and config.share_emb):
            raise InputError(f"{path}: {name} is missing, of shape {shape}")
        if found not in (None, shape):
            raise InputError(f"{path}: {name} has shape {found} and must have {shape} in one of {parts} parts")


def _check_buffers(folder: Path, part: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Refuse buffers that say of the model what this package cannot do."""
    for name, tensor in part.items():
        if name.endswith("prior_count") and tensor.item() != 0:
            raise InputError(f"{folder}: {name} = {tensor.item()}, but norms over time start from nothing here")
    if (stored := part.get(_FREQUENCIES)) is None:
        return
    exact = frequencies(config.z_dim // config.num_heads, config.rope_base)
    if not torch.allclose(stored.double(), exact, rtol=_ROUNDED, atol=2**-24):
        raise InputError(f"{folder}: {_FREQUENCIES} are not those of rope_base = {config.rope_base:g}")
    if not torch.allclose(stored.double(), exact, rtol=1e-5, atol=0):
        warnings.warn(
            InputNote(
                f"{folder}: {_FREQUENCIES} were rounded to half precision, and the authors' code turns queries and "
                "keys by these; here they are turned by the exact ones"
            ),
            stacklevel=2,
        )
