"""Small runs for the tests that train, stop and go on."""

import json
import random

import torch
from safetensors.torch import load_file

from megalodon_lm.training.recipe import Recipe

TEXT = bytes(random.Random(1).choices(b"abcdefgh \n", k=20_000))


def recipe(folder, model=None, data=None, **training):
    text = folder / "text.txt"
    if not text.exists():
        text.write_bytes(TEXT)
    return Recipe.from_dict(
        {
            "model": {"size": "tiny", "dropout": 0.1, **(model or {})},
            "data": {"train": [str(text)], "validation": [str(text)], **(data or {})},
            "training": {"length": 48, "batch_size": 2, "steps": 12, "warmup_steps": 2, "checkpoint_steps": 4,
                         "precision": "float32", **training},
        }
    )  # fmt: skip


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder):
    return [record["step"] for record in metrics(folder)]


def same_weights(a, b):
    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
