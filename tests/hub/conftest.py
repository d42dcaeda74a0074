"""A small model behind both interfaces, and what reads it where the package is not installed."""

import os
import subprocess
import sys

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


HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megalodon_lm", "numba"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch
folder, out = sys.argv[1:]
"""


@pytest.fixture
def elsewhere(tmp_path):
    """Runs a program on a folder, which saves into another one, offline and where the package cannot be imported."""

    def run(program, folder, out):
        environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
        program = f'{HIDDEN}{program}\nassert "megalodon_lm" not in sys.modules\n'
        done = subprocess.run(
            [sys.executable, "-c", program, folder, out], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr

    return run
