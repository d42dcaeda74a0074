"""Prepare a gigabyte of text: how fast, in how much memory, and is it the same after having been killed?

    python benchmarks/prepare.py --megabytes 1000 --tokenizer bytes tokenizer.json --interrupt 5 --json prepare.json

Writes documents of paragraphs drawn from the bundled novels as JSON Lines, and a file of the first tenth of them. Runs
`megalodon prepare` on both in turns, each in processes of its own; the text is in the page cache. Memory is looked at
ten times a second (Linux): the own pages of all processes together, and the libraries of one; and the peak of the
largest process. A file of several stretches of 64 MB takes one process more, so the tenth should have as many stretches
as there are workers. With `--interrupt`, all processes are killed at random moments, the same command goes on, and
every file is compared with those of the last run that was left alone.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from megalodon_lm.data.corpus import Texts
from megalodon_lm.data.shards import read_manifest
from megalodon_lm.files import digest, write_atomically
from megalodon_lm.processors import num_processors

POLL = 0.1  # seconds
PARAGRAPHS = 40  # of a document, at most


@dataclass
class Preparation:
    """See the head of the file."""

    megabytes: int = 1000
    """Of the larger file."""
    tokenizer: list[str] = field(default_factory=lambda: ["bytes"])
    """One or more to take in turn."""
    rounds: int = 3
    """Runs on each file."""
    workers: int = 0
    """Processes; 0 for one a processor."""
    interrupt: int = 0
    """Times to kill a further run; Unix."""
    folder: Path | None = None
    """On the disk to work on, with room for seven times the text; everything is deleted again."""
    seed: int = 0
    """Of the text, and of the moments."""
    json: Path | None = None
    """Write all figures to this file."""


def write_text(path: Path, size: int, seed: int) -> None:
    """JSON Lines of about so many bytes."""
    novels = (b"".join(novel.blocks).decode() for novel in Texts(["bundled:train"]))
    paragraphs = [p for novel in novels for p in novel.replace("\r\n", "\n").split("\n\n") if p.strip()]
    random, written = Random(seed), 0
    with path.open("w", encoding="ascii", newline="\n") as file:
        while written < size:
            text = "\n\n".join(random.choices(paragraphs, k=random.randint(1, PARAGRAPHS)))
            written += file.write(json.dumps({"text": text}) + "\n")


class Memory:
    """Peaks of a process and all that it began, in bytes; 0 where the system does not tell."""

    def __init__(self) -> None:
        self.together = self.largest = 0

    def look(self, root: int) -> None:
        """Now."""
        everyone = [status for p in _family(root) if "VmHWM" in (status := _status(p))]
        own = sum(status["RssAnon"] + status["RssShmem"] for status in everyone)
        self.together = max(self.together, own + max((status["RssFile"] for status in everyone), default=0))
        self.largest = max([self.largest, *(status["VmHWM"] for status in everyone)])


def _family(root: int) -> Iterator[int]:
    yield root
    for children in Path(f"/proc/{root}/task").glob("*/children"):
        for child in " ".join(_lines(children)).split():
            yield from _family(int(child))


def _status(process: int) -> dict[str, int]:
    lines = (line.partition(":") for line in _lines(Path(f"/proc/{process}/status")))
    return {key: 1024 * int(value.split()[0]) for key, _, value in lines if value.endswith("kB")}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # the process has ended
        return []


def prepare(text: Path, out: Path, tokenizer: str, workers: int, kill_after: float | None = None) -> dict[str, Any]:
    """Run the command once; {} if it was killed."""
    command = [sys.executable, "-m", "megalodon_lm", "prepare", str(text), "--out", str(out)]
    command += ["--tokenizer", tokenizer, "--workers", str(workers)]
    memory, began = Memory(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None:
            memory.look(process.pid)
            left = POLL if kill_after is None else min(POLL, began + kill_after - time.perf_counter())
            if left <= 0:
                return {}
            try:
                process.wait(left)
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
            process.wait()
    seconds = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"megalodon prepare ended with code {process.returncode}")
    made = read_manifest(out)
    return {
        "bytes": text.stat().st_size, "seconds": seconds, "tokens": made["tokens"], "shards": len(made["shards"]),
        "documents": made["documents"], "faults": made["faults"],
        "memory_together": memory.together, "memory_largest": memory.largest,
    }  # fmt: skip


def interrupted(arguments: Preparation, text: Path, tokenizer: str, whole: Path, seconds: float) -> dict[str, Any]:
    """Kill a run again and again, let it end, and compare it with one that took so many seconds."""
    out, random, finished = whole.with_name("interrupted"), Random(arguments.seed), []
    shards = len(read_manifest(whole)["shards"])
    for _ in range(arguments.interrupt):
        left = 1 - finished[-1] / shards if finished else 1.0
        if prepare(text, out, tokenizer, arguments.workers, random.uniform(0, left * seconds)):
            break
        finished.append(len(list(out.glob("[0-9]*.json"))))
    prepare(text, out, tokenizer, arguments.workers)
    found, expected = ({p.name: digest(p) for p in sorted(folder.iterdir())} for folder in (out, whole))
    differing = [name for name in expected if found.get(name) != expected[name]]
    left_over = [name for name in found if name not in expected]
    shutil.rmtree(out)
    return {"kills": len(finished), "shards_finished": finished, "files": len(expected),
            "differing": differing, "left_over": left_over}  # fmt: skip


def measure(arguments: Preparation, tokenizer: str, texts: list[Path]) -> dict[str, Any]:
    """All figures of one tokenizer; the texts are the small one and the big one."""
    out = texts[0].parent / "prepared"
    small, big = runs = ([], [])
    for _ in range(arguments.rounds):
        for text, into in zip(texts, runs, strict=True):
            shutil.rmtree(out, ignore_errors=True)
            into.append(prepare(text, out, tokenizer, arguments.workers))
    pairs = list(zip(small, big, strict=True))
    found: dict[str, Any] = {"small": small, "big": big}
    found["memory_ratios"] = [b["memory_together"] / max(1, s["memory_together"]) for s, b in pairs]
    found["largest_ratios"] = [b["memory_largest"] / max(1, s["memory_largest"]) for s, b in pairs]
    if arguments.interrupt:
        seconds = median(run["seconds"] for run in big)
        found["interrupted"] = interrupted(arguments, texts[1], tokenizer, out, seconds)
    shutil.rmtree(out)
    return found


def spread(values: list[float], form: str = ",.1f", unit: str = "") -> str:
    """Median, least and most."""
    return f"{median(values):{form}}{unit} ({min(values):{form}} - {max(values):{form}})"


def show(tokenizer: str, found: dict[str, Any], workers: int) -> Table:
    """The figures of one tokenizer."""
    table = Table("", "a tenth", "whole", title=f"megalodon prepare --tokenizer {Path(tokenizer).name}")
    sizes = [found["small"], found["big"]]

    def row(title: str, figure: Any, form: str, unit: str) -> None:
        table.add_row(title, *(spread([figure(run) for run in runs], form, unit) for runs in sizes))

    table.add_row("text", *(f"{runs[0]['bytes'] / 1e6:,.0f} MB, {runs[0]['shards']} shards" for runs in sizes))
    row("time", lambda run: run["seconds"], ",.1f", " s")
    row("text a second", lambda run: run["bytes"] / 1e6 / run["seconds"], ",.1f", " MB")
    row("tokens a second", lambda run: run["tokens"] / 1e6 / run["seconds"], ",.2f", " M")
    row("peak memory, all processes", lambda run: run["memory_together"] / 1e6, ",.0f", " MB")
    row("peak memory, largest process", lambda run: run["memory_largest"] / 1e6, ",.0f", " MB")
    table.add_row("whole over tenth, all processes", "", spread(found["memory_ratios"], ".3f"))
    table.add_row("whole over tenth, largest process", "", spread(found["largest_ratios"], ".3f"))
    if check := found.get("interrupted"):
        same = f"{check['files'] - len(check['differing'])} of {check['files']} files the same"
        at = ", ".join(map(str, check["shards_finished"]))
        table.add_row(f"killed {check['kills']} times", "", f"{same}; {len(check['left_over'])} left over")
        table.add_row("shards finished at each kill", "", at)
    few, many = (min(workers, runs[0]["shards"]) for runs in sizes)
    if few < many:
        table.caption = f"The tenth took {few} workers, the whole {many}: compare the largest process, or more text."
    return table


def main() -> None:
    """Measure, show, write."""
    arguments, console = tyro.cli(Preparation, description=__doc__), Console()
    if arguments.interrupt and not hasattr(os, "killpg"):
        sys.exit("--interrupt needs Unix, where a group of processes can be killed")
    with TemporaryDirectory(prefix="prepare-", dir=arguments.folder) as folder:
        texts = [Path(folder) / "tenth.jsonl", Path(folder) / "whole.jsonl"]
        for text, size in zip(texts, (arguments.megabytes * 100_000, arguments.megabytes * 1_000_000), strict=True):
            write_text(text, size, arguments.seed)
        found = {tokenizer: measure(arguments, tokenizer, texts) for tokenizer in arguments.tokenizer}
    for tokenizer, of_one in found.items():
        console.print(show(tokenizer, of_one, arguments.workers or num_processors()))
    if arguments.json:
        figures = [{"tokenizer": Path(name).name, **of_one} for name, of_one in found.items()]
        write_atomically(arguments.json, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
