"""Where compiled kernels are kept, so that only the first process of an installation compiles them.

Numba alone looks at the text of the kernel's own file, though most of a kernel comes from others; here the text of all
of them tells whether what is kept still holds. Where neither the package nor the user's cache can be written, as in
many containers, a private folder among the temporary ones serves, and where there is none either, nothing is kept.
"""

import functools
import hashlib
import logging
import os
import pickle
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numba import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile
from numba.misc.appdirs import AppDirs

_IMPORT = re.compile(r"^from \.(\w*) import (.*)$", re.MULTILINE)
_DAMAGED = (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError, TypeError, ValueError)

_log = logging.getLogger("megalodon_lm")


def keep(dispatcher: Any) -> Any:
    """Make a Numba function keep what it compiles, if there is a folder for it."""
    if folder() is not None:
        dispatcher._cache = _Kept(dispatcher.py_func)
    return dispatcher


@functools.cache
def folder() -> Path | None:
    """The folder of compiled kernels, chosen once; where they do not stay with the user, one line says so."""
    for path in _lasting():
        if _writable(path):
            return path
    try:
        path = _private()
    except OSError:
        _log.warning(
            "kernels are compiled anew by every process, which takes a minute: no folder can be written to keep them; "
            "set NUMBA_CACHE_DIR to one that can"
        )
        return None
    _log.warning("compiled kernels are kept in %s for now; set NUMBA_CACHE_DIR to a folder that stays", path)
    return path


def _lasting() -> Iterator[Path]:
    """Folders to keep kernels in, the best first."""
    installation = hashlib.sha256(str(Path(__file__).parent).encode()).hexdigest()[:16]
    chosen = getattr(config, "CACHE_DIR", None)
    if chosen:
        yield Path(chosen, f"megalodon_lm_{installation}")
    yield Path(__file__).parent / "__pycache__"
    user = Path(AppDirs("megalodon_lm", appauthor=False).user_cache_dir)
    if user.is_absolute():  # without a home it is "~"
        yield user / installation


def _writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError:
        return False
    return True


def _private() -> Path:
    """A temporary folder that nobody else can put kernels into: loading one runs it.

    Raises:
        OSError: there is none.
    """
    user = os.getuid() if hasattr(os, "getuid") else "user"
    path = Path(tempfile.gettempdir(), f"megalodon_lm_{user}")
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and (found.st_uid != user or found.st_mode & 0o077)):
        raise PermissionError(f"{path} is open to others")
    if not _writable(path):
        raise PermissionError(f"{path} cannot be written")
    return path


@functools.cache
def stamp(source: Path) -> str:
    """Digest of a file and of all files beside it that it imports, directly or not."""
    digest = hashlib.sha256()
    for path in sorted(_sources(source, set())):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(source: Path, seen: set[Path]) -> set[Path]:
    if source not in seen and source.exists():
        seen.add(source)
        for module, names in _IMPORT.findall(source.read_text(encoding="utf-8")):
            for name in [module] if module else re.findall(r"\w+", names):
                _sources(source.with_name(f"{name}.py"), seen)
    return seen


class _Place:
    """Tells Numba where the kernels of one function are kept, and whether they still hold."""

    def __init__(self, function: Any, file: str):
        self._py_file = file
        self._line = function.__code__.co_firstlineno

    @classmethod
    def from_function(cls, function: Any, file: str) -> "_Place":
        return cls(function, file)

    def ensure_cache_path(self) -> None:
        """The folder could be written when it was chosen."""

    def get_cache_path(self) -> str:
        return str(folder())

    def get_source_stamp(self) -> str:
        return stamp(Path(self._py_file))

    def get_disambiguator(self) -> str:
        return str(self._line)


class _Implementation(CompileResultCacheImpl):
    _locator_classes = [_Place]  # noqa: RUF012


class _Files(IndexDataCacheFile):
    """Files of one function. Damaged ones are as good as none, a full disk keeps none; kernels run all the same."""

    def _load_index(self) -> Any:
        try:
            return super()._load_index()
        except _DAMAGED:
            return {}

    def _load_data(self, name: str) -> Any:
        try:
            return super()._load_data(name)
        except _DAMAGED:
            return None

    def save(self, key: Any, data: Any) -> None:
        try:
            super().save(key, data)
        except OSError as error:
            _say_not_kept(error.strerror)


@functools.cache
def _say_not_kept(why: str) -> None:
    _log.warning("cannot keep compiled kernels in %s: %s", folder(), why)


class _Kept(FunctionCache):
    _impl_class = _Implementation

    def __init__(self, function: Any):
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, locator.get_source_stamp())
