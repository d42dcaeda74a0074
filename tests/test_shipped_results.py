"""What docs/results says is made from the finished runs that lie there, by the commands that the documents name."""

import json
import lzma
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest

from megalodon_lm.cli.main import main
from megalodon_lm.evaluation import comparison_runs, recall_trials

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
PLACED = "--out docs/results/"


@pytest.fixture(autouse=True)
def _nothing_is_trained(monkeypatch):
    def forbidden(*arguments, **others):
        raise AssertionError("a run is missing")

    monkeypatch.setattr(comparison_runs, "Trainer", forbidden)
    monkeypatch.setattr(recall_trials, "train", forbidden)


def test_all_results_are_remade():
    with_runs = {p.parent for p in RESULTS.rglob("runs.tar.xz")}
    assert with_runs == {p.parent for p in RESULTS.rglob("comparison.json")} != set()
    named = {RESULTS / command.partition(PLACED)[2].split()[0] for command in recalls()}
    assert named == {p.parent for p in RESULTS.rglob("recall.json")} != set()


@pytest.mark.parametrize("shipped", sorted(p.parent for p in RESULTS.rglob("runs.tar.xz")), ids=lambda p: p.name)
def test_a_comparison_comes_out_of_its_runs(shipped, tmp_path):
    with tarfile.open(shipped / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    [runs], made = list(tmp_path.iterdir()), tmp_path / "report"
    main(["compare", str(shipped / "comparison.toml"), "--out", str(runs), "--report", str(made)])
    for name in ("comparison.md", "comparison.json", "comparison.toml"):
        assert (made / name).read_bytes() == (shipped / name).read_bytes(), name
    packed = [lzma.decompress((folder / "runs.tar.xz").read_bytes()) for folder in (made, shipped)]
    assert packed[0] == packed[1]
    assert {p.name for p in made.iterdir()} == {p.name for p in shipped.iterdir()}


def recalls():
    """The documented commands of recall that are answered from docs/results."""
    lines = [line.strip() for path in (ROOT / "docs").glob("*.md") for line in path.read_text("utf-8").splitlines()]
    return [line for line in lines if line.startswith("megalodon evaluate recall") and PLACED in line]


@pytest.mark.parametrize("command", recalls())
def test_recall_comes_out_of_its_trials(command, tmp_path):
    folder = command.partition(PLACED)[2].split()[0]
    made, shipped = tmp_path / "out", RESULTS / folder
    shutil.copytree(shipped, made)
    (made / "recall.json").write_text(json.dumps({"accuracy_by_distance": None}))
    main(shlex.split(command.replace(f"{PLACED}{folder}", f"--out {made}"))[1:])
    assert (made / "recall.json").read_bytes() == (shipped / "recall.json").read_bytes()
