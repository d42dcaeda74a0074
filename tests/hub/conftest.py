"""A small model behind both interfaces."""

import pytest
import torch

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.hub import MegalodonForCausalLM


@pytest.fixture(scope="session")
def native() -> Megalodon:
    """Chunks of 16, so that a few words end several."""
    torch.manual_seed(0)
    return Megalodon(ModelConfig.named("tiny", chunk_size=16)).eval()


@pytest.fixture(scope="session")
def model(native) -> MegalodonForCausalLM:
    """The same weights."""
    return MegalodonForCausalLM.of(native)


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Two texts of 50 tokens."""
    return torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
