"""NativeModel: what all classes here have in common, a native model behind the interface of transformers.

No model code is here. A class holds a native model and shares its table of submodules, so that both are always the same
modules and parameters under the same names, whoever replaces one (resizing, adapters, loading): a file of either loads
into the other.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..model.backbone import Backbone
from ..model.checkpoint import WEIGHTS_FILE, vouch

_OF_A_PUSH = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags")


class NativeModel(PreTrainedModel):
    """The native model, its weights drawn and saved.

    Args:
        config: the configuration, whose `choices` are the native one.
        native: a model of it to stand in front of, sharing its weights; None for a new one.
    """

    config: Any
    native_class: ClassVar[Any]
    """Of the native model."""
    remote_family: ClassVar[str] = "megalodon"
    """In remote_code.FAMILIES."""
    _native: Backbone
    embed: nn.Module
    layers: nn.ModuleList
    base_model_prefix = ""
    _input_embed_layer = "embed"
    _no_split_modules = ["Block"]  # noqa: RUF012
    supports_gradient_checkpointing = True

    def __init__(self, config: Any, native: Any = None):
        super().__init__(config)
        native = native or self.native_class(config.choices)
        object.__setattr__(self, "_native", native)  # no submodule: it has the same ones
        self.__dict__["_modules"] = self._native._modules
        self.gradient_checkpointing = False
        if not self._native.embed.weight.is_meta:
            for module in self._native.modules():
                setattr(module, "_is_hf_initialized", True)  # noqa: B010  # the native model drew, or was given: a seed means one model everywhere

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights of a module that no file had."""
        draw = None if isinstance(module, PreTrainedModel) else getattr(module, "init_weights", None)
        if draw is None:
            super()._init_weights(module)
            return
        known = {n: p.detach().clone() for n, p in module.named_parameters(recurse=False) if _is_loaded(p)}
        draw()
        for name, value in known.items():
            module.get_parameter(name).copy_(value)

    def train(self, mode: bool = True) -> Self:
        """As in torch, for the native model too."""
        super().train(mode)
        self._native.training = mode
        return self

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie the head to the embedding, or not, as the configuration says now."""
        self._native.config = self.config.choices
        super().tie_weights(*args, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Recompute each block in the backward pass, as the native model does; `use_reentrant` is always False.

        Raises:
            ValueError: for every other but each block.
        """
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers = {every_n_layers} must be 1: every block is recomputed, or none")
        self.gradient_checkpointing = self._native.activation_checkpointing = enable

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        push_to_hub: bool = False,
        remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers; the native side reads the folder too.

        One file of weights carries its configuration and fingerprint, as that of a native `save` does.

        Args:
            save_directory: the folder.
            args: as in transformers.
            push_to_hub: as in transformers.
            remote_code: add the code of the model, so that `trust_remote_code=True` loads the folder where this
                package is not installed; from then on whenever the model is saved, or pushed.
            kwargs: as in transformers.
        """
        if (remote_code or getattr(self.config, "auto_map", None)) and not self.is_remote_code():
            code = import_module(".remote_code", __package__)  # which such a folder has not
            self.config.auto_map = dict(code.FAMILIES[self.remote_family].auto_map)
            os.makedirs(save_directory, exist_ok=True)
            code.write_code(save_directory, self.remote_family)
        sent = {name: kwargs.pop(name) for name in _OF_A_PUSH if push_to_hub and name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        if (folder / WEIGHTS_FILE).is_file() and not getattr(self, "_hf_peft_config_loaded", False):
            vouch(folder / WEIGHTS_FILE, self.config.choices)
        if push_to_hub:  # after the file vouches
            shards = {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
            self.push_to_hub(**{"repo_id": folder.name} | sent | shards)


def _is_loaded(parameter: Tensor) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)
