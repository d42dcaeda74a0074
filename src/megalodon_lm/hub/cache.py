"""The State as a cache of transformers: the one place that knows what its caches can be asked."""

from typing import Any

from torch import Tensor
from transformers import Cache

from ..state import State


class MegalodonCache(Cache):
    """What `generate` hands from step to step: a State, and how many columns of the batch it has seen.

    Its size does not grow with the text. `copy.copy` forks it: a State never changes, the cache is given the next one.

    Args:
        state: to go on from; None for an empty cache.
        length: columns read so far, padding counted; the longest row's tokens by default.
    """

    def __init__(self, state: State | None = None, length: int | None = None):
        super().__init__(layers=[])
        self.state = state
        self.length = length if length is not None else 0 if state is None else int(state.position.max())

    def __repr__(self) -> str:
        return f"<MegalodonCache of {self.length} columns: {self.state}>"

    def __len__(self) -> int:
        """Blocks that carry something."""
        return 0 if self.state is None else len(self.state.parts["layers"])

    def __bool__(self) -> bool:
        return True  # an empty cache is one too

    def advance(self, state: State, columns: int) -> None:
        """Take the State after so many more columns."""
        self.state, self.length = state, self.length + columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far: what `generate` need not give again."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is none."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row go on from the row of a beam."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Choose, repeat or reorder rows."""
        if self.state is not None:
            self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, side by side: beams of a text that was read once."""
        if self.state is not None:
            self.state = self.state.select([row for row in range(self.state.batch_size) for _ in range(repeats)])

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.length = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back: a state sums up what was read.

        Raises:
            NotImplementedError: for any but 0 tokens.
        """
        if tokens_to_remove:
            raise NotImplementedError(
                f"a Megalodon cannot forget the last {abs(tokens_to_remove)} tokens; keep copy.copy(cache) from before"
            )

    @property
    def batch_size(self) -> int:
        """Rows; -1 for an empty cache."""
        return -1 if self.state is None else self.state.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether something was read."""
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        """No: `generate` compiles for static caches alone."""
        return False

    @property
    def is_croppable(self) -> bool:
        """No; see crop."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """That of one layer: it counts columns as attention does, so that `generate` gives only what is new."""
        return [False]

    @property
    def is_sliding(self) -> list[bool]:
        """As is_linear."""
        return [False]

    @property
    def is_dummy(self) -> list[bool]:
        """As is_linear."""
        return [False]

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Nobody may: layers write no keys and values of their own."""
        raise NotImplementedError("a MegalodonCache holds a State and no keys and values; see MegalodonCache.state")
