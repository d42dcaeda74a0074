"""Preparing what only one process can open: pipes, and files by the numbers of descriptors."""

import os
import threading
from pathlib import Path

from megalodon_lm.data import prepare as prepare_module
from megalodon_lm.data.prepare import prepare
from megalodon_lm.data.sources import is_descriptor


def test_a_pipe_is_prepared_from_its_first_byte(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    text = '{"text": "abc"}\n' * 10_000
    threading.Thread(target=(tmp_path / "pipe.jsonl").write_text, args=[text], daemon=True).start()
    (tmp_path / "a.txt").write_text("and this")
    made = prepare([str(tmp_path / name) for name in ("pipe.jsonl", "a.txt")], tmp_path / "out", workers=2)
    assert (made["documents"], made["faults"]) == (10_001, 0)


def test_a_descriptor_is_read_by_the_process_that_has_it(tmp_path, monkeypatch):
    """Another one has another file, or a pipe that gives nothing, under the number."""
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 1000)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name * 400)
    with (tmp_path / "a.txt").open() as file:
        (tmp_path / "link.txt").symlink_to(f"/dev/fd/{file.fileno()}")
        sources = [f"/dev/fd/{file.fileno()}", str(tmp_path / "link.txt"), str(tmp_path / "b.txt")]
        assert [is_descriptor(Path(source)) for source in sources] == [True, True, False]
        assert not is_descriptor(Path("-"))
        made = prepare(sources, tmp_path / "out", workers=2)
    assert (made["documents"], made["faults"], made["tokens"]) == (3, 0, 3 * 2001)
