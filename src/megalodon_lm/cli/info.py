"""megalodon info"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from ..errors import InputError

if TYPE_CHECKING:
    from ..model.language_model import Config


@dataclass
class Info:
    """Parameters, operations, state size and memory of a named size, a configuration file or a saved model."""

    name: Positional[str] = ""
    """A size such as paper7B, a .toml or .json file, or a model folder; nothing for a table of all sizes."""
    layers: bool = False
    """Of a model folder: how long each layer's CEMA remembers, and the gains of its attention."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Carry out the command."""
        import json

        from rich.table import Table

        from ..config import SIZES, ModelConfig
        from .models import find_config
        from .progress import results

        if self.layers:
            self._show_layers()
            return
        configs = {self.name: find_config(self.name)} if self.name else {n: ModelConfig.named(n) for n in SIZES}
        figures = {name: _figures(config) for name, config in configs.items()}
        if self.json:
            print(json.dumps(figures[self.name] if self.name else figures, indent=2))
            return
        table = Table("", *configs, title=None if self.name else "Named sizes")
        for key in max(figures.values(), key=len):
            table.add_row(key.replace("_", " "), *(f"{f.get(key, 0):,}" for f in figures.values()))
        if self.name:
            for key, value in configs[self.name].to_dict().items():
                table.add_row(key, str(value))
        results.print(table, width=None if self.name else max(results.width, 200), crop=False)

    def _show_layers(self) -> None:
        import json

        from rich.table import Table

        from ..training.inspection import inspect_layers
        from ..training.trained import load
        from .progress import results

        if not Path(self.name).is_dir():
            raise InputError(f"--layers needs a model folder, not {self.name or 'nothing'}")
        figures = inspect_layers(load(self.name))
        if self.json:
            print(json.dumps(figures, indent=2))
            return
        table = Table("layer", *(name.replace("_", " ") for name in figures[0]))
        for number, layer in enumerate(figures):
            table.add_row(str(number), *(f"{value:.4g}" for value in layer.values()))
        results.print(table)


def _figures(config: "Config") -> dict[str, int]:
    """Counts and bytes, those of the state by part too.

    Memory for training is weights, gradients and two moments in float32, without activations.
    """
    import torch

    from ..architectures import build
    from ..generation.context import bookmark_bytes
    from ..training.inspection import state_bytes_by_part

    with torch.device("meta"):
        model = build(config)
    parameters, bf16 = config.num_parameters, torch.bfloat16
    whole, at_end = (state_bytes_by_part(model, bf16, at_chunk_end) for at_chunk_end in (False, True))
    return {
        "parameters": parameters,
        "flops_per_token": config.flops_per_token(),
        "training_flops_per_token": config.flops_per_token(backward=True),
        "state_bytes": model.state_bytes(),
        "state_bytes_bf16_cache": model.state_bytes(dtype=bf16),
        **{f"{part}_bytes_bf16_cache": size for part, size in whole.items()},
        **{f"{part}_bytes_at_chunk_end": size for part, size in at_end.items()},
        "bookmark_bytes": bookmark_bytes(model),
        "weight_bytes_float32": 4 * parameters,
        "weight_bytes_bf16": 2 * parameters,
        "training_bytes_without_activations": 16 * parameters,
    }
