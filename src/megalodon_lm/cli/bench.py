"""megalodon bench"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InputError
from .options import Quiet

TABLE_WIDTH = 132


@dataclass
class Bench(Quiet):
    """Measure speed and memory beside other models of the same size, and beside what this machine can do at most.

    Llama and Mamba run in the faster of two forms, ours and that of transformers, which is the only one of RWKV-4; it
    comes with pip install 'megalodon-lm[bench]'. megalodon-jax needs an interpreter of its own:
    python -m venv v && v/bin/pip install megalodon-jax==0.2.2, then --jax-python v/bin/python. What is missing is left
    out. Models take turns, each in its own process; a ratio is the median of the rounds' ratios. Threads are PyTorch's:
    OMP_NUM_THREADS=1 measures on one.
    """

    quick: bool = False
    """Lengths of 1K and 4K and few rounds: under three minutes on two cores."""
    json: Path | None = None
    """Write the records to this file, after each comparison."""
    plot: Path | None = None
    """Draw tokens per second against length into this file (.png, .svg, .pdf)."""
    model: str = "bench22M"
    """A named size, a configuration file or a model folder."""
    measures: tuple[Literal["training", "prefill", "decode", "cema"], ...] = ("training", "prefill", "decode", "cema")
    """A training step (forward, loss and backward); reading a prompt; writing tokens after one; the CEMA operation."""
    peers: tuple[
        Literal[
            "llama", "transformers_llama", "mamba", "mamba2", "rwkv4", "rwkv7", "gated_deltanet", "mega", "gecko",
            "jax", "floor", "itself", "portable",
        ],
        ...,
    ] = ()  # fmt: skip
    """What to compare with, all at equal parameters; nothing for all but gecko and transformers_llama, or with --quick
    for some. transformers_llama is Llama as transformers has it, gecko Megalodon with Gecko's choices, itself Megalodon
    at a short length, portable its CEMA without native kernels."""
    lengths: tuple[int, ...] = ()
    """Tokens; each comparison takes those a CPU bears. Nothing for 1K to 128K."""
    jax_python: str | None = None
    """Interpreter of a virtual environment that has megalodon-jax."""
    precision: str = "auto"
    """bf16 or float32 matrix products; auto takes bf16 where the processor has it."""

    def run(self) -> None:
        """Carry out the command."""
        import torch

        from ..benchmark.records import Record, write_records
        from ..benchmark.report import draw, table
        from ..benchmark.suite import LENGTHS, QUICK_LENGTHS, QUICK_PEERS, USUAL_PEERS, Case, Suite, left_out, plan
        from ..files import FIGURES, PICTURE, check_writable
        from ..training.precision import check_precision, choose_precision
        from .models import find_config
        from .progress import console, results

        for path, kind in ((self.json, FIGURES), (self.plot, PICTURE)):
            if path is not None:
                check_writable(path, kind)
        for length in self.lengths:
            if length < 1:
                raise InputError(f"--lengths {length} must be at least 1")
        config = find_config(self.model)
        precision = choose_precision(check_precision(self.precision), torch.device("cpu"))
        peers = self.peers or (QUICK_PEERS if self.quick else USUAL_PEERS)
        reasons = left_out(peers, self.jax_python)
        for peer, reason in reasons.items():
            console.print(f"{peer} is left out: {reason}")
        lengths = self.lengths or (QUICK_LENGTHS if self.quick else LENGTHS)
        cases = plan(self.measures, [p for p in peers if p not in reasons], lengths, self.quick)
        if not cases:
            raise InputError("these measures, peers and lengths leave nothing to compare; see megalodon bench --help")
        effort = dict(budget=2.0, fewest=1, most=5) if self.quick else {}
        suite = Suite(config, precision, self.jax_python, **effort)  # type: ignore[arg-type]
        threads = torch.get_num_threads()
        console.print(f"{config.num_parameters:,} parameters, {precision}, {threads} threads")

        failed: list[str] = []

        def skipped(case: Case, reason: str) -> None:
            failed.append(f"{case} is left out: {reason}")
            console.print(failed[-1])

        records: list[Record] = []
        for record in suite.run(cases, skipped):
            records.append(record)
            if self.json is not None:
                write_records(self.json, records)
            console.print(
                f"{len(records)}/{len(cases)} {record.measure} {record.length:,} against {record.peer_name}: "
                f"{record.ratio_median:.2f} ({record.ratio_low:.2f} - {record.ratio_high:.2f})",
            )
        if not records:
            raise InputError(f"nothing could be compared: {failed[0]}")
        results.print(table(records), width=max(results.width, TABLE_WIDTH), crop=False)
        if self.plot is not None:
            draw(self.plot, records)
