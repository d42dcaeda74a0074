import hashlib

from hypothesis import given
from hypothesis import strategies as st

from megalodon_lm import ByteTokenizer
from megalodon_lm.data.books import bundled


@given(st.text())
def test_tokenizer_round_trip(text):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text, begin=True)
    assert tokens[0] == tokenizer.begin
    assert tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == text


def test_specials_lie_above_the_bytes():
    assert sorted(ByteTokenizer.specials.values()) == list(range(256, ByteTokenizer.vocab_size))


def test_bundled_novels():
    train, validation = bundled("train"), bundled("validation")
    assert len(train) == 8
    assert list(validation) == ["dracula"]
    assert sum(map(len, train.values())) > 15_000_000
    assert hashlib.sha256(validation["dracula"]).hexdigest().startswith("0a4bb5bd07dc")
