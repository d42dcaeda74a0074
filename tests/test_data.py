import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon_lm import ByteTokenizer
from megalodon_lm.data.books import bundled
from megalodon_lm.data.corpus import read_documents


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


def test_folder_of_texts_is_read_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "ignored.md"):
        (tmp_path / name).write_text(name)
    assert list(read_documents([str(tmp_path)]).values()) == [b"a.txt", b"b.txt"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no text given"),
        (["missing.txt"], "no such file: missing.txt"),
        (["bundled:nosuch"], "no bundled split 'nosuch'"),
    ],
)
def test_unusable_sources_are_refused(sources, message):
    with pytest.raises(ValueError, match=message):
        read_documents(sources)


def test_empty_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="is empty"):
        read_documents([str(tmp_path / "empty.txt")])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        read_documents([str(tmp_path / "folder")])
