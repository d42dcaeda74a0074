"""General compressors: what a language model has to beat."""

import bz2
import lzma
import zlib
from collections.abc import Iterable
from typing import Any


def compressors(blocks: Iterable[bytes]) -> dict[str, float]:
    """Bits per byte of gzip, xz and bzip2 at their strongest settings, in constant memory.

    Args:
        blocks: the text in blocks of any length, not empty.
    """
    running: dict[str, Any] = {
        "gzip": zlib.compressobj(9, wbits=31),
        "xz": lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
        "bzip2": bz2.BZ2Compressor(9),
    }
    sizes, total = dict.fromkeys(running, 0), 0
    for block in blocks:
        total += len(block)
        for name, compressor in running.items():
            sizes[name] += len(compressor.compress(block))
    return {name: 8 * (size + len(running[name].flush())) / total for name, size in sizes.items()}
