"""Models of transformers as LanguageModels."""

import copy
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from megalodon_lm import Context, Generator, Sampling
from megalodon_lm.errors import InputError
from megalodon_lm.hub.transformers_model import TransformersModel, load_transformers
from megalodon_lm.state import State

SIZES = dict(vocab_size=259, hidden_size=32, num_hidden_layers=2)
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                         max_position_embeddings=64),
    "gpt2": GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "sliding": MistralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                             sliding_window=8, max_position_embeddings=64),
    "mamba": MambaConfig(**SIZES, state_size=4),
}  # fmt: skip


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    torch.manual_seed(0)
    return TransformersModel(Auto.from_config(copy.deepcopy(CONFIGS[request.param]))).eval()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return TransformersModel(Auto.from_config(copy.deepcopy(CONFIGS["llama"]))).eval()


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(4))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_any_cut_gives_what_the_library_gives_for_the_whole(model, text):
    expected = model.inner(text).logits
    state, found = None, []
    for piece in text.split([1, 13, 1, 25], 1):
        logits, state = model(piece, state)
        found.append(logits)
    close(torch.cat(found, 1), expected)
    assert state.position.tolist() == [40] * 3
    losses, _ = model(text[:, :-1], targets=text[:, 1:], reduction="none")
    close(losses, torch.nn.functional.cross_entropy(expected[:, :-1].mT, text[:, 1:], reduction="none"))


@torch.no_grad()
def test_states_are_values(model, text):
    _, state = model(text[:, :20])
    kept = {name: t.clone() for name, t in state.tensors().items()}
    expected, _ = model(text[:, 20:], state)
    again, _ = model(text[[2, 0], 20:], state.select([2, 0]))
    close(again, expected[[2, 0]])
    joined = State.cat(state.split())
    close(model(text[:, 20:], joined)[0], expected)
    for change in (state.detach(), state.clone(), state.to("cpu")):
        close(model(text[:, 20:], change)[0], expected)
    assert all(torch.equal(t, kept[name]) for name, t in state.tensors().items())
    assert state.nbytes == sum(t.nbytes for t in kept.values())


@torch.no_grad()
def test_rows_of_different_lengths_are_joined_or_refused(model, text):
    states = [model(text[:1, :9])[1], model(text[1:2, :31])[1]]
    new = text[:2, 31:36]
    if not states[0].grows_by_columns and not states[0].is_recurrent:
        with pytest.raises(InputError, match="different lengths cannot be continued"):
            State.cat(states)
        return
    logits, after = model(new, State.cat(states))
    for row, state in enumerate(states):
        close(logits[row : row + 1], model(new[row : row + 1], state)[0])
    assert after.position.tolist() == [14, 36]


@torch.no_grad()
def test_padding_and_documents_within_a_row(model, text):
    starts = torch.zeros_like(text, dtype=torch.bool)
    sliding = "Mistral" in model.summary
    starts[0, 10] = starts[1, 10 if sliding else 25] = starts[2, 10] = True
    logits, state = model(text, document_starts=starts)
    close(logits[0, 10:], model(text[:1, 10:])[0][0])
    close(logits[1, :10], model(text[1:2, :10])[0][0])
    if sliding:
        with pytest.raises(InputError, match="different lengths cannot be continued"):
            model(text, document_starts=starts & (torch.arange(3) > 0)[:, None])
    mask = torch.ones_like(text, dtype=torch.bool)
    mask[0, :12] = mask[1, 30:] = False
    if not state.grows_by_columns:
        with pytest.raises(InputError, match="would read padding"):
            model(text, mask=mask)
        return
    logits, state = model(text, mask=mask)
    close(logits[0, 12:], model(text[:1, 12:])[0][0])
    close(logits[1, :30], model(text[1:2, :30])[0][0])
    assert state.position.tolist() == [28, 30, 40]
    close(model(text[1:2, 30:], state.select([1]))[0], model(text[1:2])[0][:, 30:])


@torch.no_grad()
def test_more_than_the_window_is_refused_in_one_line(llama, text):
    _, state = llama(text)
    with pytest.raises(InputError, match=r"65 tokens are more than the window of 64 that this model has; cut the text"):
        llama(text[:, :25], state)
    with pytest.raises(InputError, match="outside the vocabulary of 259"):
        llama(text + 200)
    with pytest.raises(InputError, match="cannot be saved"):
        state.save("state")


def test_what_evaluators_ask(model):
    assert model.config.window == (None if "Mamba" in model.summary else 64)
    assert model.config.num_parameters == sum(p.numel() for p in model.inner.parameters())
    assert len(model.layers) == 2
    assert model.width == 32
    assert model.fingerprint() == TransformersModel(copy.deepcopy(model.inner)).fingerprint()
    assert model.state_bytes(2) > 0
    with pytest.raises(InputError, match="loaded from its folder"):
        type(model.config).sized(100, 259)


def byte_level(path):
    """A tokenizer of bytes with begin and end tokens of unusual names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: token for token, piece in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|from|>", eos_token="<|till|>").save_pretrained(
        path
    )


def test_a_folder_reads_and_writes_like_a_native_one(llama, tmp_path):
    llama.save(tmp_path)
    byte_level(tmp_path)
    model, tokenizer = load_transformers(tmp_path)
    assert (tokenizer.begin, tokenizer.end) == (256, 257)
    assert model.fingerprint() == llama.fingerprint()
    prompts = ["Once upon", "A b"]
    generator = Generator(model, tokenizer, "float32")
    written = generator.write(prompts, Sampling(temperature=0, max_tokens=9))
    for prompt, text in zip(prompts, written, strict=True):
        tokens = torch.from_numpy(tokenizer.encode(prompt, begin=tokenizer.begins))[None]
        out = llama.inner.generate(tokens, max_new_tokens=9, do_sample=False, pad_token_id=0, bad_words_ids=[[258]])
        assert tokenizer.decode(out[0, tokens.shape[1] :].tolist(), int(tokens[0, -1])).startswith(text)
    context = Context(model, "float32")
    context.read(tokenizer.encode("What was read " * 3, begin=True))
    assert context.loss() == pytest.approx(5.5, abs=0.4)


def test_no_model_is_one_line(tmp_path):
    with pytest.raises(InputError, match="is no model that transformers can load"):
        load_transformers(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    "MEGALODON_SMOLLM2" not in os.environ, reason="MEGALODON_SMOLLM2 names the GGUF file of a real model"
)
def test_a_gguf_file_of_a_real_model():
    model, tokenizer = load_transformers(Path(os.environ["MEGALODON_SMOLLM2"]), dtype=torch.float32)
    [text] = Generator(model, tokenizer, "float32").write(["The capital of France is"], Sampling(4, temperature=0))
    assert "Paris" in text
