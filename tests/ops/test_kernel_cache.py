"""Where compiled kernels are kept, and what makes them hold no longer."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from llvmlite.binding import Linkage

from megalodon_lm.ops.cpu import kernel_cache, simd


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No folder that lasts can be written: below a file there is none, even for the administrator."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(kernel_cache, "__file__", str(tmp_path / "file" / "kernel_cache.py"))
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "file"))
    monkeypatch.setattr(kernel_cache.config, "CACHE_DIR", str(tmp_path / "file" / "chosen"))
    monkeypatch.setattr(kernel_cache.tempfile, "tempdir", str(tmp_path / "tmp"))
    for cached in (kernel_cache.folder, kernel_cache._say_not_kept):
        cached.cache_clear()
    yield tmp_path
    kernel_cache.folder.cache_clear()
    kernel_cache._say_not_kept.cache_clear()


def kernel():
    @simd.compiled
    def double(x):
        for i in range(len(x)):
            x[i] *= 2

    x = np.ones(3)
    double(x)
    assert x.tolist() == [2, 2, 2]
    return double


def test_a_private_temporary_folder_serves_where_nothing_else_can_be_written(nowhere, caplog):
    (nowhere / "tmp").mkdir()
    assert sum(kernel().stats.cache_misses.values()) == 1
    assert sum(kernel().stats.cache_hits.values()) == 1
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "NUMBA_CACHE_DIR" in caplog.text
    (found,) = (nowhere / "tmp").iterdir()
    assert found.stat().st_mode & 0o777 == 0o700
    assert list(found.glob("*.nbc"))


@pytest.mark.parametrize("trap", ["open to others", "a link", "no temporary folder"])
def test_kernels_run_where_nothing_can_be_kept(nowhere, caplog, trap):
    if trap != "no temporary folder":
        (nowhere / "tmp").mkdir()
        place = kernel_cache._private()
        if trap == "a link":
            place.rename(nowhere / "elsewhere")
            place.symlink_to(nowhere / "elsewhere")
        else:
            place.chmod(0o777)
    kernel()
    kernel()
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "compiled anew" in caplog.text
    assert not list(nowhere.rglob("*.nb?"))


def test_damaged_files_are_as_good_as_none(nowhere):
    (nowhere / "tmp").mkdir()
    kernel()
    for path in (nowhere / "tmp").rglob("*.nb?"):
        whole = path.read_bytes()
        for damaged in (b"", b"\0" * len(whole), whole[: len(whole) // 2]):
            path.write_bytes(damaged)
            assert sum(kernel().stats.cache_misses.values()) == 1
            assert sum(kernel().stats.cache_hits.values()) == 1


def test_a_full_disk_is_said_once(nowhere, caplog, monkeypatch):
    (nowhere / "tmp").mkdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernel_cache.IndexDataCacheFile, "_save_data", full)
    kernel()
    kernel()
    assert caplog.text.count("No space left on device") == 1


def test_a_change_of_any_file_that_a_kernel_is_made_of_makes_it_new(tmp_path):
    folder = Path(kernel_cache.__file__).parent
    for path in folder.glob("*.py"):
        shutil.copy(path, tmp_path)

    def stamps():
        kernel_cache.stamp.cache_clear()
        return {name: kernel_cache.stamp(tmp_path / f"{name}.py") for name in ("cema_kernels", "attention_kernels")}

    before = stamps()
    for changed, remade in (
        ("cema_strips", {"cema_kernels"}),
        ("simd", {"cema_kernels", "attention_kernels"}),
        ("team", {"cema_kernels", "attention_kernels"}),
        ("scalars", {"attention_kernels"}),
        ("gates", set()),
    ):
        with (tmp_path / f"{changed}.py").open("a") as file:
            file.write("# changed\n")
        after = stamps()
        assert {name for name in before if before[name] != after[name]} == remade
        before = after
    kernel_cache.stamp.cache_clear()


def test_kernels_share_no_code(nowhere):
    """Else one copy of a helper, the first that a process meets, serves all kernels, and copies sum in other orders."""
    (nowhere / "tmp").mkdir()

    @simd.inner
    def halved(n):  # calls itself, and so is never inlined as a whole
        return n if n < 1 else halved(n // 2)

    @simd.compiled
    def halve(n):
        return halved(n) + halved(n + 1)

    halve(3)
    (compiled,) = halve.overloads.values()
    code = {f.name: f.linkage for f in compiled.library._final_module.functions if not f.is_declaration}
    assert [linkage for name, linkage in code.items() if "halved" in name] == [Linkage.internal]
    assert not {Linkage.linkonce_odr, Linkage.weak_odr} & set(code.values())
