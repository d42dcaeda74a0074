"""A Llama of transformers as the native one: grouped heads, a tied head, and what it cannot hold."""

import json

import pytest
import torch

from megalodon_lm.architectures import load
from megalodon_lm.errors import InputError
from megalodon_lm.hub.llama import open_llama

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
SIZES = dict(vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
             max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None)  # fmt: skip


def theirs(folder, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}],
    ids=["plain", "grouped"],
)
def test_a_llama_computes_the_same_natively(changes, tmp_path, run):
    model = theirs(tmp_path / "theirs", **changes)
    code, out, _ = run("convert", tmp_path / "theirs", "--to", "native", "--out", tmp_path / "ours")
    assert code == 0
    assert "tokenizer: none" in out
    tokens = torch.randint(259, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(load(tmp_path / "ours")(tokens)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention_bias": True}, "attention_bias = True; the native llama has False alone"),
        ({"head_dim": 16}, "head_dim = 16; the native llama has 8 alone"),
        ({"model_type": "mistral"}, "holds a mistral; of other programs' models a Llama can be converted"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type = 'linear'"),
    ],
)
def test_what_the_native_one_has_not_is_refused(changes, says, tmp_path):
    theirs(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as refusal:
        open_llama(tmp_path)
    assert says in str(refusal.value)
