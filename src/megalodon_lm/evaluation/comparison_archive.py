"""The finished runs of a comparison as one small file, from which its report can be made anew."""

import io
import lzma
import tarfile
from collections.abc import Sequence
from pathlib import Path

from ..training.run_folder import RECIPE_FILE as RUN_RECIPE
from ..training.run_record import RUN_FILE
from .comparison_runs import RESULT_FILE
from .comparison_speeds import SPEEDS_FILE
from .comparison_standings import Standing

ARCHIVE_FILE = "runs.tar.xz"


def pack(out: Path, standings: Sequence[Standing]) -> bytes:
    """What the report is made from: of each run its recipe, its record and its result, and the speeds.

    Weights and metrics stay where they are, and so does a run that the comparison does not ask for. The same runs give
    the same bytes.

    Args:
        out: the folder of a comparison, whose name is that of the folder in the archive.
        standings: what there is in it.

    Returns:
        A tar file, compressed by xz.
    """
    folders = sorted({out / folder for s in standings for folder in s.folders})
    kept = [folder / name for folder in folders for name in (RUN_RECIPE, RUN_FILE, RESULT_FILE)]
    kept += [path for path in [out / SPEEDS_FILE] if path.exists()]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in kept:
            data = path.read_bytes()
            entry = tarfile.TarInfo(f"{out.resolve().name}/{path.relative_to(out).as_posix()}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return lzma.compress(packed.getvalue(), preset=9 | lzma.PRESET_EXTREME)
