"""The finished runs of a comparison as one small file, from which its report can be made anew."""

import io
import lzma
import tarfile
from pathlib import Path

from ..training.run_folder import RECIPE_FILE as RUN_RECIPE
from ..training.run_record import RUN_FILE
from .comparison import Comparison
from .comparison_runs import RESULT_FILE
from .comparison_speeds import SPEEDS_FILE

ARCHIVE_FILE = "runs.tar.xz"


def pack(comparison: Comparison, out: Path) -> bytes:
    """What the report is made from: of each finished run its recipe, its record and its result, and the speeds.

    Weights and metrics stay where they are. The same runs give the same bytes.

    Args:
        comparison: of whose contenders.
        out: its folder, whose name is that of the folder in the archive.

    Returns:
        A tar file, compressed by xz.
    """
    results = sorted(path for name in comparison.contenders for path in (out / name).glob(f"*/{RESULT_FILE}"))
    kept = [result.parent / name for result in results for name in (RUN_RECIPE, RUN_FILE, RESULT_FILE)]
    kept += [path for path in [out / SPEEDS_FILE] if path.exists()]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in kept:
            data = path.read_bytes()
            entry = tarfile.TarInfo(f"{out.resolve().name}/{path.relative_to(out).as_posix()}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return lzma.compress(packed.getvalue(), preset=9 | lzma.PRESET_EXTREME)
