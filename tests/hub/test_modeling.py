"""The classes of transformers give what the native model gives, and read and write the same files."""

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megalodon_lm import Megalodon, ModelConfig, architectures
from megalodon_lm.config import GECKO
from megalodon_lm.errors import InputError
from megalodon_lm.hub import MegalodonCache, MegalodonConfig, MegalodonForCausalLM, MegalodonModel

SHAPES = [{}, GECKO, {"mixer": "convolution", **GECKO}, {"share_emb": True, "scale_emb": True}, {"swiglu": False}]


def small(**choices):
    torch.manual_seed(0)
    return Megalodon(ModelConfig.named("tiny", chunk_size=16, **choices)).eval()


@pytest.mark.parametrize("choices", SHAPES)
@torch.no_grad()
def test_logits_and_states_are_those_of_the_native_model_bit_for_bit(choices, tokens):
    native = small(**choices)
    model = MegalodonForCausalLM.of(native)
    mask = torch.ones_like(tokens)
    mask[0, :9] = mask[1, 45:] = mask[1, 20] = 0
    for given in (None, mask):
        logits, state = native(tokens, mask=None if given is None else given.bool())
        out = model(tokens, attention_mask=given)
        assert torch.equal(out.logits, logits)
        more, after = native(tokens[:, :19], state)
        out = model(tokens[:, :19], cache=out.cache, attention_mask=given if given is None else given[:, :19] | 1)
        assert torch.equal(out.logits, more)
        assert out.cache.get_seq_length() == 69
        assert all(torch.equal(t, after.tensors()[name]) for name, t in out.cache.state.tensors().items())


@torch.no_grad()
def test_embedded_tokens_and_kept_logits(native, model, tokens):
    whole = model(tokens).logits
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embedded).logits, whole)
    assert torch.equal(model(tokens, logits_to_keep=3).logits, native(tokens, logits_to_keep=3)[0])
    padded = torch.ones_like(tokens).index_fill(1, torch.arange(5), 0)
    out = model(inputs_embeds=embedded, attention_mask=padded)
    assert torch.equal(out.logits, model(tokens, attention_mask=padded).logits)


@torch.no_grad()
def test_positions_that_start_again_begin_a_document(native, model, tokens):
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None].expand(2, -1)
    starts = (positions == 0) & (torch.arange(50) > 0)
    expected, _ = native(tokens, document_starts=starts)
    assert torch.equal(model(tokens, position_ids=positions).logits, expected)
    assert torch.equal(model(tokens, position_ids=torch.arange(50)[None]).logits, native(tokens)[0])


@torch.no_grad()
def test_hidden_states_are_the_inputs_of_blocks_and_head(native, model, tokens):
    out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == len(native.layers) + 1
    assert torch.equal(out.hidden_states[0], native.embed(tokens))
    assert torch.equal(native.output.output(out.hidden_states[-1]), out.logits)
    mask = torch.ones_like(tokens).index_fill(1, torch.arange(30), 0)
    padded = model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
    alone = model(tokens[:, 30:], output_hidden_states=True).hidden_states
    assert all(torch.equal(p[:, 30:], a) for p, a in zip(padded, alone, strict=True))


@pytest.mark.parametrize("choices", SHAPES)
def test_a_folder_of_either_loads_into_the_other(choices, tmp_path, tokens):
    native = small(**choices)
    native.save(tmp_path / "native")
    loaded = MegalodonForCausalLM.from_pretrained(tmp_path / "native")
    assert loaded.native.fingerprint() == native.fingerprint()
    assert not loaded.native.training
    loaded.save_pretrained(tmp_path / "transformers")
    assert set(json.loads((tmp_path / "transformers" / "config.json").read_text())) > set(native.config.to_dict())
    back = architectures.load(tmp_path / "transformers")
    assert back.fingerprint() == native.fingerprint()
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "transformers")
    assert isinstance(auto, MegalodonForCausalLM)
    with torch.no_grad():
        assert torch.equal(auto(tokens).logits, native(tokens)[0])
    assert AutoConfig.from_pretrained(tmp_path / "transformers").choices == native.config


@pytest.mark.parametrize("choices", [{}, {"share_emb": True}])
def test_weights_in_several_files_load_natively_too(choices, tmp_path):
    native = small(**choices)
    MegalodonForCausalLM.of(native).save_pretrained(tmp_path, max_shard_size="150KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2
    assert architectures.load(tmp_path).fingerprint() == native.fingerprint()
    parts[1].unlink()
    with pytest.raises(InputError, match=rf"{parts[1].name} cannot be read"):
        architectures.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"index.json cannot be read, or does not fit"):
        architectures.load(tmp_path)


def test_the_file_of_weights_vouches_for_a_folder_of_transformers_too(model, tmp_path):
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "rope_base": 5.0}))
    with pytest.raises(InputError, match=r"was edited .* rope_base = 10000.0"):
        Megalodon.load(tmp_path)
    (tmp_path / "config.json").unlink()
    assert Megalodon.load(tmp_path).fingerprint() == model.native.fingerprint()


def test_the_decoder_without_its_head(model, tmp_path, tokens):
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, MegalodonModel)
    assert sorted(base.state_dict()) == sorted(set(model.state_dict()) - {"output.output.weight"})
    with torch.no_grad():
        assert torch.equal(base(tokens).last_hidden_state, model(tokens, output_hidden_states=True).hidden_states[-1])
    base.save_pretrained(tmp_path / "base")
    again, info = MegalodonForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"output.output.weight"}
    assert torch.equal(again.embed.weight, model.embed.weight)
    assert 0.05 < again.output.output.weight.std() < 0.2  # drawn as a new model draws it


def test_a_seed_means_the_same_model_by_every_name():
    config = ModelConfig.named("tiny")
    torch.manual_seed(3)
    expected = Megalodon(config).fingerprint()
    torch.manual_seed(3)
    assert MegalodonForCausalLM(MegalodonConfig.of(config)).native.fingerprint() == expected
    torch.manual_seed(3)
    assert AutoModelForCausalLM.from_config(MegalodonConfig.of(config)).native.fingerprint() == expected


def test_copies_are_whole_and_independent(model, tokens):
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.native._modules is twin._modules
        with torch.no_grad():
            twin.embed.weight.zero_()
            assert not torch.equal(twin(tokens).logits, model(tokens).logits)
        assert model.embed.weight.any()


def test_names_of_transformers_are_ours():
    config = MegalodonConfig(hidden_size=64, norm_num_groups=2, z_dim=32, num_hidden_layers=3, tie_word_embeddings=True)
    assert (config.model_dim, config.num_layers, config.share_emb) == (64, 3, True)
    assert config.choices == ModelConfig(model_dim=64, norm_num_groups=2, z_dim=32, num_layers=3, share_emb=True)
    assert MegalodonConfig(**config.to_dict()).choices == config.choices
    with pytest.raises(InputError, match=r"norm_num_groups = 7 must divide"):
        MegalodonConfig(norm_num_groups=7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.int64), "output_attentions": True}, "never has its weights"),
        ({"input_ids": torch.full((1, 3), 259)}, "token 259 is outside the vocabulary"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.int64), "cache": {}}, "cache must be a MegalodonCache"),
        (
            {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 1, 3, 3)},
            r"attention_mask must be of shape \(1, 3\)",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(model, given, message):
    with pytest.raises(ValueError, match=message):
        model(**given)


def test_a_cache_cannot_take_tokens_back(model, tokens):
    cache = MegalodonCache()
    assert (len(cache), cache.get_max_length(), cache.batch_size, bool(cache)) == (0, -1, -1, True)
    with torch.no_grad():
        model(tokens, cache=cache)
    fork = copy.copy(cache)
    fork.batch_repeat_interleave(2)
    assert (cache.batch_size, fork.batch_size, fork.get_seq_length()) == (2, 4, 50)
    fork.crop(0)
    with pytest.raises(NotImplementedError, match=r"last 3 tokens; keep copy.copy"):
        fork.crop(3)
    fork.reset()
    assert (cache.get_seq_length(), fork.get_seq_length()) == (50, 0)
