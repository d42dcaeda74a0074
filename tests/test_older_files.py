"""Files that version 0.1 wrote load, and go on to what that version computed from them.

In tests/files/0.1: a run of two steps of a tiny model; states of two rows at different places, in both formats; a
bookmark, in both formats; and the logits and losses that followed.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megalodon_lm import ByteTokenizer, Context, Megalodon, State
from megalodon_lm.training.recipe import Recipe
from megalodon_lm.training.trainer import Trainer

FILES = Path(__file__).parent / "files" / "0.1"
EXPECTED = load_file(FILES / "expected.safetensors")
TEXT = np.arange(531) * 11 % 259  # what the bookmark read


@pytest.fixture(scope="module")
def model():
    return Megalodon.load(FILES / "run" / "checkpoints" / "step-00000002").eval()


@pytest.mark.parametrize(("name", "known"), [("rows", "rows"), ("rows-2", "rows"), ("rows-bf16", "rows_bf16")])
def test_states(model, name, known):
    """The logits are those after 1, 4 and 12 tokens, before and after the end of a chunk."""
    state = State.load(FILES / f"{name}.state", model)
    assert state.position.tolist() == [20, 13]
    assert state.parts["layers"][0]["attention"].fill.tolist() == [4, 5]
    with torch.no_grad():
        logits, _ = model(EXPECTED["more"], state)
    torch.testing.assert_close(logits[:, [0, 3, 11]], EXPECTED[known], atol=1e-4, rtol=0)
    other = Megalodon(model.config).eval()
    assert not torch.allclose(other(EXPECTED["more"])[0][:, [0, 3, 11]], EXPECTED[known], atol=1e-2)


@pytest.mark.parametrize("name", ["text", "text-2"])
def test_bookmarks(model, name):
    context = Context.load(FILES / f"{name}.bookmark", model, ByteTokenizer(), "float32")
    assert context.position == len(TEXT)
    logits, _ = context.finish()
    torch.testing.assert_close(logits, EXPECTED["bookmark"], atol=1e-4, rtol=0)


def test_checkpoints_with_a_carried_state(tmp_path, monkeypatch):
    shutil.copytree(FILES, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    recipe = Recipe.load("run/recipe.toml")
    longer = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, steps=4))
    trainer, losses = Trainer(longer, "run", resume="last"), []
    assert trainer.state.position.tolist() == [26, 26]
    assert trainer.train(lambda metrics: losses.append(metrics.bits_per_token))
    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), EXPECTED["losses"], atol=1e-4, rtol=0)
