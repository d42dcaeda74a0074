"""Record: one comparison, as it stands in the JSON file."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import write_atomically


@dataclass(frozen=True)
class Record:
    """Megalodon beside one peer at one length. Rates are tokens per second, the median of the rounds."""

    measure: str
    """training, prefill, decode or cema."""
    length: int
    """Tokens of a row; for decode, of the context."""
    batch: int
    """Rows."""
    ours: float
    """Our rate."""
    peer: float
    """The peer's rate; of a floor, the rate at which the machine could do our work."""
    peer_name: str
    ratio_median: float
    """Our rate over the peer's: the median of the ratios of the rounds."""
    ratio_low: float
    """The smallest of them."""
    ratio_high: float
    """The largest of them."""
    floor_fraction: float
    """Our rate over the machine's floor for the same work, measured in the same rounds."""
    rounds: int
    """How often each ran, in turns."""
    ours_memory: int | None
    """Bytes: most memory resident in a run, beyond what was resident before with the weights loaded."""
    peer_memory: int | None
    """The same of the peer."""
    note: str
    """Precision and settings of both, and the floor."""


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write a JSON list of records, atomically: an interrupted run keeps those it has."""
    write_atomically(path, json.dumps([asdict(record) for record in records], indent=2) + "\n")
