"""The other way round: any causal language model of transformers as a LanguageModel.

Evaluators, Context and Generator then take it as they take a native one. What it has read is its cache, which grows
with the text, up to the window that its configuration states.
"""

import hashlib
import inspect
import weakref
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.cache_utils import Cache

from ..data.tokenizer import Tokenizer, load_tokenizer
from ..data.tokenizer_record import RECORD
from ..errors import InputError
from ..model.identity import digest
from ..model.language_model import LanguageModel
from ..ops.linear_cross_entropy import Reduction
from ..state import State
from ..state_spec import Tree
from .modeling import MegalodonForCausalLM
from .transformers_state import POSITION, TransformersState
from .transformers_tokenizer import TransformersTokenizer

_WINDOWS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")

_CHANGING = {"_name_or_path", "architectures", "dtype", "transformers_version"}  # with where and how it was loaded


@dataclass(frozen=True)
class TransformersConfig:
    """What evaluators ask of a configuration; see Config. `values` are those of the library."""

    architecture: ClassVar[str] = "transformers"

    vocab_size: int = 0
    num_parameters: int = 0
    window: int | None = None
    """Most tokens that the model can read; None where its configuration states no limit."""
    reading_unit: int = 512
    values: dict[str, Any] = field(default_factory=dict)

    def flops_per_token(self, backward: bool = False) -> int:
        """Two for each parameter, attention left out; with `backward` three times that."""
        return 2 * self.num_parameters * (3 if backward else 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, those of the library."""
        return {**self.values, "architecture": self.architecture}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Refuse: such a model is loaded and never built."""
        raise InputError("a model of transformers is loaded from its folder and cannot be built from a configuration")

    @classmethod
    def sized(cls, parameters: int, vocab_size: int, **choices: Any) -> Self:
        """Refuse, as from_dict."""
        return cls.from_dict({})


class TransformersModel(nn.Module):
    """A causal language model of transformers with the interface of a LanguageModel.

    Args:
        model: of any architecture whose cache is one of the library's growing ones, of attention or recurrent.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.inner: Any = model
        text, size = model.config.get_text_config(), model.num_parameters()
        found = (getattr(text, name, None) for name in _WINDOWS)
        window = next((w for w in found if isinstance(w, int) and w > 0), None)
        values = {k: v for k, v in model.config.to_dict().items() if k not in _CHANGING}
        self.config = TransformersConfig(text.vocab_size, size, window, values=values)
        accepted = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        self._takes_positions, self._takes_kept = "position_ids" in accepted, "logits_to_keep" in accepted
        self.state_spec: Tree = POSITION
        self._fingerprint: str | None = None
        self.train(model.training)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks: the longest list of modules."""
        lists = [m for m in self.inner.modules() if isinstance(m, nn.ModuleList)]
        return max(lists, key=len, default=nn.ModuleList())

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.inner.get_input_embeddings().weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.inner.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.inner.dtype

    @property
    def summary(self) -> str:
        """The sizes in a few words."""
        window = f" and a window of {self.config.window}" if self.config.window else ""
        return f"a {type(self.inner).__name__} of {len(self.layers)} layers, width {self.width}{window}"

    def fingerprint(self) -> str:
        """A hash of the configuration and of all weights, computed once."""
        if self._fingerprint is None:
            self._fingerprint = digest(self.config, self.inner.state_dict())
        return self._fingerprint

    def sampled_fingerprint(self) -> str:
        """Of the fingerprint: no older files know such a model."""
        return hashlib.sha256(self.fingerprint().encode()).hexdigest()

    def empty_state(
        self, batch: int = 1, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TransformersState:
        """The state before the first token; the library decides where it lies, and its type."""
        valid, position = torch.zeros(batch, 0, dtype=torch.bool), torch.zeros(batch, dtype=torch.int64)
        return TransformersState(None, valid, position, weakref.ref(self))

    def state_bytes(self, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Size of a State that has read a whole window, or one token where there is none; by reading one token."""
        with torch.no_grad():
            _, state = self(torch.zeros(1, 1, dtype=torch.int64, device=self.device))
        grows = isinstance(state, TransformersState) and not state.is_recurrent
        return batch * state.nbytes * ((self.config.window or 1) if grows else 1)

    def check_tokens(self, tokens: Tensor) -> None:
        """Refuse what is not a batch of tokens of this model.

        Raises:
            InputError: with the shape, the type or the token, and the limit.
        """
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise InputError(f"tokens must be int64 of shape (B, L), not {tokens.dtype} of {tuple(tokens.shape)}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise InputError(f"a token is outside the vocabulary of {self.config.vocab_size}; use its own tokenizer")

    def save(self, folder: str | Path) -> None:
        """As the library saves it."""
        self.inner.save_pretrained(folder)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        targets: Tensor | None = None,
        learnt: Tensor | None = None,
        reduction: Reduction = "mean",
        logits_to_keep: int | None = None,
        document_starts: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """As Decoder.forward: logits, or with targets losses, in float32; and the state.

        Raises:
            InputError: more tokens than the window; padding that a recurrent model would read; or as Decoder.forward.
        """
        self.check_tokens(tokens)
        if targets is not None:
            logits_to_keep = None
        logits, after = self._documents(tokens, state, document_starts, mask, logits_to_keep)
        if targets is None:
            return logits, after
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        for counted in (learnt, mask):
            losses = losses if counted is None else losses.where(counted.to(losses.device), 0)
        if reduction == "none":
            return losses, after
        number = torch.ones_like(losses)
        for counted in (learnt, mask):
            number = number if counted is None else number.where(counted.to(losses.device), 0)
        return losses.sum() / number.sum().clamp(min=1), after

    def _documents(
        self, tokens: Tensor, state: State | None, starts: Tensor | None, mask: Tensor | None, keep: int | None
    ) -> tuple[Tensor, State]:
        """Logits and state where documents may start inside: each is read by itself."""
        if starts is None or not bool(starts.any()):
            return self._read(tokens, state, mask, keep)
        rows = []
        for row, first in enumerate(starts.cpu()):
            one, begun = slice(row, row + 1), None if state is None else state.select([row])
            cuts = sorted({0, *first.nonzero().flatten().tolist(), tokens.shape[1]})
            parts = []
            for low, high in pairwise(cuts):
                begun = None if first[low] else begun
                part = None if mask is None else mask[one, low:high]
                logits, begun = self._read(tokens[one, low:high], begun, part, None)
                parts.append(logits)
            assert begun is not None
            rows.append((torch.cat(parts, 1), begun))
        logits = torch.cat([logits for logits, _ in rows])
        return logits if keep is None else logits[:, logits.shape[1] - keep :], State.cat([s for _, s in rows])

    def _read(
        self, tokens: Tensor, state: State | None, mask: Tensor | None, keep: int | None
    ) -> tuple[Tensor, TransformersState]:
        batch, length = tokens.shape
        before = self.empty_state(batch) if state is None else state
        before.check(self, batch)
        assert isinstance(before, TransformersState)
        if length == 0:
            return tokens.new_zeros(batch, 0, self.config.vocab_size, dtype=torch.float32), before
        new = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.cpu()
        position = before.position + new.sum(1)
        if self.config.window is not None and int(position.max()) > self.config.window:
            raise InputError(
                f"{int(position.max()):,} tokens are more than the window of {self.config.window:,} that this model "
                "has; cut the text"
            )
        valid = torch.cat([before.valid, new], 1)
        if length > 1 and before.is_forgotten_in_pieces:
            return self._step(tokens, before, mask, keep)
        given: dict[str, Any] = {self._cache_name: before.advancing(), "use_cache": True}
        if not bool(valid.all()) and not before.is_recurrent:
            given["attention_mask"] = valid.to(tokens.device, torch.int64)
        if self._takes_positions:
            given["position_ids"] = (before.position[:, None] + new.cumsum(1) - 1).clamp(min=0).to(tokens.device)
        if self._takes_kept and keep is not None:
            given["logits_to_keep"] = keep
        out = self.inner(input_ids=tokens, **given)
        cache = getattr(out, "cache", None)
        if not isinstance(cache, Cache):
            raise InputError(f"a {type(self.inner).__name__} has no cache that can be kept; it cannot be used here")
        after = TransformersState(cache, valid, position, weakref.ref(self))
        if not after.grows_by_columns and not bool(new.all()):
            raise InputError(
                f"a {type(self.inner).__name__} would read padding; give texts of different lengths one at a time"
            )
        logits = out.logits if keep is None else out.logits[:, max(0, out.logits.shape[1] - keep) :]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), after

    def _step(
        self, tokens: Tensor, state: TransformersState, mask: Tensor | None, keep: int | None
    ) -> tuple[Tensor, TransformersState]:
        """Read token by token."""
        found = []
        for at in range(tokens.shape[1]):
            one = slice(at, at + 1)
            logits, state = self._read(tokens[:, one], state, None if mask is None else mask[:, one], None)
            found.append(logits)
        return torch.cat(found if keep is None else found[max(0, len(found) - keep) :], 1), state


def load_transformers(
    name: str | Path, device: torch.device | str = "cpu", dtype: Any = "auto", trust_remote_code: bool = False
) -> tuple[LanguageModel, Tokenizer]:
    """A model of transformers with its tokenizer: from a folder, from a GGUF file, or by its name on the hub.

    A Megalodon comes as its native model. What lies on the disk is read from there, and nothing else is asked.

    Args:
        name: of a folder with config.json, of a file *.gguf, or on the hub.
        device: where the weights go.
        dtype: of the weights; "auto" for the stored one.
        trust_remote_code: run code that the folder brings.

    Raises:
        InputError: nothing of the name, or nothing that the library can read.
    """
    path, (source, given) = Path(name), find_pretrained(name)
    given["trust_remote_code"] = trust_remote_code
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **given)
        model.to(device).eval()
        if isinstance(model, MegalodonForCausalLM) and (path / RECORD).exists():
            return model.native, load_tokenizer(path)
        tokenizer = AutoTokenizer.from_pretrained(source, **given)
    except InputError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name} is no model that transformers can load: {first}") from None
    wrapped: Any = model.native if isinstance(model, MegalodonForCausalLM) else TransformersModel(model)
    return wrapped, TransformersTokenizer(tokenizer, name)


def find_pretrained(name: str | Path) -> tuple[str, dict[str, Any]]:
    """What the library's `from_pretrained` takes for a folder, a file *.gguf or a name on the hub: name and options."""
    path = Path(name)
    if path.suffix == ".gguf":
        return str(path.parent), {"local_files_only": path.exists(), "gguf_file": path.name}
    return str(name), {"local_files_only": path.exists()}
