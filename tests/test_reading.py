"""What is read: every byte of the files that were named, or a word about what was not."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megalodon_lm import ByteTokenizer, Generator
from megalodon_lm.data import documents as documents_module
from megalodon_lm.data.books import bundled
from megalodon_lm.data.corpus import Texts, texts_of
from megalodon_lm.data.documents import DocumentReader, Part
from megalodon_lm.data.mixture import load_mixture
from megalodon_lm.data.prepare import prepare
from megalodon_lm.data.sources import find_files
from megalodon_lm.errors import InputError, InputNote

NOVEL = next(iter(bundled("train").values()))[:600_000].decode("utf-8", "ignore")
PARAGRAPHS = [p for p in NOVEL.split("\n\n") if p.strip()]
LINES = [json.dumps({"text": p}) for p in PARAGRAPHS]


def documents(path, **options):
    """Documents, faults."""
    reader = DocumentReader(**options)
    found = [d.content for d in reader.documents(Part(str(path), 0, -1, 0))]
    return found if options.get("chats") else [b"".join(blocks).decode() for blocks in found], reader.faults


def texts(path, **options):
    """The same, each text read while it is at hand."""
    reader = DocumentReader(**options)
    found = [b"".join(d.content).decode() for d in reader.documents(Part(str(path), 0, -1, 0))]
    return found, reader.faults


# which files


def test_one_rule_says_which_files_of_a_folder_are_read_and_what_is_left_out(tmp_path):
    for name in (
        "a.txt", "B.TXT", "c.Md", "d.JSONL.GZ", "deep/e.text", "deep/f.txt.zst", "._a.txt", ".ipynb_checkpoints/a.txt",
        "g.pdf", "h.csv", "README", "i.txt.bz2", "j.parquet.gz", "corpus/prepared.json", "corpus/faults.jsonl",
        "run/run.json", "run/recipe.toml", "run/samples.txt", "out/x.jsonl",
    ):  # fmt: skip
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    (tmp_path / "in" / "empty.txt").touch()
    (tmp_path / "in" / "broken.txt").symlink_to("nowhere")
    (tmp_path / "in" / "file.txt").symlink_to("a.txt")
    (tmp_path / "in" / "again").symlink_to(".")
    os.mkfifo(tmp_path / "in" / "fifo.txt")
    found = find_files([tmp_path / "in"], avoid=tmp_path / "in" / "out")
    read = {str(p.relative_to(tmp_path / "in")) for p in found.files}
    assert read == {"a.txt", "B.TXT", "c.Md", "d.JSONL.GZ", "deep/e.text", "deep/f.txt.zst", "file.txt"}
    assert found.files == sorted(found.files)
    assert found.reasons() == {
        "hidden": 2, "made by megalodon": 2, "of unknown kind .pdf": 1, "of unknown kind .csv": 1,
        "of unknown kind without a suffix": 1, "of unknown kind .bz2": 1, "of unknown kind .gz": 1, "empty": 1,
        "a broken link": 1, "a link to a folder": 1, "not a file": 1, "the folder to write to": 1,
    }  # fmt: skip
    assert "hidden (2)" in str(found)


def test_what_is_closed_to_the_user_is_left_out_and_the_rest_is_read(tmp_path):
    """By a process that may not pass permissions by, as the superuser does."""
    for name in ("a.txt", "closed/b.txt", "unlisted/c.txt", "names/d.txt", "names/within/e.txt", "z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    code = (
        "import json; from megalodon_lm.data.sources import find_files; from megalodon_lm.errors import InputError\n"
        "found = find_files(['.'])\n"
        "print(json.dumps([list(map(str, found.files)), found.left_out]))\n"
        "try: find_files(['closed'])\n"
        "except InputError as error: print(error)"
    )
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("the superuser may read everything")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    for name, mode in (("closed", 0), ("unlisted", 0o311), ("names", 0o644)):
        (tmp_path / name).chmod(mode)
    try:
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    finally:
        for name in ("closed", "unlisted", "names"):
            (tmp_path / name).chmod(0o755)
    assert not ran.stderr
    found, refused = ran.stdout.splitlines()
    assert json.loads(found) == [
        ["a.txt", "z.txt"],
        [[path, "not readable"] for path in ("closed", "names/d.txt", "names/within", "unlisted")],
    ]
    assert refused == "cannot read closed: permission denied"


def test_named_files_are_read_whatever_their_name(tmp_path):
    for name in (".hidden", "README", "poem.log"):
        (tmp_path / name).write_text("some text")
        assert texts(find_files([tmp_path / name]).files[0]) == (["some text"], [])
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    assert [p.name for p in find_files([tmp_path / "link"]).files] == ["a.txt"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("paper.pdf", b"%PDF-1.7 ...", "a PDF"),
        ("book.txt", gzip.compress(b"text", mtime=0), "compressed"),
        ("book.epub", b"PK\3\4...", "zip archive"),
        ("weights", b"\1\0\0\0", "binary"),
        ("only-a-mark.txt", b"\xef\xbb\xbf", "empty"),
    ],
)
def test_what_is_no_text_is_said_to_be_none(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    found, faults = texts(tmp_path / name)
    assert not found
    assert len(faults) == 1
    assert says in faults[0]["reason"]
    with pytest.raises(InputError, match=f"no text in .*{name}.*{says}"):
        list(Texts([tmp_path / name]))


def test_sources_without_text_are_refused_in_words(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "prepared.json").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.parquet.gz").touch()
    for sources, message in (
        ([], "no text given"),
        (["missing.txt"], "no such file: .*missing.txt"),
        (["zero\0"], "no such file"),
        (["bundled:nosuch"], "no bundled split 'nosuch'"),
        (["empty.txt"], r"no text in .*empty.txt is empty"),
        (["folder"], r"no text in .*ends in .txt"),
        (["corpus"], "made by megalodon"),
        (["a.parquet.gz"], "decompress the file"),
    ):
        with pytest.raises(InputError, match=message):
            Texts([s if s.startswith("bundled") else tmp_path / s for s in sources])


# one reader


def test_training_reads_compressed_and_structured_files_as_documents(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfone"))
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_bytes("vier".encode("utf-16"))
    sequence = load_mixture([str(tmp_path)], [], ByteTokenizer(), 0).sequences[0]
    tokens, starts, _ = sequence.read(0, len(sequence))
    assert sorted(ByteTokenizer().decode(part[1:]) for part in np.split(tokens, np.flatnonzero(starts))[1:]) == [
        "one", "three", "two", "vier",
    ]  # fmt: skip
    assert (tokens[starts] == 256).all()


def test_a_source_named_thrice_counts_thrice(tmp_path):
    (tmp_path / "a.txt").write_text("aa")
    (tmp_path / "b.txt").write_text("bb")
    names = [str(tmp_path / name) for name in ("a.txt", "a.txt", "b.txt", "a.txt")]
    sequence = load_mixture(names, [], ByteTokenizer(), 0).sequences[0]
    assert ByteTokenizer().decode_bytes(sequence.read(0, len(sequence)).tokens).count(b"aa") == 3
    assert [t.name for t in Texts(names)] == names


def test_several_texts_are_read_each_behind_a_begin_token(tiny, tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    generator = Generator(tiny, ByteTokenizer(), "float32")
    context = generator.read(tmp_path / "a.jsonl.zst")
    assert context._waiting.tolist() == [256, *b"one", 256, *b"two"]
    generator.read("three", context)
    assert context._waiting.tolist() == [256, *b"one", 256, *b"two", *b"three"]


def test_texts_given_by_a_program():
    assert [b"".join(t) for t in texts_of("half \udcff")] == [b"half ?"]
    assert [b"".join(t) for t in texts_of(io.BytesIO("Grüße".encode("utf-16")))] == ["Grüße".encode()]
    with pytest.warns(InputNote, match="1 fault .* byte 3: not utf-8, mended"):
        assert [b"".join(t) for t in texts_of(io.BytesIO(b"caf\xe9"))] == ["caf\ufffd".encode()]


def test_what_is_left_out_and_what_is_wrong_is_told_once(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbad\nworse\n')
    (tmp_path / ".b.txt").write_text("x")
    with pytest.warns(InputNote, match=r"not read, by reason: hidden \(1\); the first is .*\.b\.txt"):
        found = Texts([tmp_path])
    with pytest.warns(InputNote, match=r"2 faults .*a\.jsonl, line 2: not JSON") as noted:
        assert [found.whole(), found.whole()] == [b"good"] * 2
    assert len(noted) == 1


# what can be read only once


def test_a_file_that_vanishes_costs_what_was_not_read_of_it(tmp_path):
    names = ("a.txt", "b.txt", "c.txt")
    for name in names:
        (tmp_path / name).write_text(name * 100_000)
    found = Texts([tmp_path / name for name in names])
    (tmp_path / "b.txt").unlink()

    def read():
        for text in found:
            first = next(text.blocks)
            (tmp_path / "a.txt").unlink(missing_ok=True)
            yield text.name, first + b"".join(text.blocks)

    with pytest.warns(InputNote, match=r"1 fault .*b\.txt, byte 0: cannot be read from here on: No such file"):
        whole = dict(read())
    assert whole == {str(tmp_path / name): name.encode() * 100_000 for name in ("a.txt", "c.txt")}
    assert found.done == found.num_bytes


@pytest.mark.parametrize("content", ["x" * 100_000, "short"])
def test_a_pipe_is_read_from_its_first_byte(content, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=[content], daemon=True).start()
    assert Texts([tmp_path / "pipe"], "once").whole() == content.encode()


def test_a_pipe_is_kept_where_it_is_read_twice_and_refused_where_it_cannot_be(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    writer = threading.Thread(target=(tmp_path / "pipe.jsonl").write_text, args=['{"text": "ab"}\n' * 9], daemon=True)
    writer.start()
    kept = Texts([tmp_path / "pipe.jsonl"], "kept")
    assert [kept.whole(), kept.whole()] == [b"ab" * 9] * 2
    assert kept.num_bytes == 9 * 15
    folder = kept._folder
    assert folder.exists()
    del kept
    assert not folder.exists()
    with pytest.raises(InputError, match=r"pipe\.jsonl can be read only once"):
        load_mixture([str(tmp_path / "pipe.jsonl")], [], ByteTokenizer(), 0)


def test_parquet_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.parquet")
    for read in (lambda path: prepare([str(path)], tmp_path / "out"), lambda path: Texts([path], "once").whole()):
        with pytest.raises(InputError, match=r"pipe\.parquet: a pipe, from which Parquet cannot be read"):
            read(tmp_path / "pipe.parquet")


def test_standard_input(monkeypatch):
    source, target = os.pipe()
    os.write(target, b"from a pipe")
    os.close(target)
    with os.fdopen(source) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        found = [(text.name, b"".join(text.blocks)) for text in Texts(["-"], "once")]
    assert found == [("standard input", b"from a pipe")]


def test_a_pause_is_no_end_of_standard_input(monkeypatch):
    """Of one that another program made such that it does not wait."""
    source, target = os.pipe()
    os.set_blocking(source, False)

    def write():
        for part in (b"before ", b"after"):
            os.write(target, part)
            time.sleep(0.2)
        os.close(target)

    threading.Thread(target=write, daemon=True).start()
    with os.fdopen(source) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert Texts(["-"], "once").whole() == b"before after"


# damaged files


def zcat(raw):
    """What the gzip program gives."""
    return subprocess.run(["gzip", "-dc"], input=raw, capture_output=True, check=False).stdout


@pytest.mark.parametrize("damage", ["cut", "changed", "checksum"])
@pytest.mark.parametrize("members", [1, 3])
def test_all_that_zcat_recovers_is_read(damage, members, tmp_path):
    size = len(NOVEL) // members + 1
    raw = b"".join(gzip.compress(NOVEL[at : at + size].encode()) for at in range(0, len(NOVEL), size))
    at = int(0.7 * len(raw)) if damage != "checksum" else len(raw) - 8
    raw = raw[:at] if damage == "cut" else raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1 :]
    (tmp_path / "a.txt.gz").write_bytes(raw)
    found, faults = texts(tmp_path / "a.txt.gz")
    assert len(found[0]) >= len(zcat(raw).decode("utf-8", "ignore")) > 0
    *before, last = faults  # what was changed may give other bytes for a while
    assert damage == "changed" or (NOVEL.startswith(found[0]) and not before)
    assert "damaged" in last["reason"]
    assert last["byte"] == len(found[0].encode())


def test_gzip_members_and_zeros_behind_them(tmp_path):
    raw = gzip.compress(b"one ") + gzip.compress(b"") + gzip.compress(b"two") + bytes(200_000)
    (tmp_path / "a.txt.gz").write_bytes(raw)
    assert texts(tmp_path / "a.txt.gz") == (["one two"], [])
    (tmp_path / "a.txt.gz").write_bytes(raw + b"junk")
    found, faults = texts(tmp_path / "a.txt.gz")
    assert (found, len(faults)) == (["one two"], 1)
    (tmp_path / "big.txt.gz").write_bytes(gzip.compress(bytes(10_000_000)))
    assert sum(map(len, texts_of(tmp_path / "big.txt.gz").__next__())) == 10_000_000


def zstd_blocks(raw):
    """What whole blocks hold before the damage, found byte by byte."""
    decoder, found = zstandard.ZstdDecompressor().decompressobj(), b""
    for at in range(len(raw)):
        if decoder.eof:
            decoder = zstandard.ZstdDecompressor().decompressobj()
        try:
            found += decoder.decompress(raw[at : at + 1])
        except zstandard.ZstdError:
            break
    return found


@pytest.mark.parametrize("damage", ["cut", "changed"])
@pytest.mark.parametrize("frames", [1, 3])
def test_all_whole_blocks_of_a_damaged_zstd_file_are_read(damage, frames, tmp_path):
    whole = "\n".join(LINES) + "\n"
    size = len(whole) // frames + 1
    raw = b"".join(zstandard.compress(whole[at : at + size].encode()) for at in range(0, len(whole), size))
    at = int(0.7 * len(raw))
    raw = raw[:at] if damage == "cut" else raw[:at] + bytes(x ^ 255 for x in raw[at : at + 40]) + raw[at + 40 :]
    (tmp_path / "a.jsonl.zst").write_bytes(raw)
    kept = zstd_blocks(raw).decode("utf-8", "ignore")
    assert 0.4 * len(whole) < len(kept) < 0.8 * len(whole)
    found, faults = texts(tmp_path / "a.jsonl.zst")
    assert found == PARAGRAPHS[: kept.count("\n")]
    assert len(faults) == 1
    assert "damaged from here on" in faults[0]["reason"]
    assert faults[0]["line"] == kept.count("\n") + 1


def test_zstd_frames_of_every_kind(tmp_path):
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    long = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    raw = skipped + zstandard.compress(b"one ") + skipped + zstandard.compress(b"") + zstandard.compress(b"two ")
    stream = zstandard.ZstdCompressor(compression_params=long).compressobj()
    raw += stream.compress(b"three") + stream.flush()
    (tmp_path / "a.txt.zst").write_bytes(raw)
    assert texts(tmp_path / "a.txt.zst") == (["one two three"], [])


@pytest.mark.parametrize("compression", [None, "snappy"])
def test_a_damaged_page_of_parquet_costs_its_row_group_and_no_more(compression, tmp_path):
    path = tmp_path / "a.parquet"
    rows = (3 * PARAGRAPHS)[:3000]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": rows}), path, row_group_size=1000, compression=compression or "none",
        write_page_checksum=True, data_page_size=20_000, use_dictionary=False,
    )  # fmt: skip
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    raw = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    raw[middle : middle + 8] = bytes(8)
    path.write_bytes(raw)
    found, faults = texts(path)
    assert len(faults) == 1
    assert "row group 2" in faults[0]["reason"]
    assert 1000 < faults[0]["row"] <= 2000
    assert found == rows[: faults[0]["row"] - 1] + rows[2000:]


def test_parquet_that_cannot_be_read_is_a_fault(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "other.parquet")
    assert texts(tmp_path / "other.parquet")[1][0]["reason"].startswith("no column 'text'; there are content")
    raw = (tmp_path / "other.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(raw[:-5])
    assert "not readable as Parquet" in texts(tmp_path / "cut.parquet")[1][0]["reason"]
    invalid = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(np.array([0, 4, 6], np.int32).tobytes()), pyarrow.py_buffer(b"caf\xe9ok")
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), tmp_path / "latin.parquet")
    found, faults = texts(tmp_path / "latin.parquet")
    assert found == ["caf\ufffd", "ok"]
    assert [(f["row"], f["outcome"]) for f in faults] == [(1, "mended")]


# lines


def test_strange_lines(tmp_path):
    mark = b"\xef\xbb\xbf"
    lines = [
        mark * 2 + b'{"text": "first"}\r',
        b'{"text": "deep", "x": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        b'{"text": "huge", "x": ' + b"9" * 5000 + b"}",
        b'{"text": "nan", "x": NaN}',
        b"   ",
        mark + b'{"text": "joined"}',
        mark,
        b'{"text": "lone \\udcff"}',
        b'{"text": "caf\xe9"}',
        b'{"text": ""}',
        b'{"text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found, faults = texts(tmp_path / "a.jsonl")
    assert found == ["first", "nan", "joined", "lone \ufffd", "last"]
    assert [(f["line"], f["outcome"]) for f in faults] == [
        (2, "left out"), (3, "left out"), (7, "left out"), (8, "mended"), (9, "left out")
    ]  # fmt: skip
    assert "nested too deep" in faults[0]["reason"]


def test_a_line_that_is_too_long_is_one_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "LONGEST_LINE", 100)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 950}) + '\n{"text": "y"}\n')
    found, faults = texts(tmp_path / "a.jsonl")
    assert found == ["y"]
    assert [f["line"] for f in faults] == [1]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_lines_in_wide_encodings(encoding, suffix, tmp_path):
    raw = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n" for t in ["世界" * 50, "two"]).encode(encoding)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix else raw)
    (part,) = documents_module.parts_of(path, 100)
    reader = DocumentReader()
    assert [b"".join(d.content).decode() for d in reader.documents(part)] == ["世界" * 50, "two"]
    assert not reader.faults


def test_faults_beyond_a_thousand_are_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff" * 3000)
    reader = DocumentReader()
    (document,) = [b"".join(d.content) for d in reader.documents(Part(str(tmp_path / "a.txt"), 0, -1, 0))]
    assert document.decode().count("\ufffd") == 3000
    assert (len(reader.faults), reader.unlisted) == (1000, 2000)


def test_a_damaged_disk_is_a_fault(tmp_path, monkeypatch):
    class Failing(io.BytesIO):
        def read1(self, size=-1):
            if self.tell() >= 8:
                raise OSError(5, "Input/output error")
            return super().read1(8)

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr("megalodon_lm.data.unpacked.stored", lambda path: Failing(b"12345678 and more"))
    found, faults = texts(tmp_path / "a.txt")
    assert found == ["12345678"]
    assert faults[0]["reason"] == "cannot be read from here on: Input/output error"
    assert faults[0]["byte"] == 8
