import gzip
import hashlib
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard

from megalodon_lm import ByteTokenizer
from megalodon_lm.data import prepare as prepare_module
from megalodon_lm.data import spans as spans_module
from megalodon_lm.data.books import bundled
from megalodon_lm.data.mixture import load_mixture
from megalodon_lm.data.prepare import FAULTS, LEFT_OUT, prepare
from megalodon_lm.data.shards import Prepared
from megalodon_lm.data.spans import SPAN
from megalodon_lm.data.subword import train_bpe
from megalodon_lm.data.tokenizer import load_tokenizer
from megalodon_lm.errors import InputError

from .processes import megalodon, wait_until
from .test_tokenizers import MODELS, sentence_piece

NOVELS = {name: text[:250_000] for name, text in bundled("train").items()}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_bytes(train_bpe((text[:100_000].decode() for text in NOVELS.values()), 1000))
    return path


def write_text(folder):
    folder.mkdir()
    for i, text in enumerate(NOVELS.values()):
        (folder / f"{i}.txt").write_bytes(text)


def lines():
    return "".join(json.dumps({"text": text.decode(), "id": name}) + "\n" for name, text in NOVELS.items()).encode()


def write_jsonl(folder):
    folder.mkdir()
    (folder / "all.jsonl").write_bytes(lines())


def write_gzip(folder):
    folder.mkdir()
    (folder / "all.jsonl.gz").write_bytes(gzip.compress(lines()))


def write_zstd(folder):
    folder.mkdir()
    (folder / "all.jsonl.zst").write_bytes(zstandard.compress(lines()))


def write_parquet(folder):
    folder.mkdir()
    table = pyarrow.table({"text": [text.decode() for text in NOVELS.values()]})
    pyarrow.parquet.write_table(table, folder / "all.parquet", row_group_size=3)


def tokens_of(folder):
    prepared = Prepared.open(folder, verify=True)
    return np.concatenate(prepared.tokens)


@pytest.mark.parametrize("write", [write_text, write_jsonl, write_gzip, write_zstd, write_parquet])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_format_gives_the_same_tokens(write, kind, bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 1_000_000)
    tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(bpe)
    write(tmp_path / "source")
    made = prepare([str(tmp_path / "source")], tmp_path / "out", str(bpe) if kind == "bpe" else "bytes", workers=1)
    expected = np.concatenate([tokenizer.encode(text, begin=True) for text in NOVELS.values()])
    assert np.array_equal(tokens_of(tmp_path / "out"), expected)
    assert (made["documents"], made["faults"], made["tokens"]) == (len(NOVELS), 0, len(expected))
    assert load_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint
    mixture = load_mixture([str(tmp_path / "out")], [], tokenizer, seed=0)
    assert len(mixture.sequences[0]) == len(expected)


def test_spans_encode_as_the_whole(bpe):
    tokenizer = load_tokenizer(bpe)
    text = next(iter(NOVELS.values())).decode()
    assert len(text) > 3 * SPAN
    assert tokenizer.encode(text).tolist() == tokenizer._tokenizer.encode(text).ids
    blocks = [text.encode()[at : at + 777] for at in range(0, len(text.encode()), 777)]
    assert np.concatenate(list(tokenizer.encode_blocks(blocks))).tolist() == tokenizer.encode(text).tolist()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_sentencepiece_model_encodes_as_its_own_library(tmp_path):
    """A whole novel, in spans and prepared: the same tokens as from the library in one go, and the same text back."""
    model = tmp_path / "tiny.model"
    model.write_bytes(sentence_piece(**MODELS["as Llama"]))
    tokenizer = load_tokenizer(model)
    assert (tokenizer.vocab_size, tokenizer.begin, tokenizer.end) == (700, 1, 2)
    text = next(iter(NOVELS.values())).decode()
    whole = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(text)
    assert tokenizer.encode(text).tolist() == whole
    assert tokenizer.decode(whole) == text
    assert tokenizer.decode(tokenizer.encode("Grüße, 世界 🦈\n  <s>")) == "Grüße, 世界 🦈\n  <s>"
    (tmp_path / "a.txt").write_bytes(text.encode())
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", str(model), workers=1)
    assert tokens_of(tmp_path / "out").tolist() == [tokenizer.begin, *whole]
    assert load_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint


def test_special_tokens_in_a_text_are_text(bpe):
    tokenizer = load_tokenizer(bpe)
    tokens = tokenizer.encode("<|end|>", begin=True)
    assert tokens[0] == tokenizer.begin
    assert tokenizer.end not in tokens
    assert tokenizer.decode(tokens) == "<|end|>"
    assert tokenizer.decode_bytes([tokenizer.begin, tokenizer.end]) == b""


def test_faults_are_counted_with_their_places(tmp_path):
    good = [json.dumps({"text": f"line {i}"}).encode() for i in range(4)]
    bad = [b"{not json", b'{"other": 1}', b'{"text": 5}', b"[]", b'{"text": "lone \\ud800"}', b""]
    (tmp_path / "some.jsonl").write_bytes(b"\n".join([good[0], *bad, *good[1:]]) + b"\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 and more")
    made = prepare([str(tmp_path)], tmp_path / "out", workers=1)
    faults = [json.loads(line) for line in (tmp_path / "out" / FAULTS).read_text().splitlines()]
    assert made["faults"] == len(faults) == 6
    assert faults[0] == {"path": str(tmp_path / "latin.txt"), "byte": 3, "reason": "not utf-8", "outcome": "mended"}
    assert [f["line"] for f in faults[1:]] == [2, 3, 4, 5, 6]
    assert [f["outcome"] for f in faults[1:]] == ["left out"] * 4 + ["mended"]
    text = bytes(t for t in tokens_of(tmp_path / "out") if t < 256).decode()
    assert text == "caf\ufffd and moreline 0lone \ufffdline 1line 2line 3"
    again = prepare([str(tmp_path / "latin.txt")], tmp_path / "latin", encoding="latin-1", workers=1)
    assert again["faults"] == 0
    assert bytes(t for t in tokens_of(tmp_path / "latin") if t < 256).decode() == "café and more"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_obeyed(encoding, tmp_path):
    text = "Grüße, 世界 🦈 " * 20_000
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", workers=1)
    assert bytes(t for t in tokens_of(tmp_path / "out") if t < 256).decode() == text


def test_damaged_compressed_file_is_reported(tmp_path):
    whole = gzip.compress(lines())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    made = prepare([str(tmp_path / "cut.jsonl.gz")], tmp_path / "out", workers=1)
    assert made["documents"] >= 1
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / FAULTS).read_text().splitlines()]
    assert any("damaged" in reason for reason in reasons)


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


SMALL_SHARDS = (
    "import sys; from pathlib import Path; from megalodon_lm.data import prepare as p; p.SHARD_BYTES = 1_000_000\n"
)


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_interrupted_preparation_goes_on_to_the_same_shards(kills, tmp_path):
    """Real processes, killed at random moments."""
    rng = random.Random(0)
    with (tmp_path / "big.jsonl").open("wb") as file:
        for _ in range(30):
            file.write(json.dumps({"text": rng.randbytes(200_000).hex()}).encode() + b"\n")
    code = SMALL_SHARDS + "p.prepare(['big.jsonl'], Path(sys.argv[1]), workers=1)"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code, "whole"], cwd=tmp_path, check=True)
    took = time.monotonic() - began
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", code, "parts"], cwd=tmp_path)
        time.sleep(rng.uniform(0.3, 1) * took)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", code, "parts"], cwd=tmp_path, check=True)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_killed_without_its_workers_it_goes_on_beside_them(tmp_path):
    """As when the system is out of memory: the command dies, its workers learn of it a moment later."""
    document = json.dumps({"text": random.Random(0).randbytes(200_000).hex()}).encode() + b"\n"
    (tmp_path / "big.jsonl").write_bytes(document * 30)
    code = SMALL_SHARDS + "p.prepare(['big.jsonl'], Path(sys.argv[1]), workers=int(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", code, "whole", "1"], cwd=tmp_path, check=True)
    process = subprocess.Popen([sys.executable, "-c", code, "parts", "2"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_until(lambda: any((tmp_path / "parts").glob("0*.json")), process)
    process.kill()
    process.wait()
    subprocess.run([sys.executable, "-c", code, "parts", "2"], cwd=tmp_path, check=True)
    Prepared.open(tmp_path / "parts", verify=True)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["prepared.json", pytest.param(".00*.tokens.*", marks=pytest.mark.slow)])
def test_ctrl_c_ends_the_workers_without_a_word_or_another_shard(moment, tmp_path):
    """While they start, and while they work for some seconds: a terminal tells all processes."""
    document = json.dumps({"text": random.Random(0).randbytes(1_500_000).hex()}).encode() + b"\n"
    (tmp_path / "big.jsonl").write_bytes(document * 4)
    (tmp_path / "tokenizer.json").write_bytes(train_bpe(["0123456789abcdef" * 10], 300))
    code = SMALL_SHARDS + (
        "from megalodon_lm.cli.main import main\n"
        "main(['prepare', 'big.jsonl', '--out', 'out', '--tokenizer', 'tokenizer.json', '--workers', '2'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: any((tmp_path / "out").glob(moment)), process)
    time.sleep(0.3 * (moment == "prepared.json"))
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert said == "megalodon: interrupted\n"
    assert not list((tmp_path / "out").glob("0*.json"))


def test_a_document_that_the_tokenizer_refuses_is_named(tmp_path, monkeypatch):
    """A long run of one character, of which there are tokens longer than what is looked at around a cut."""
    monkeypatch.setattr(spans_module, "SPAN", 512)
    monkeypatch.setattr(spans_module, "MARGIN", 32)
    (tmp_path / "tokenizer.json").write_bytes(train_bpe(["=" * 3000], 300))
    first, run = "Short.", "=" * 20_000
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (first, run)))
    pyarrow.parquet.write_table(pyarrow.table({"text": [first, run]}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text(run)
    for name, place in {"a.jsonl": "byte 19", "a.parquet": "row 2", "a.txt": "byte 0"}.items():
        with pytest.raises(InputError, match=f"{name}, {place}: .* cannot be cut without changing a token"):
            prepare([str(tmp_path / name)], tmp_path / "out" / name, str(tmp_path / "tokenizer.json"), workers=1)


def test_a_try_that_found_no_room_leaves_none_of_it_taken(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 2_000_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write the shard .*File too large"):
            prepare([str(tmp_path / "a.txt")], tmp_path / "out", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["prepared.json"]
    assert prepare([str(tmp_path / "a.txt")], tmp_path / "out", workers=1)["tokens"] == 2_000_001


def test_a_shard_that_vanished_is_made_again(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", workers=1)
    before = digests(tmp_path / "out")
    (tmp_path / "out" / "00000.tokens").unlink()
    (tmp_path / "out" / ".prepared.json.x").touch()
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", workers=1)
    assert digests(tmp_path / "out") == before


def test_processes_side_by_side_give_the_same_shards(tmp_path):
    write_jsonl(tmp_path / "source")
    for workers in (1, 2):
        arguments = ("source/all.jsonl", "source", "--out", f"out{workers}", "--workers", workers)
        shown = megalodon("prepare", *arguments, cwd=tmp_path).stdout
        assert f"{2 * len(NOVELS)} documents" in shown
    assert digests(tmp_path / "out1") == digests(tmp_path / "out2")


def test_what_a_process_is_told_does_not_grow_with_the_number_of_files(tmp_path, monkeypatch):
    told = []

    class Weighed(ThreadPoolExecutor):
        def __init__(self, workers, context, initializer):
            super().__init__(workers)

        def submit(self, function, *arguments):
            told.append(len(pickle.dumps(arguments)))
            return super().submit(function, *arguments)

    monkeypatch.setattr(prepare_module, "ProcessPoolExecutor", Weighed)
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 4)
    for number in range(100):
        (tmp_path / f"{number:03d}.txt").write_text("text")
    sources = sorted(map(str, tmp_path.glob("*.txt")))
    for count in (2, 100):
        assert prepare(sources[:count], tmp_path / f"out{count}", workers=2)["documents"] == count
    assert len(told) == 102
    assert max(told) < 2 * told[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), r"00000\.tokens has \d+ bytes, not \d+"),
        (lambda p: p.write_bytes(b"\7" + p.read_bytes()[1:]), r"00000\.tokens was altered"),
        (Path.unlink, r"00000\.tokens is missing"),
    ],
)
def test_altered_shards_are_refused(change, message, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", workers=1)
    change(tmp_path / "out" / "00000.tokens")
    with pytest.raises(ValueError, match=message):
        Prepared.open(tmp_path / "out", verify=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": ["missing.txt"]}, "no such file"),
        ({"sources": []}, "no text given"),
        ({"encoding": "klingon"}, "unknown encoding"),
        ({"tokenizer": "missing.json"}, "cannot read the tokenizer"),
        ({"out": "a.txt"}, "cannot create the folder"),
        ({"out": "."}, "is not empty"),
    ],
)
def test_unusable_requests_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    request = {"sources": ["a.txt"], "out": "out", "workers": 1} | arguments
    with pytest.raises(ValueError, match=message):
        prepare(**request | {"out": Path(request["out"])})


def test_another_request_for_the_same_folder_is_refused(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("some text")
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", workers=1)
    before = digests(tmp_path / "out")
    with pytest.raises(ValueError, match="begun with other files"):
        prepare([str(tmp_path / "b.txt")], tmp_path / "out", workers=1)
    assert digests(tmp_path / "out") == before


def test_more_shards_than_files_may_be_open(tmp_path):
    """A process of its own, for its limit: 310 shards of chats, three files each, under a limit of 300 open ones."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a" * 40}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 310)
    code = """
import os
import resource
from pathlib import Path
from megalodon_lm import ByteTokenizer
from megalodon_lm.data import prepare
from megalodon_lm.data.mixture import load_mixture
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
prepare.SHARD_BYTES = 120
os.fsync = lambda file: None  # there are thousands
manifest = prepare.prepare(["chats.jsonl"], Path("out"), chats=True, workers=1)
sequence = load_mixture(["out"], [], ByteTokenizer(), 0).sequences[0]
whole = sequence.read(0, len(sequence))
print(len(manifest["shards"]), whole.starts.sum(), (whole.tokens == ord("a")).sum(), whole.learnt.sum())
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    shards, documents, letters, learnt = map(int, run.stdout.split())
    assert shards > 300
    assert (documents, letters, learnt) == (310, 310 * 42, 310 * 41)


def test_a_shard_replaced_while_it_is_in_use_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", workers=1)
    prepared = Prepared.open(tmp_path / "out")
    (tmp_path / "new").write_bytes((tmp_path / "out" / "00000.tokens").read_bytes())
    (tmp_path / "new").replace(tmp_path / "out" / "00000.tokens")
    with pytest.raises(ValueError, match="replaced while it was in use"):
        prepared.tokens[0]


def test_an_altered_manifest_or_record_is_not_believed(tmp_path):
    """Whatever value is changed: the manifest is refused, and a shard with such a record is made again."""
    (tmp_path / "a.txt").write_text("some words")
    out = tmp_path / "out"
    made = prepare([str(tmp_path / "a.txt")], out, workers=1)
    for name in ("prepared.json", "00000.json"):
        path = out / name
        before = path.read_bytes()
        for key in json.loads(before):
            for value in (None, -1, [], "x"):
                path.write_text(json.dumps({**json.loads(before), key: value}))
                if name == "prepared.json":
                    with pytest.raises(InputError, match=r"truncated or altered.*prepare the text again"):
                        Prepared.open(out)
                else:
                    assert prepare([str(tmp_path / "a.txt")], out, workers=1) == made
        path.write_bytes(before)
    assert len(Prepared.open(out).tokens[0]) == 11


def faults_of(folder):
    return [json.loads(line) for line in (folder / FAULTS).read_text().splitlines()]


@pytest.mark.parametrize("names", ["ea", "ae", "eaeb", "eea"])
def test_empty_files_anywhere(names, tmp_path):
    """The first one, which has no part, and the last."""
    sources = []
    for number, name in enumerate(names):
        sources.append(tmp_path / f"{number}{name}.{'jsonl' if name == 'b' else 'txt'}")
        sources[-1].write_text({"e": "", "a": "text", "b": '{"text": "line"}'}[name])
    made = prepare(list(map(str, sources)), tmp_path / "out", workers=1)
    assert made["documents"] == sum(name != "e" for name in names)
    assert made["left_out"] == {"empty": names.count("e")}


def test_faults_name_the_line_of_the_file_in_whatever_shard_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 1000)
    lines = [json.dumps({"text": f"line {i}"}) for i in range(300)]
    for bad in (3, 150, 299):
        lines[bad - 1] = "bad"
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n" * 40 + "worse")
    made = prepare([str(tmp_path / "a.jsonl")] * 2, tmp_path / "out", workers=1)
    assert len(made["shards"]) > 10
    assert [fault["line"] for fault in faults_of(tmp_path / "out")] == [3, 150, 299, 380] * 2
    assert made["documents"] == 2 * 297


def test_damaged_files_cost_what_is_damaged_and_the_rest_goes_on(tmp_path):
    (tmp_path / "in").mkdir()
    whole = zstandard.compress("".join(json.dumps({"text": f"{i:09d}" * 99}) + "\n" for i in range(3000)).encode())
    (tmp_path / "in" / "a.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "in" / "c.jsonl").write_text('{"text": "deep", "x": ' + "[" * 3000 + "]" * 3000 + "}\n")
    (tmp_path / "in" / "d.txt").write_text("the rest")
    made = prepare([str(tmp_path / "in")], tmp_path / "out", workers=1)
    faults = faults_of(tmp_path / "out")
    assert [Path(fault["path"]).name for fault in faults] == ["a.jsonl.zst", "b.parquet", "c.jsonl"]
    assert faults[0]["line"] == made["documents"] > 1000
    assert ByteTokenizer().decode(tokens_of(tmp_path / "out")).endswith("the rest")


def test_what_is_no_shard_stays_and_does_not_matter(tmp_path):
    (tmp_path / "out" / ".git").mkdir(parents=True)
    (tmp_path / "out" / ".gitignore").write_text("*.tokens")
    (tmp_path / "a.txt").write_text("some text")
    prepare([str(tmp_path)], tmp_path / "out", workers=1)
    (tmp_path / "out" / "00000.json").unlink()
    leftovers = [f".00000.tokens.{os.getpid()}", ".prepared.json.abc", ".faults.jsonl.x"]
    for name in leftovers:
        (tmp_path / "out" / name).touch()
    prepare([str(tmp_path)], tmp_path / "out", workers=1)
    kept = {p.name for p in (tmp_path / "out").iterdir()}
    assert {".git", ".gitignore"} <= kept
    assert not kept & set(leftovers)


def test_the_folder_written_to_is_no_source_and_what_was_left_out_is_listed(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.pdf").write_text("x")
    for _ in range(2):
        made = prepare([str(tmp_path)], tmp_path / "out", workers=1)
        assert made["documents"] == 1
    listed = [json.loads(line) for line in (tmp_path / "out" / LEFT_OUT).read_text().splitlines()]
    assert listed[0] == {"path": str(tmp_path / "b.pdf"), "reason": "of unknown kind .pdf"}
    assert made["left_out"] == {"of unknown kind .pdf": 1, "the folder to write to": 1}


def test_a_request_without_text_leaves_the_folder_for_the_right_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: no text in the field 'text'"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    assert prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", field="content", workers=1)["documents"] == 1
