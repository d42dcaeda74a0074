"""Tokenizers of every kind: tokens and text as their own libraries have them, however a text is cut."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from megalodon_lm import ByteTokenizer, Megalodon, ModelConfig
from megalodon_lm.data import spans as spans_module
from megalodon_lm.data.books import bundled
from megalodon_lm.data.spans import spans
from megalodon_lm.data.subword import SentencePieceTokenizer, SubwordTokenizer, train_bpe
from megalodon_lm.data.tokenizer import load_tokenizer
from megalodon_lm.data.tokenizer_record import RECORD
from megalodon_lm.errors import InputError
from megalodon_lm.training.inputs import find_tokenizer

from .runs import recipe

NOVEL = bundled("validation")["dracula"].decode()
LEARNT = NOVEL[20_000:60_000] + " café, 世界!\n" * 20
SPECIALS = ["<s>", "</s>", "<unk>"]
NAMES = st.sampled_from(["café", "the sea", "<s>", "</s>", "▁", "\u0301", "New York", "_", "ΟΔΟΣ", "ﬁ"])
WORDS = st.sampled_from(
    ["the", "sea", "Count", "and", "dog", " ", "  ", "\n", "\n\n", ", ", ". ", "'s", "12", "é", "世界", "🦈"]
)
TEXTS = st.lists(WORDS | NAMES | st.text(max_size=3), max_size=40).map("".join)


def alphabet():
    return sorted(set(LEARNT))


def bpe(**options):
    return models.BPE(unk_token="<unk>", fuse_unk=True, **options)


def trained(model, trainer, normalizer=None, pre_tokenizer=None, decoder=None, added=()):
    """The content of a tokenizer.json."""
    found = tokenizers.Tokenizer(model)
    for name, part in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer), ("decoder", decoder)):
        if part is not None:
            setattr(found, name, part)
    found.train_from_iterator(LEARNT.splitlines(), trainer)
    found.add_tokens(list(added))
    return found.to_str().encode()


def bpe_trainer(size=600, **options):
    return trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS, show_progress=False, **options)


ADDED = ("café", "New York", AddedToken("_", lstrip=True))


def byte_level(prefix=False, normalizer=None, added=ADDED):
    return trained(
        models.BPE(),
        bpe_trainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
        normalizer,
        pre_tokenizers.ByteLevel(add_prefix_space=prefix),
        decoders.ByteLevel(),
        added,
    )


def metaspace(scheme, model=None, trainer=None):
    return trained(
        model or bpe(), trainer or bpe_trainer(), None, pre_tokenizers.Metaspace(prepend_scheme=scheme),
        decoders.Metaspace(prepend_scheme=scheme), ["café", AddedToken("New York", normalized=False)],
    )  # fmt: skip


def unigram():
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False, initial_alphabet=alphabet()
    )
    return metaspace("always", models.Unigram(), trainer)


def llama():
    """BPE over whole texts with byte fallback, as converted from SentencePiece."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    content = json.loads(trained(bpe(), bpe_trainer(900), normalizers.Replace(" ", "▁"), pre_tokenizers.Metaspace()))
    vocabulary = content["model"]["vocab"]
    for piece in bytes_:
        vocabulary.setdefault(piece, len(vocabulary))
    content["model"]["byte_fallback"] = True
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    content["pre_tokenizer"] = None
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return json.dumps(content).encode()


def suffixes():
    return trained(
        bpe(end_of_word_suffix="</w>"), bpe_trainer(end_of_word_suffix="</w>"), normalizers.Lowercase(),
        pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder(suffix="</w>"),
    )  # fmt: skip


def word_pieces():
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIALS, show_progress=False)
    normalizer = normalizers.BertNormalizer(lowercase=True)
    return trained(
        models.WordPiece(unk_token="<unk>"),
        trainer,
        normalizer,
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )


def words():
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIALS, show_progress=False)
    return trained(models.WordLevel(unk_token="<unk>"), trainer, None, pre_tokenizers.Whitespace())


def stripped():
    content = json.loads(byte_level())
    content["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    return json.dumps(content).encode()


FILES = {
    "byte level": byte_level,
    "byte level, space first": lambda: byte_level(prefix=True),
    "byte level, NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte level, NFKC, lowercase": lambda: byte_level(
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "byte level, replace": lambda: byte_level(normalizer=normalizers.Replace(tokenizers.Regex(r"\s+"), " "), added=()),
    "byte level, stripped": stripped,
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, never": lambda: metaspace("never"),
    "unigram": unigram,
    "byte fallback": llama,
    "end of word": suffixes,
    "word pieces": word_pieces,
    "words, no decoder": words,
}


def sentence_piece(**options):
    found = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LEARNT.splitlines()), model_writer=found, minloglevel=2, hard_vocab_limit=False,
        **{"vocab_size": 700, "model_type": "bpe", "byte_fallback": True} | options,
    )  # fmt: skip
    return found.getvalue()


MODELS = {
    "as Llama": dict(normalization_rule_name="identity", remove_extra_whitespaces=False),
    "as Gemma": dict(add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False),
    "no prefix, spaces removed": dict(add_dummy_prefix=False),
    "spaces removed": dict(),
    "no bytes": dict(byte_fallback=False, user_defined_symbols=["café", "New York"]),
    "unigram": dict(model_type="unigram", vocab_size=500),
    "suffixes": dict(treat_whitespace_as_suffix=True),
}


class Kind:
    """A tokenizer of the package and its library's."""

    def __init__(self, name):
        if name in FILES:
            self.ours = SubwordTokenizer(FILES[name](), name)
            library = tokenizers.Tokenizer.from_buffer(self.ours.content)
            library.encode_special_tokens = True
            self.encode = lambda text: library.encode(text, add_special_tokens=False).ids
            self.decode = library.decode
        else:
            self.ours = SentencePieceTokenizer(sentence_piece(**MODELS[name]), name)
            library = sentencepiece.SentencePieceProcessor(model_proto=self.ours.content)
            self.encode, self.decode = library.encode, library.decode


@pytest.fixture(scope="module", params=[*FILES, *MODELS])
def kind(request):
    return Kind(request.param)


@pytest.fixture
def short(monkeypatch):
    """Spans and what is looked at around a cut, short enough to matter in a sentence."""
    monkeypatch.setattr(spans_module, "SPAN", 8)
    monkeypatch.setattr(spans_module, "MARGIN", 24)
    monkeypatch.setattr(spans_module, "PATIENCE", 1000)


def in_spans(tokenizer, text, size=7):
    raw = text.encode()
    blocks = (raw[at : at + size] for at in range(0, len(raw), size))
    return np.concatenate([np.zeros(0, np.int64), *tokenizer.encode_blocks(blocks)]).tolist()


def spelled(kind, text):
    """Whether the library alone would take a special token from a text."""
    return bool(set(kind.encode(text)) & {kind.ours.begin, kind.ours.end})


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_a_text_in_blocks_gives_the_tokens_of_the_whole(kind, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans_module, "SPAN", 8)
        patch.setattr(spans_module, "MARGIN", 24)
        try:
            found = in_spans(kind.ours, text)
        except InputError:  # what a word is may depend on its last letter
            assert max(map(len, text.split())) >= spans_module.MARGIN
            return
    whole = kind.ours.encode(text).tolist()
    assert found == whole
    assert not {kind.ours.begin, kind.ours.end} & set(whole)
    if not spelled(kind, text):
        assert whole == kind.encode(text)


def test_a_novel_gives_the_tokens_of_its_library(kind, monkeypatch):
    monkeypatch.setattr(spans_module, "SPAN", 1000)
    text = NOVEL[:30_000]
    assert in_spans(kind.ours, text, 777) == kind.encode(text)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_token_by_token_the_text_is_that_of_the_library(kind, text):
    tokens = kind.ours.encode(text).tolist()
    expected = kind.decode(tokens)
    if "\ufffd" not in expected:
        assert kind.ours.decode(tokens) == expected
    assert kind.ours.decode([kind.ours.begin, *tokens]) == kind.ours.decode(tokens)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, at=st.integers(0, 40))
def test_what_is_written_behind_a_prompt_joins_it(kind, text, at):
    """The text of some tokens and, after the last of them, of the rest: together that of all."""
    tokens = kind.ours.encode(text).tolist()
    at = min(at, len(tokens))
    first, rest = tokens[:at], tokens[at:]
    whole = kind.ours.decode_bytes(tokens)
    if kind.ours.decode_bytes(first) and not kind.ours.is_silent(first[-1]):
        assert kind.ours.decode_bytes(first) + kind.ours.decode_bytes(rest, first[-1]) == whole


@settings(max_examples=20, deadline=None)
@given(text=TEXTS, half=st.sampled_from(["\ud83d", "\udd88", "\udcff"]))
def test_half_a_character_is_replaced(kind, text, half):
    """As in JSON that was cut within one; two halves are a whole."""
    for tokenizer in (kind.ours, ByteTokenizer()):
        assert np.array_equal(tokenizer.encode(text + half + " x"), tokenizer.encode(text + "\ufffd x"))
        assert np.array_equal(tokenizer.encode(text + "\ud83e\udd88"), tokenizer.encode(text + "🦈"))


def test_added_words_are_text():
    """In a vocabulary of bytes too, whose library takes their letters for bytes."""
    tokenizer = SubwordTokenizer(byte_level())
    text = "A café in New York"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("café")) == 1


def test_a_cut_in_a_long_run_of_one_letter_is_exact(short):
    """Where tokens of several letters end depends on where the run began."""
    model = models.BPE(
        vocab={"<s>": 0, "</s>": 1, "a": 2, "aa": 3, "aaaa": 4, "b": 5}, merges=[("a", "a"), ("aa", "aa")]
    )
    runs = tokenizers.Tokenizer(model)
    runs.add_special_tokens(["<s>", "</s>"])
    ours = SubwordTokenizer(runs.to_str().encode())
    for text in ("a" * 203, "b" + "a" * 301 + "b" * 50, "ab" * 100):
        assert in_spans(ours, text) == runs.encode(text).ids


def test_what_cannot_be_cut_is_refused(monkeypatch):
    monkeypatch.setattr(spans_module, "SPAN", 8)
    with pytest.raises(ValueError, match="cannot be cut without changing a token"):
        list(spans(["x" * 1000], lambda text, at: False))


def test_spans_are_the_text():
    assert "".join(span for _, span in spans([NOVEL])) == NOVEL
    assert max(len(span) for _, span in spans([NOVEL])) <= spans_module.SPAN


def test_decoders_that_need_more_than_a_token_are_refused():
    content = json.loads(byte_level())
    content["decoder"] = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    with pytest.raises(ValueError, match="decodes by CTC"):
        SubwordTokenizer(json.dumps(content).encode())


HTML = "<s>old</s> <s>new</s> <b>bold</b>\n" * 50


def learnt_from_html(special):
    """Byte-level BPE with the pieces <s> and </s>, which are special by name at most."""
    content = json.loads(train_bpe([HTML], 300).replace(b"<|begin|>", b"<bos>").replace(b"<|end|>", b"<eos>"))
    model = content["model"]
    for left, right in (("<", "s"), ("<s", ">"), ("<", "/"), ("</", "s"), ("</s", ">")):
        if left + right not in model["vocab"]:
            model["vocab"][left + right] = len(model["vocab"])
    model["merges"] = [["<", "s"], ["<s", ">"], ["<", "/"], ["</", "s"], ["</s", ">"]]
    content["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    marked = [{**content["added_tokens"][0], "content": name, "id": model["vocab"][name]} for name in special]
    content["added_tokens"] = marked
    return SubwordTokenizer(json.dumps(content).encode())


def test_only_marked_tokens_are_special():
    """The vocabulary has learnt <s> and </s> as words; its special tokens have other names."""
    tokenizer = learnt_from_html(["<bos>", "<eos>"])
    assert len(tokenizer.encode("</s>")) == 1
    assert tokenizer.decode(tokenizer.encode("a<s></s>")) == "a<s></s>"
    assert {tokenizer.begin, tokenizer.end} == {0, 1}


@pytest.mark.parametrize("special", [["<s>", "</s>"], ["</s>"]])
def test_no_text_spells_a_special_token(special):
    """The special tokens are pieces of the vocabulary, and merges lead to them."""
    tokenizer = learnt_from_html(special)
    library = tokenizers.Tokenizer.from_buffer(tokenizer.content)
    library.encode_special_tokens = True
    assert library.token_to_id("</s>") in library.encode("a</s>").ids
    tokens = tokenizer.encode("a<s></s>", begin=True)
    assert not {tokenizer.begin, tokenizer.end} & set(tokens[1:].tolist())
    assert tokenizer.decode(tokens) == "a<s></s>"


def test_unmarked_names_make_no_special_token():
    content = json.loads(train_bpe([HTML], 300))
    for token in content["added_tokens"]:
        token["special"] = False
    with pytest.raises(ValueError, match="has none of the special tokens"):
        SubwordTokenizer(json.dumps(content).encode())


def test_a_sentencepiece_model_without_an_end_token_ends_with_its_begin():
    tokenizer = SentencePieceTokenizer(sentence_piece(eos_id=-1), "x")
    assert tokenizer.begin == tokenizer.end >= 0


def test_dropout_of_training_is_off():
    content = json.loads(byte_level())
    content["model"]["dropout"] = 0.5
    tokenizer = SubwordTokenizer(json.dumps(content).encode())
    assert len({tuple(tokenizer.encode(NOVEL[:500]).tolist()) for _ in range(5)}) == 1


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: SubwordTokenizer(byte_level()),
                                  lambda: SentencePieceTokenizer(sentence_piece(), "x")])  # fmt: skip
def test_a_model_may_write_text_and_its_ends(make):
    tokenizer = make()
    size = tokenizer.vocab_size
    found = tokenizer.writable(size + 5)
    assert not found[size:].any()
    assert found[[tokenizer.begin, tokenizer.end]].all()
    silent = [t for t in range(size) if not tokenizer.decode_bytes([t], after=int(tokenizer.encode("sea")[-1]))]
    assert not found[[t for t in silent if t not in tokenizer.ends]].any()
    assert found[tokenizer.encode("the sea")].all()


def saved(folder, tokenizer, vocab_size=None):
    Megalodon(ModelConfig.named("tiny", vocab_size=vocab_size or tokenizer.vocab_size)).save(folder)
    tokenizer.save(folder)
    return folder


def test_a_folder_keeps_what_the_file_of_a_tokenizer_does_not_say(tmp_path):
    """Which of its special tokens begin and end a text, and whether texts begin with one: in training here they do."""
    ours = SubwordTokenizer(train_bpe([LEARNT], 400), begin="<|pad|>", end="<|begin|>", begins=False)
    folder = saved(tmp_path / "model", ours)
    back = load_tokenizer(folder)
    assert (back.begin, back.end) == (ours.begin, ours.end) == (2, 0)
    assert not back.begins
    model = {"vocab_size": ours.vocab_size}
    begun = find_tokenizer(recipe(tmp_path, model, {"tokenizer": str(folder)}), None)
    assert begun.begins
    begun.save(tmp_path)
    assert load_tokenizer(tmp_path).begins
    assert load_tokenizer(tmp_path).end == ours.end


def test_a_model_knows_its_tokenizer(tmp_path):
    ours, other = SubwordTokenizer(train_bpe([LEARNT], 400)), SubwordTokenizer(train_bpe([HTML + LEARNT], 400))
    folder = saved(tmp_path / "model", ours)
    assert load_tokenizer(folder).fingerprint == ours.fingerprint
    (folder / "tokenizer.json").write_bytes(other.content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer the model was trained with"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        load_tokenizer(folder)
    step = saved(folder / "checkpoints" / "step-1", ByteTokenizer())
    (step / RECORD).unlink()
    (folder / "tokenizer.json").write_bytes(ours.content)
    assert load_tokenizer(step).fingerprint == ours.fingerprint


@pytest.mark.parametrize(
    ("size", "tokenizer", "fits"),
    [(259, None, True), (320, None, True), (300, None, False), (4096, None, False), (400, 400, True), (448, 400, True),
     (4096, 400, False), (399, 400, False)],
)  # fmt: skip
def test_without_a_record_the_sizes_decide(size, tokenizer, fits, tmp_path):
    """As in folders of older versions: padding to a multiple of 64 is no contradiction."""
    Megalodon(ModelConfig.named("tiny", vocab_size=size)).save(tmp_path)
    if tokenizer:
        (tmp_path / "tokenizer.json").write_bytes(train_bpe([LEARNT], tokenizer))
    if fits:
        assert load_tokenizer(tmp_path).vocab_size == (tokenizer or 259)
    else:
        with pytest.raises(
            ValueError, match=r"put the tokenizer\.json or tokenizer\.model of the model into the folder"
        ):
            load_tokenizer(tmp_path)


def test_prepared_folders_of_older_versions_keep_their_tokenizer(tmp_path):
    (tmp_path / "prepared.json").write_text("{}")
    assert load_tokenizer(tmp_path).fingerprint == ByteTokenizer().fingerprint
    (tmp_path / "tokenizer.json").write_bytes(train_bpe([LEARNT], 400))
    assert load_tokenizer(tmp_path).vocab_size == 400


def test_a_broken_record_is_refused(tmp_path):
    for content in ("{", "[1]", "7", b"\xff"):
        (tmp_path / RECORD).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=r"tokenizer_record\.json cannot be read"):
            load_tokenizer(tmp_path)


def test_a_folder_of_anything_else_is_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_name_in_a_normalizer_makes_no_tokenizer_of_bytes():
    """What words are made of is told by the parts of a tokenizer, not by texts that they hold."""
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIALS, show_progress=False)
    rename = normalizers.Replace("ByteLevel", "Count")
    found = SubwordTokenizer(trained(models.WordLevel(unk_token="<unk>"), trainer, rename, pre_tokenizers.Whitespace()))
    assert found.byte(int(found.encode("ByteLevel")[0])) is None
    assert found.decode(found.encode("the ByteLevel and the sea")) == "the Count and the sea"


@pytest.mark.parametrize("before", [[], [pre_tokenizers.Digits()]])
def test_without_a_decoder_its_encoder_tells_that_pieces_spell_bytes(before):
    steps = [*before, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    trainer = bpe_trainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    found = SubwordTokenizer(trained(models.BPE(), trainer, None, pre_tokenizers.Sequence(steps)))
    text = "Grüße, 世界 12 🦈"
    assert found.decode(found.encode(text)) == text
