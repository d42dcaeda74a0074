"""`megalodon evaluate tasks` on models of other programs and on baselines, through the command itself."""

import errno
import socket
import time

import datasets  # noqa: F401  # asks the environment when it is imported whether there is a network
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from megalodon_lm.cli.models import load_readable
from megalodon_lm.evaluation.harness import HarnessModel
from megalodon_lm.evaluation.results import Results
from megalodon_lm.evaluation.short_tasks import ask
from megalodon_lm.evaluation.task_definitions import Definitions
from tests.runs import TEXT

from .test_harness_paths import FOLDER, llama

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No network; and what a command tells the libraries through the environment ends with the test."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def gguf(folder):
    """A Llama in a GGUF file, whose tokenizer puts no begin token before a text."""
    from gguf import GGUFWriter

    torch.manual_seed(0)
    sizes = dict(vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    weights = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).state_dict()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer = GGUFWriter(folder / "model.gguf", "llama")
    for add, value in (
        (writer.add_context_length, 4096), (writer.add_block_count, 2), (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 48), (writer.add_head_count, 4), (writer.add_head_count_kv, 4),
        (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_rope_freq_base, 1e4), (writer.add_vocab_size, 260),
        (writer.add_tokenizer_model, "gpt2"), (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 257), (writer.add_eos_token_id, 258), (writer.add_unk_token_id, 259),
        (writer.add_add_bos_token, False),
        (writer.add_token_list, [*letters, "ab", "<|im|>", "<|stop|>", "<|endoftext|>"]),
        (writer.add_token_types, [1] * 257 + [3] * 3),
    ):  # fmt: skip
        add(value)
    stored = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stored |= {f"blk.{n}.{name}": f"model.layers.{n}.{theirs}" for n in (0, 1) for name, theirs in NAMES.items()}
    for name, theirs in stored.items():
        writer.add_tensor(f"{name}.weight", weights[f"{theirs}.weight"].numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def transformers(folder):
    llama(folder, begins=True)
    return folder


def evaluated(run, model, out, *more):
    code, shown, said = run("evaluate", "tasks", "winogrande,mmlu_marketing", model, "--data", FOLDER, "--shots", "0",
                            "--limit", "2", "--precision", "float32", "--out", out, *more)  # fmt: skip
    assert code == 0, said
    assert "winogrande" in shown
    return Results.load(out)


@pytest.mark.parametrize(("make", "begins"), [(gguf, False), (transformers, True)])
def test_models_of_other_programs_and_what_is_made_of_them(make, begins, tmp_path, run):
    """A Llama scores natively what it scores as a model of transformers: its texts begin alike, and end alike."""
    (tmp_path / "theirs").mkdir()
    source = make(tmp_path / "theirs")
    theirs = evaluated(run, source, tmp_path / "theirs.json")
    assert theirs.model["architecture"] == "transformers"
    assert theirs.settings["begin"] is begins
    code, _, said = run("convert", source, "--to", "native", "--out", tmp_path / "ours")
    assert code == 0, said
    ours = evaluated(run, tmp_path / "ours", tmp_path / "ours.json")
    assert ours.model["architecture"] == "llama"
    assert ours.settings["begin"] is begins
    other = evaluated(run, tmp_path / "ours", tmp_path / "other.json", "--begin", "no" if begins else "yes")
    assert other.settings["begin"] is not begins
    for one, two in zip(theirs.tasks, ours.tasks, strict=True):
        assert one.scores == two.scores
        assert one.tokens_reread == two.tokens_reread
    assert ours.tasks[0].tokens_reread != other.tasks[0].tokens_reread
    tokenizers = [load_readable(place, "cpu")[1] for place in (source, tmp_path / "ours")]
    assert [(t.begin, t.end, t.begins) for t in tokenizers] == [
        (*((257, 258) if make is gguf else (256, 257)), begins)
    ] * 2


def test_the_run_of_a_baseline(tmp_path, run):
    (tmp_path / "text.txt").write_bytes(TEXT)
    (tmp_path / "recipe.toml").write_text(
        '[model]\narchitecture = "llama"\nvocab_size = 259\nnum_layers = 1\nmodel_dim = 32\nnum_heads = 2\n'
        f'ffn_hidden_dim = 64\nwindow = 4096\n[data]\ntrain = ["{tmp_path / "text.txt"}"]\n'
        "[training]\nlength = 48\nbatch_size = 2\nsteps = 2\nwarmup_steps = 1\n"
    )
    code, _, said = run("train", tmp_path / "recipe.toml", "--out", tmp_path / "run")
    assert code == 0, said
    found = evaluated(run, tmp_path / "run", tmp_path / "out.json")
    assert found.model["architecture"] == "llama"
    assert found.settings["begin"] is True
    model, tokenizer = load_readable(tmp_path / "run", "cpu")
    lm = HarnessModel(model, tokenizer, "float32")
    expected = list(ask(lm, Definitions(["winogrande", "mmlu_marketing"], FOLDER), 0, 2))
    assert [task.scores for task in found.tasks] == [task.scores for task in expected]


def test_data_that_is_nowhere_is_one_line(saved, refused, monkeypatch):
    """Neither in a folder nor, without a network, on the hub."""
    assert "the data of piqa is not in" in refused("evaluate", "tasks", "piqa", saved, "--data", FOLDER)

    def unreachable(*_, **__):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    said = refused("evaluate", "tasks", "winogrande", saved)
    assert "the data of winogrande is not on this machine and the hub cannot be had" in said
    assert "--data" in said
