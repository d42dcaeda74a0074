"""What a context computes: each token once, in pieces fixed by their position."""

import pytest
import torch

from megalodon_lm import ByteTokenizer, Megalodon, ModelConfig
from megalodon_lm.generation import context as context_module
from megalodon_lm.generation.context import Context, unit_length
from megalodon_lm.generation.generator import Generator
from megalodon_lm.state_file import StateFile

from .reading import GREEDY, SEEDED, TEXT, in_blocks, written


@pytest.fixture
def computed(generator, monkeypatch):
    """Lengths of all pieces that the model computes."""
    lengths, forward = [], Megalodon.forward

    def counting(self, tokens, *args, **kwargs):
        lengths.append(tokens.shape[1])
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Megalodon, "forward", counting)
    return lengths


def test_a_turn_computes_what_is_new_and_less_than_a_piece_again(generator, computed):
    """Until its first token; and what it wrote, after that, no more than the piece it completes."""
    context = generator.read(TEXT[:4000])
    written(generator, context, GREEDY)
    for _ in range(8):
        known = context.position // 512 * 512  # read and never computed again
        computed.clear()
        generator.read(TEXT[:60], context)
        stream = generator.stream([context], GREEDY)
        next(stream)
        assert sum(computed) <= context.position - known + 1
        computed.clear()
        list(stream)
        assert sum(computed) in (0, 512)


def test_forks_compute_what_they_share_once(generator, computed):
    trunk = generator.read(TEXT[:4000])
    forks = [trunk.fork() for _ in range(4)]
    computed.clear()
    generator.write(forks, SEEDED, seeds=[1, 2, 3, 4])
    assert sum(computed) == 4001 % 512


@pytest.fixture
def one_thread():
    """Short pieces would wait for threads more than compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("chunk", "piece"), [(150, 64), (64, 150), (100, 33)])
def test_pieces_and_chunks_of_any_lengths(chunk, piece, one_thread, tmp_path, monkeypatch):
    """A bookmark holds no cache, and goes on bitwise, where chunks are longer than pieces too."""
    monkeypatch.setattr(context_module, "MAX_PIECE_LENGTH", piece)
    torch.manual_seed(0)
    generator = Generator(Megalodon(ModelConfig.named("tiny", chunk_size=chunk)).eval(), ByteTokenizer())
    text = TEXT[:500]
    whole = generator.read(text)
    tokens = written(generator, whole.fork(), GREEDY)
    for at in (1, 64, 150, 151, 333):
        first = generator.read(in_blocks(text[:at], 17))
        first.save(tmp_path / "book.state", generator.tokenizer)
        file = StateFile.read(tmp_path / "book.state")
        assert file.tensors["layers.0.attention.keys"].shape[1] == 0
        assert len(file.tokens) <= unit_length(generator.model.config)
        context = Context.load(tmp_path / "book.state", generator.model, generator.tokenizer)
        assert (context.scored, context.nats) == (first.scored, first.nats)
        generator.read(text[at:], context)
        assert context.loss() == whole.loss()
        assert written(generator, context, GREEDY) == tokens
