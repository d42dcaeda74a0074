"""The finished runs of a comparison as one small file, from which its report can be made anew."""

import io
import lzma
import tarfile
from collections.abc import Sequence
from pathlib import Path

from ..training.run_folder import RECIPE_FILE as RUN_RECIPE
from ..training.run_record import RUN_FILE
from .comparison import Comparison
from .comparison_runs import RESULT_FILE
from .comparison_speeds import SPEEDS_FILE
from .comparison_standings import Standing

ARCHIVE_FILE = "runs.tar.xz"


def pack(comparison: Comparison, out: Path, standings: Sequence[Standing]) -> bytes:
    """What the report is made from: of each run its recipe, its record and its result, and the speeds.

    Weights and metrics stay where they are, and so does a run that the comparison does not ask for. The same runs give
    the same bytes.

    Args:
        comparison: what was run.
        out: its folder, whose name is that of the folder in the archive.
        standings: what there is in it.

    Returns:
        A tar file, compressed by xz.
    """
    runs = [comparison.tuning(s.name, rate) for s in standings for rate in s.tried]
    runs += [comparison.full(s.name, rate, 0) for s in standings for rate in s.full]
    runs += [comparison.full(s.name, s.rate, r.seed) for s in standings if s.rate is not None for r in s.results]
    folders = sorted({out / run.folder for run in runs})
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
