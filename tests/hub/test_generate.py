"""`generate` writes what the native engine writes, in every mode."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from megalodon_lm.generation.context import Context
from megalodon_lm.generation.engine import DecodingEngine
from megalodon_lm.hub import MegalodonCache
from megalodon_lm.state import State

NEW = 24  # more than a chunk


def contexts(native, tokens):
    """Logits of the next tokens and the state after some texts, read as Generator reads them."""
    read = []
    for row in tokens:
        context = Context(native, "float32")
        context.read(row.numpy())
        read.append(context.finish())
    return torch.cat([logits for logits, _ in read]), State.cat([state for _, state in read])


def write(native, tokens, choose, new=NEW):
    """Texts with what the native engine adds."""
    logits, state = contexts(native, tokens)
    engine, written = DecodingEngine(native, state, "float32"), tokens
    for _ in range(new):
        chosen = choose(logits)
        written = torch.cat([written, chosen[:, None]], 1)
        logits = engine.step(chosen)
    return written


def greedy(logits):
    return logits.argmax(-1)


def draw(logits):
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def test_greedy_as_the_engine(native, model, tokens):
    expected = write(native, tokens, greedy)
    assert torch.equal(model.generate(tokens, max_new_tokens=NEW, do_sample=False), expected)
    assert torch.equal(model.generate(tokens, max_new_tokens=NEW, do_sample=False, use_cache=False), expected)
    assert torch.equal(model.generate(tokens, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=7), expected)


def test_sampling_as_the_engine(native, model, tokens):
    torch.manual_seed(5)
    expected = write(native, tokens, draw)
    torch.manual_seed(5)
    written = model.generate(tokens, max_new_tokens=NEW, do_sample=True, top_k=0)
    assert torch.equal(written, expected)
    three = model.generate(tokens, max_new_tokens=4, do_sample=True, top_k=5, top_p=0.9, num_return_sequences=3)
    assert three.shape == (6, 54)


def test_beams_as_over_the_engine(native, model, tokens):
    for row in tokens:
        logits, state = contexts(native, row[None])
        best, beams, scores = 3, row[None], torch.zeros(1)
        for _ in range(NEW):
            total = scores[:, None] + logits.log_softmax(-1)
            scores, index = total.flatten().topk(best)
            rows, chosen = index // logits.shape[1], index % logits.shape[1]
            beams = torch.cat([beams[rows], chosen[:, None]], 1)
            engine = DecodingEngine(native, state.select(rows), "float32")
            logits, state = engine.step(chosen).clone(), engine.state()
        out = model.generate(row[None], max_new_tokens=NEW, num_beams=3, do_sample=False)
        assert torch.equal(out[0], beams[0])
    out = model.generate(tokens, max_new_tokens=NEW, num_beams=3, do_sample=False, num_return_sequences=2)
    assert torch.equal(out[2], beams[0])
    assert torch.equal(out, model.generate(tokens, max_new_tokens=NEW, num_beams=3, do_sample=False,
                                           num_return_sequences=2, use_cache=False))  # fmt: skip


@pytest.mark.parametrize("mode", [{}, {"prefill_chunk_size": 7}, {"num_beams": 2}, {"use_cache": False}])
def test_padding_on_the_left_changes_nothing(model, tokens, mode):
    lengths = (50, 31)
    mask = torch.ones_like(tokens)
    mask[1, : 50 - lengths[1]] = 0
    both = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **mode)
    for row, length in enumerate(lengths):
        alone = model.generate(tokens[row : row + 1, -length:], max_new_tokens=NEW, do_sample=False, **mode)
        assert torch.equal(both[row : row + 1, -length - NEW :], alone)


def test_turns_of_a_chat_go_on_from_the_cache(model, tokens):
    first = model.generate(tokens[:, :20], max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert isinstance(first.cache, MegalodonCache)
    assert first.cache.get_seq_length() == 20 + NEW - 1
    kept, bytes_before = copy.copy(first.cache), first.cache.state.nbytes
    turn = torch.cat([first.sequences, tokens[:, 20:]], 1)
    expected = model.generate(turn, max_new_tokens=NEW, do_sample=False)
    again = model.generate(turn, max_new_tokens=NEW, do_sample=False, cache=first.cache)
    assert torch.equal(again, expected)
    assert first.cache.get_seq_length() == 73 + NEW
    assert first.cache.state.nbytes == bytes_before
    new = torch.cat([first.sequences[:, -1:], tokens[:, 20:]], 1)  # what the cache has not read is enough
    ones = torch.ones_like(turn)
    again = model.generate(new, attention_mask=ones, max_new_tokens=NEW, do_sample=False, cache=kept)
    assert torch.equal(again[:, new.shape[1] :], expected[:, -NEW:])


def test_rows_that_were_read_once_go_on_several_ways(model, tokens):
    ways = torch.tensor([[3], [5], [7], [2]])
    cache = model(tokens).cache
    cache.batch_repeat_interleave(2)
    logits = model(ways, cache=cache).logits
    for row, way in enumerate(ways):
        alone = model(way[None], cache=model(tokens[row // 2 : row // 2 + 1]).cache).logits
        assert torch.allclose(logits[row], alone[0], atol=1e-5)


def test_an_embedded_prompt(model, tokens):
    embedded = model.get_input_embeddings()(tokens).detach()
    written = model.generate(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(written, model.generate(tokens, max_new_tokens=NEW, do_sample=False)[:, 50:])


def test_a_streamer_is_given_each_token(model, tokens):
    class Kept(BaseStreamer):
        seen, ended = (), False

        def put(self, value):
            self.seen = (*self.seen, *value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Kept()
    written = model.generate(tokens[:1], max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert (list(streamer.seen), streamer.ended) == (written[0].tolist(), True)


def test_nothing_is_cut_at_a_chunk_nor_at_2048_tokens(native, model):
    tokens = torch.randint(0, 256, (1, 2500), generator=torch.Generator().manual_seed(2))
    expected = write(native, tokens, greedy)
    assert torch.equal(model.generate(tokens, max_new_tokens=NEW, do_sample=False), expected)
    out = model.generate(
        tokens, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, prefill_chunk_size=512
    )
    assert out.cache.state.position.tolist() == [2500]
    assert out.cache.state.nbytes == native.state_bytes()
    assert model.config.max_position_embeddings > 10**9
    ended = model.generate(tokens[:, :9], max_length=3000, eos_token_id=list(range(259)), pad_token_id=258)
    assert ended.shape == (1, 10)  # the end token ends it, and nothing else


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, "not supported with stateful models"),
        ({"cache": DynamicCache()}, "cache must be a MegalodonCache"),
    ],
)
def test_what_a_state_cannot_do_is_refused(model, tokens, mode, message):
    with pytest.raises(ValueError, match=message):
        model.generate(tokens, max_new_tokens=3, do_sample=False, **mode)
