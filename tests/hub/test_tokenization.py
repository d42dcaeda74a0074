"""Our tokenizers in transformers: the same tokens, in folders that both sides read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

from megalodon_lm import ByteTokenizer
from megalodon_lm.data.chat import Message, encode_chat
from megalodon_lm.data.subword import SubwordTokenizer, train_bpe
from megalodon_lm.data.tokenizer import load_tokenizer
from megalodon_lm.errors import InputError
from megalodon_lm.hub import MegalodonForCausalLM
from megalodon_lm.hub.tokenization import save_tokenizer, special_tokens, transformers_tokenizer

TOKENIZERS = {
    "bytes": ByteTokenizer(),
    "subwords": SubwordTokenizer(train_bpe(["the cat sat on the mat, and the dog too; ünder the tree"] * 9, 300)),
}
BOTH = {name: (ours, transformers_tokenizer(ours)) for name, ours in TOKENIZERS.items()}
TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=40).filter(lambda text: "<|" not in text)


@pytest.mark.parametrize("name", BOTH)
@settings(deadline=None, max_examples=60)
@given(text=TEXTS)
def test_the_same_tokens_and_the_same_text(name, text):
    ours, theirs = BOTH[name]
    tokens = ours.encode(text, begin=True).tolist()
    assert theirs(text).input_ids == tokens
    assert theirs.encode(text, add_special_tokens=False) == tokens[1:]
    assert theirs.decode(tokens, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", BOTH)
def test_special_tokens_padding_and_chats(name):
    ours, theirs = BOTH[name]
    ids = special_tokens(ours)
    assert (ids["bos_token_id"], ids["eos_token_id"]) == (ours.begin, ours.end)
    padded = theirs(["the cat", "the"], padding=True)
    assert padded.attention_mask[1][0] == 0
    assert padded.input_ids[1][0] == ids["pad_token_id"]
    assert theirs.model_max_length > 10**9
    chat = [{"role": "user", "content": "the mat?"}, {"role": "assistant", "content": "the cat sat"}]
    expected, _ = encode_chat([Message(**message) for message in chat], ours)
    assert theirs.apply_chat_template(chat)["input_ids"] == expected.tolist()
    asked = theirs.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    assert asked.endswith(theirs.eos_token + "assistant\n")


@pytest.mark.parametrize("name", BOTH)
def test_a_folder_has_both(name, tmp_path):
    ours, theirs = BOTH[name]
    save_tokenizer(ours, tmp_path)
    back = load_tokenizer(tmp_path)
    assert (type(back), back.fingerprint) == (type(ours), ours.fingerprint)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("the tree, ünder").input_ids == theirs("the tree, ünder").input_ids
    assert (loaded.padding_side, loaded.pad_token_id) == ("left", theirs.pad_token_id)


def test_a_pipeline_and_a_streamer_of_text(native, tmp_path):
    ours, theirs = BOTH["bytes"]
    MegalodonForCausalLM.of(native, **special_tokens(ours)).save_pretrained(tmp_path)
    save_tokenizer(ours, tmp_path)
    writer = pipeline("text-generation", model=str(tmp_path), device="cpu")
    out = writer(["Once", "Once upon a"], max_new_tokens=12, do_sample=False, batch_size=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for prompt, [found] in zip(["Once", "Once upon a"], out, strict=True):
        tokens = model.generate(**theirs(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False)
        assert found["generated_text"] == theirs.decode(tokens[0], skip_special_tokens=True)
    streamer = TextIteratorStreamer(theirs, skip_prompt=True, skip_special_tokens=True)
    prompt = theirs("Once", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False, streamer=streamer)
    new = tokens[0, prompt.input_ids.shape[1] :]
    assert "".join(streamer) == theirs.decode(new, skip_special_tokens=True)
    assert isinstance(tokens, torch.Tensor)


def test_what_the_library_converts_by_rules_of_its_own_is_refused():
    with pytest.raises(InputError, match="SentencePiece model cannot be one of transformers"):
        transformers_tokenizer(object())
