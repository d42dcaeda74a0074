"""Comparisons: what they run, that nothing is run twice, that a kill changes nothing, and what they say."""

import dataclasses
import json
import math
import shutil
import signal
import statistics
import tarfile
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from megalodon_lm import Megalodon
from megalodon_lm.errors import Diverged, InputError
from megalodon_lm.evaluation import comparison_runs, comparison_speeds, comparison_standings
from megalodon_lm.evaluation.comparison import Comparison, best_rate, next_full_rate, next_rate
from megalodon_lm.evaluation.comparison_report import tables, write
from megalodon_lm.evaluation.comparison_runs import RESULT_FILE, carry_out_all, find
from megalodon_lm.evaluation.comparison_speeds import ROUNDS, SPEEDS_FILE, Speeds, measure_speeds
from megalodon_lm.evaluation.comparison_standings import UNITS, at_equal, gather
from megalodon_lm.pairs import Ratio
from megalodon_lm.training import machine
from megalodon_lm.training.recipe import Recipe
from megalodon_lm.training.run_lock import LOCK_FILE, RunLock

from .processes import Nursery
from .runs import TEXT, same_weights
from .standings import standing

SMALL = {"size": "tiny", "num_layers": 1, "model_dim": 32, "z_dim": 16, "value_dim": 32, "ffn_hidden_dim": 32,
         "chunk_size": 16}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _the_machine_is_hardly_measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "SECONDS", 1e-3)
        yield


def values(folder, **compare):
    text = folder / "text.txt"
    if not text.exists():
        text.write_bytes(TEXT)
    return {
        "model": SMALL,
        "data": {"train": [str(text)], "validation": [str(text)]},
        "training": {"length": 32, "batch_size": 2, "steps": 6, "warmup_steps": 2, "learning_rate": 4e-3,
                     "validate_steps": 3, "validate_bytes": 200, "precision": "float32"},
        "compare": {
            "contenders": {"megalodon": {}, "plain": {"model": {"residual": "plain"}, "seeds": 1}},
            "rates": [1.0, 2.0], "most_rates": 2, "tuning_steps": 2, "seeds": 2, "document_bytes": 300,
            "documents": [str(text)], "contexts": [64, 0], **compare,
        },
    }  # fmt: skip


def run(comparison, out, names=(), **arguments):
    return list(carry_out_all(comparison, out, comparison.choose(names), **arguments))


def outcome(result):
    """What of a result must come out again: all but times and memory."""
    kept = dataclasses.asdict(result)
    for key in ("seconds", "speed", "memory", "machine"):
        del kept[key]
    for told in kept["documents"].values():
        del told["tokens_per_second"]
    return kept


# Rates


def test_the_grid_is_tried_in_order_and_extended_where_the_best_is_at_its_edge():
    assert next_rate([2, 1, 4], {}, 5) == 1
    assert next_rate([1, 2, 4], {1: 3.0, 2: 2.0}, 5) == 4
    assert next_rate([1, 2, 4], {1: 3.0, 2: 2.0, 4: 2.5}, 5) is None
    assert next_rate([1, 2, 4], {1: 3.0, 2: 2.0, 4: 1.5}, 5) == 8
    assert next_rate([1, 3], {1: 1.0, 3: 2.0}, 5) == 0.333333
    assert next_rate([1, 2, 4], {1: 3.0, 2: 2.0, 4: 1.5}, 3) is None
    assert next_rate([0.5], {}, 5) is None
    assert best_rate([0.5], {}) == 0.5


def test_of_rates_that_all_diverge_lower_ones_are_tried():
    assert next_rate([1, 2], {1: math.inf, 2: math.inf}, 5) == 0.5
    assert best_rate([1, 2], {1: math.inf, 2: math.inf}) == 1


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=5, unique=True), st.floats(-12, 12), st.integers(1, 12))
def test_the_search_ends_at_a_best_rate_with_neighbours_or_at_its_limit(grid, place, most):
    grid, tried = [float(f"{rate:.6g}") for rate in grid], {}
    if len(set(grid)) < 2:
        return
    while (rate := next_rate(grid, tried, most)) is not None:
        assert rate not in tried
        tried[rate] = (math.log(rate) - place) ** 2
    assert set(grid) <= set(tried)
    assert len(tried) <= max(most, len(set(grid)))
    best = best_rate(grid, tried)
    assert tried[best] == min(tried.values())
    assert len(tried) >= most or min(tried) < best < max(tried)


def test_with_all_steps_halves_are_tried_as_long_as_they_are_better():
    assert next_full_rate(2.0, {}, 3) == 2.0
    assert next_full_rate(2.0, {2.0: 1.9}, 1) is None
    assert next_full_rate(2.0, {2.0: 1.9}, 3) == 1.0
    assert next_full_rate(2.0, {2.0: 1.9, 1.0: 2.0}, 3) is None
    assert next_full_rate(2.0, {2.0: 1.9, 1.0: 1.8}, 3) == 0.5
    assert next_full_rate(2.0, {2.0: 1.9, 1.0: 1.8, 0.5: 1.7}, 3) is None
    assert next_full_rate(2.0, {2.0: math.inf}, 3) == 1.0  # diverged


# What is compared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "llama"}, "compare.base must be one of megalodon, plain"),
        ({"contenders": {}}, "at least one"),
        ({"contenders": {"megalodon": {"training": {"length": 64}}}}, "training.length must be the same for all"),
        ({"contenders": {"megalodon": {}, "wide": {"model": {"ffn_hidden_dim": 64}}}}, "more than 1 % apart"),
        ({"contenders": {"megalodon": {}, "x": {"model": {"residua": "plain"}}}}, "the contender x: .*'residual'"),
        ({"contenders": {"megalodon": {}, "x": {"modle": {}}}}, "did you mean 'model'"),
        ({"contenders": {"megalodon": {}, "../x": {}}}, "must be a name"),
        ({"contenders": {"megalodon": {"rates": [0.0]}}}, "rates must be positive"),
        ({"contenders": {"megalodon": {"rates": []}}}, "rates must be positive"),
        ({"contenders": {"megalodon": {"seeds": 0}}}, "at least 1"),
        ({"contenders": {"megalodon": {"readings": {"far": {"chunk_sise": 32}}}}}, "readings.far: .*'chunk_size'"),
        ({"contexts": [-1]}, "contexts must be"),
        ({"tuning_steps": 0}, "tuning_steps"),
        ({"stages": 1}, "unknown key 'stages' in the table"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Comparison(values(tmp_path, **change))


@pytest.mark.parametrize("training", [{"validate_steps": 4}, {"validate_steps": 0}, {"minutes": 1.0}])
def test_the_last_validation_is_at_the_end_of_the_same_tokens(training, tmp_path):
    given = values(tmp_path)
    given["training"] |= training
    with pytest.raises(InputError, match="must be a multiple of training"):
        Comparison(given)


def test_a_contender_is_the_recipe_with_its_changes(tmp_path):
    wide = {"model": {"ffn_hidden_dim": 64}, "training": {"weight_decay": 0.0}, "equal_parameters": False}
    comparison = Comparison(values(tmp_path, contenders={"wide": wide, "megalodon": {}}))
    assert list(comparison.contenders) == ["megalodon", "wide"]  # the base first
    full, tuning = comparison.full("wide", 2.0, 1), comparison.tuning("wide", 0.5)
    assert (full.recipe.model.ffn_hidden_dim, full.recipe.training.weight_decay) == (64, 0.0)
    assert (full.recipe.training.learning_rate, full.recipe.training.matrix_learning_rate) == (8e-3, 0.04)
    assert (full.recipe.training.seed, full.recipe.training.steps, full.folder) == (1, 6, Path("wide/rate-2-seed-1"))
    t = tuning.recipe.training
    assert (t.steps, t.validate_steps, t.seed, t.learning_rate, t.warmup_steps) == (2, 2, 0, 2e-3, 0)
    assert tuning.folder == Path("wide/tuning-0.5")


def test_another_architecture_takes_over_the_size_alone(tmp_path):
    given = values(tmp_path, contenders={"megalodon": {}, "gecko": {"model": {"architecture": "gecko"}}})
    given["model"] = {"parameters": 120_000, "vocab_size": 259, "chunk_size": 32}
    comparison = Comparison(given)
    megalodon, gecko = (comparison.full(name, 1.0, 0).recipe.model for name in ("megalodon", "gecko"))
    assert (megalodon.chunk_size, megalodon.memory) == (32, "none")
    assert (gecko.memory, gecko.residual) == ("adaptive", "plain")
    assert gecko.chunk_size != 32
    assert abs(gecko.num_parameters / megalodon.num_parameters - 1) < 0.01


def test_a_comparison_is_no_recipe_of_one_run(tmp_path):
    with pytest.raises(InputError, match="megalodon compare takes it"):
        Recipe.load("compare_tiny")
    comparison = Comparison(values(tmp_path))
    assert tomllib.loads(comparison.to_toml()) == comparison.values
    with pytest.raises(InputError, match="no contender 'plane'; did you mean 'plain'"):
        comparison.choose(["plane"])


# Running


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison, its folder, and what came out."""
    folder = tmp_path_factory.mktemp("comparison")
    contenders = {
        "megalodon": {"readings": {"near": {"chunk_size": 8}}},
        "plain": {"model": {"residual": "plain"}, "training": {"precision": "bf16"}, "seeds": 1},
        "wild": {"training": {"learning_rate": 1e30, "clip": math.inf}, "seeds": 1, "rates": [1.0]},
    }
    comparison = Comparison(values(folder, contenders=contenders))
    return comparison, folder / "out", run(comparison, folder / "out")


def test_rates_are_tried_first_and_then_one_seed_of_all_after_the_other(finished):
    _, out, results = finished
    assert [(r.contender, r.rate, r.seed, len(r.curve), bool(r.documents)) for r in results[:4]] == [
        ("megalodon", 1.0, 0, 1, False), ("megalodon", 2.0, 0, 1, False),
        ("plain", 1.0, 0, 1, False), ("plain", 2.0, 0, 1, False),
    ]  # fmt: skip
    best = {name: min(results[at : at + 2], key=lambda r: r.validation).rate
            for name, at in (("megalodon", 0), ("plain", 2))}  # fmt: skip
    assert [(r.contender, r.seed, r.rate) for r in results[4:]] == [
        ("megalodon", 0, best["megalodon"]), ("plain", 0, best["plain"]), ("wild", 0, 1.0),
        ("megalodon", 1, best["megalodon"]),
    ]  # fmt: skip
    folders = {str(p.parent.relative_to(out)) for p in out.glob("*/*/result.json")}
    full = {name: f"{name}/rate-{rate:g}-seed" for name, rate in best.items()}
    assert folders == {
        "megalodon/tuning-1", "megalodon/tuning-2", f"{full['megalodon']}-0", f"{full['megalodon']}-1",
        "plain/tuning-1", "plain/tuning-2", f"{full['plain']}-0", "wild/rate-1-seed-0",
    }  # fmt: skip


def test_the_rates_have_to_prove_themselves_with_all_steps(tmp_path, finished):
    """The rate is so high that half of it is better; what the comparison without that trial has made is kept."""
    high = {"contenders": {"megalodon": {"training": {"learning_rate": 0.5}}}, "rates": [1.0]}
    first, both = (Comparison(values(tmp_path, **high, full_rates=number)) for number in (1, 2))
    [one, other] = run(first, tmp_path / "out")
    assert (one.rate, one.seed, other.rate, other.seed) == (1.0, 0, 1.0, 1)
    begun = gather(both, tmp_path / "out")[0]
    assert (begun.rate, begun.full, begun.missing) == (
        1.0, {1.0: one.validation}, ["megalodon, rate 0.5, seed 0"]
    )  # fmt: skip
    half, second = run(both, tmp_path / "out")
    assert (half.rate, half.seed) == (0.5, 0)
    assert half.validation < one.validation
    assert (second.rate, second.seed) == (0.5, 1)
    [standing] = gather(both, tmp_path / "out")
    assert (standing.rate, standing.full) == (0.5, {1.0: one.validation, 0.5: half.validation})
    assert (standing.results, standing.missing, standing.at_edge) == ([half, second], [], True)
    names = [row[0] for row in tables([standing])[3].rows]
    assert names == ["megalodon", "megalodon, all steps"]
    write(both, tmp_path / "out", [standing], tmp_path / "report")
    assert run(both, tmp_path / "out") == []


def test_each_run_says_all_that_is_asked_of_it(finished):
    comparison, out, results = finished
    r, config = results[4], comparison.full("megalodon", 1.0, 0).recipe.model
    assert (r.tokens, [tokens for tokens, _ in r.curve]) == (6 * 64, [192, 384])
    assert (r.parameters, r.flops_per_token) == (config.num_parameters, config.flops_per_token(backward=True))
    assert r.seconds > 0 < r.speed
    assert {"processor", "cores", "threads", "precision", "torch"} <= r.machine.keys()
    assert r.documents.keys() == {"", "near"}
    assert results[7].documents.keys() == {""}  # of the first seed alone
    assert r.by_context().keys() == {64, 300}
    assert r.by_context("near")[300] != r.by_context()[300]
    assert 0 < r.bits_per_byte < 9
    assert r.data == results[5].data != results[7].data  # another seed, another order
    model = Megalodon.load(out / f"megalodon/rate-{r.rate:g}-seed-0")
    assert model.config == config
    assert not list(out.rglob("checkpoints"))


def test_what_diverges_is_a_result(finished):
    comparison, out, results = finished
    (wild,) = (r for r in results if r.contender == "wild")
    assert "not finite" in wild.diverged or "loss is" in wild.diverged
    assert wild.bits_per_byte == math.inf
    standings = gather(comparison, out)
    assert not any(s.missing for s in standings)
    assert "diverged" in [cell for row in tables(standings)[0].rows for cell in row]


def packed(report):
    """Folders of the runs that lie in the archive of a report."""
    with tarfile.open(report / "runs.tar.xz") as archive:
        return {str(Path(name).parent) for name in archive.getnames() if Path(name).name == RESULT_FILE}


def test_nothing_is_made_twice_and_figures_need_no_training(finished, tmp_path, monkeypatch):
    comparison, out, results = finished

    def forbidden(*arguments, **others):
        raise AssertionError

    monkeypatch.setattr(comparison_runs, "Trainer", forbidden)
    monkeypatch.setattr(Megalodon, "__init__", forbidden)
    assert run(comparison, out) == []
    assert [s.name for s in gather(comparison.of(["wild"]), out)] == ["megalodon", "wild"]
    assert comparison.of([]) == comparison
    standings = gather(comparison, out)
    assert standings[0].results == [r for r in results if r.contender == "megalodon" and r.documents]
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):  # over itself, too
        write(comparison, out, standings, folder)
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {"comparison.md", "comparison.json", "comparison.toml", "curves.png", "contexts.png",
                     "differences.png", "rates.png", "runs.tar.xz"}  # fmt: skip
    for name in ("comparison.md", "comparison.json", "comparison.toml", "runs.tar.xz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    made = {p.parent.relative_to(out.parent).as_posix() for p in out.glob(f"*/*/{RESULT_FILE}")}
    assert packed(tmp_path / "a") == made
    more = shutil.copytree(out, tmp_path / "out")
    shutil.copytree(next((more / "plain").glob("rate-*")), more / "plain" / "rate-9-seed-0")
    one = comparison.of(["plain"])
    write(one, more, gather(one, more), tmp_path / "one")
    assert packed(tmp_path / "one") == {name for name in made if "/wild/" not in name}
    told = json.loads((tmp_path / "a" / "comparison.json").read_text())
    assert told["contenders"]["wild"]["bits_per_byte"] is None
    assert len(told["contenders"]["megalodon"]["runs"]) == 2
    assert Comparison(tomllib.loads((tmp_path / "a" / "comparison.toml").read_text())) == comparison


def test_other_runs_in_the_folder_are_refused(finished, tmp_path):
    comparison, out, _ = finished
    other = dict(comparison.values) | {"training": comparison.values["training"] | {"weight_decay": 0.5}}
    with pytest.raises(InputError, match="run of another recipe"):
        run(Comparison(other), out)
    other = dict(comparison.values) | {"compare": comparison.values["compare"] | {"document_bytes": 200}}
    with pytest.raises(InputError, match="was measured on"):
        gather(Comparison(other), out)


def test_another_process_is_left_alone(tmp_path):
    comparison = Comparison(values(tmp_path, rates=[1.0]))
    (tmp_path / "out" / "megalodon").mkdir(parents=True)
    lock, said = RunLock(tmp_path / "out" / "megalodon"), []
    made = run(comparison, tmp_path / "out", say=said.append)
    assert {r.contender for r in made} == {"plain"}
    assert said[0] == "megalodon: another process is at work on it"
    assert [len(s.missing) for s in gather(comparison, tmp_path / "out")] == [2, 0]
    lock.release()
    assert [r.seed for r in run(comparison, tmp_path / "out", ["megalodon"])] == [0, 1]


def test_documents_on_which_a_model_has_no_finite_loss_are_told(tmp_path, monkeypatch):
    def broken(*arguments):
        raise Diverged("the model's loss is not finite")

    monkeypatch.setattr(comparison_runs, "measure", broken)
    (made,) = run(Comparison(values(tmp_path, rates=[1.0], seeds=1)), tmp_path / "out", ["plain"])
    assert (made.diverged, made.bits_per_byte) == ("the model's loss is not finite", math.inf)


# Killed


DEADLY = """
import signal
import megalodon_lm.evaluation.comparison_report
from megalodon_lm.training.checkpoint import Checkpoint
wrote = Checkpoint.write
def write(self, *given):
    written = wrote(self, *given)
    if str(written).endswith(Path("deadly").read_text()):
        os.kill(os.getpid(), signal.SIGKILL)
    return written
Checkpoint.write = write
megalodon_lm.evaluation.comparison_report.draw = lambda *arguments: []
megalodon_lm.ops.backend._chosen = "portable"  # begins at once
"""


@pytest.fixture
def compare(tmp_path):
    """The command in a process that is killed as soon as it has written a checkpoint; its exit code."""
    nursery = Nursery(DEADLY)

    def run(*arguments, until="never"):
        (tmp_path / "deadly").write_text(until)
        nursery.start(["compare", tmp_path / "comparison.toml", "--quiet", *arguments], cwd=tmp_path)
        return nursery.ended()

    yield run
    nursery.close()


MIDDLE = [("megalodon", "rate-{rate:g}-seed-0", 3)]
EVERYWHERE = [("plain", "tuning-1", 1), *MIDDLE, ("plain", "rate-{rate:g}-seed-0", 6)]


@pytest.mark.parametrize("places", [MIDDLE, pytest.param(EVERYWHERE, marks=pytest.mark.slow)])
def test_a_killed_comparison_goes_on_as_if_it_had_not_been(places, tmp_path, compare):
    """Killed in the middle of a run, of one that tries a rate too, and at the end, before there is a result."""
    given = values(tmp_path, seeds=1, rates=[1.0] if places is MIDDLE else [1.0, 2.0])
    given["training"] |= {"checkpoint_steps": 1}
    (tmp_path / "comparison.toml").write_text(tomli_w.dumps(given))
    whole, out = tmp_path / "whole", tmp_path / "parts"
    assert compare("--out", whole) == 0
    comparison = Comparison.load(tmp_path / "comparison.toml")
    rates = {s.name: s.rate for s in gather(comparison, whole)}
    for name, kind, step in places:
        place = f"{name}/{kind.format(rate=rates[name])}"
        assert compare("--out", out, until=f"{place}/checkpoints/step-{step:08}") == -signal.SIGKILL
        assert not (out / place / "result.json").exists()
    assert compare("--out", out) == 0
    for ours, theirs in zip(gather(comparison, out), gather(comparison, whole), strict=True):
        assert (ours.tried, len(ours.results)) == (theirs.tried, 1)
        assert list(map(outcome, ours.results)) == list(map(outcome, theirs.results))
        place = Path(ours.name) / f"rate-{ours.rate:g}-seed-0"
        assert same_weights(out / place, whole / place)
    assert compare("--out", out, "--report", tmp_path / "report", "--json", tmp_path / "figures.json") == 0
    assert (tmp_path / "report" / "comparison.md").read_bytes() == (out / "report" / "comparison.md").read_bytes()
    assert json.loads((tmp_path / "figures.json").read_text())["compared"] == ["megalodon", "plain"]


# What is said


def test_speeds_are_measured_in_turns_once_and_give_the_seconds(finished, tmp_path, monkeypatch):
    comparison, out, _ = finished
    own = tmp_path / "own"
    shutil.copytree(out, own)
    before, said = gather(comparison, own), []
    assert [s.pace for s in before] == [None, None, None]
    lock = RunLock(own)
    measure_speeds(comparison, own, comparison_runs.CPU, said.append)  # another process is at it
    assert (said, (own / SPEEDS_FILE).exists()) == ([], False)
    lock.release()
    measure_speeds(comparison, own, comparison_runs.CPU, said.append)
    assert len(said) == 1
    assert {p.name for p in own.iterdir()} == {*(p.name for p in out.iterdir()), SPEEDS_FILE, LOCK_FILE}
    speeds = Speeds.read(own, ["megalodon", "plain", "wild"])
    assert {len(rounds) for rounds in speeds.seconds.values()} == {ROUNDS}
    assert speeds.machine["processor"]
    assert Speeds.read(own, ["megalodon", "another"]) is None
    base, plain, _ = gather(comparison, own)
    assert base.pace == Ratio(1.0, 1.0, 1.0)
    ratios = [a / b for a, b in zip(speeds.seconds["megalodon"], speeds.seconds["plain"], strict=True)]
    found = plain.pace.low, plain.pace.median, plain.pace.high
    assert found == pytest.approx((min(ratios), statistics.median(ratios), max(ratios)))
    assert [r.speed for r in plain.results] == [1 / statistics.median(speeds.seconds["plain"])]
    assert f"({min(ratios):.2f} to {max(ratios):.2f})" in tables([base, plain])[2].rows[1][5]
    monkeypatch.setattr(comparison_speeds, "Trainer", None)
    measure_speeds(comparison, own, comparison_runs.CPU, said.append)
    assert len(said) == 1


def test_differences_are_paired_by_seed():
    """Seeds differ by far more than the contenders; with the first two seeds in common, the third tells nothing."""
    base, other = standing("base", 2.0, 3.0, 9.0), standing("other", 2.1, 3.3)
    mean, error, seeds = other.difference(base)
    assert (mean, error, seeds) == (pytest.approx(0.2), pytest.approx(0.1), 2)  # stdev 0.1 * sqrt 2, over sqrt 2
    assert base.bits_per_byte == pytest.approx(14 / 3)
    assert math.isnan(standing("one", 2.0).difference(base)[1])
    assert math.isnan(standing("none").difference(base)[0])
    assert standing("wild", 2.0, math.inf).difference(base)[0] == math.inf


def test_at_equal_operations_and_time_the_dearer_one_is_in_the_middle_of_its_curve():
    """Computed: the dear one has half its tokens when the cheap one has all."""
    cheap, dear = standing("cheap", 2.0), standing("dear", 2.0, flops=20, speed=50.0)
    for unit in ("operations", "seconds"):
        assert at_equal([cheap, dear], UNITS[unit]) == {"cheap": 2.0, "dear": 2.5}
    assert at_equal([cheap, dear], UNITS["tokens"]) == {"cheap": 2.0, "dear": 2.0}
    assert math.isnan(at_equal([cheap, standing("dearer", 2.0, flops=40)], UNITS["operations"])["dearer"])
    assert at_equal([standing("none")], UNITS["tokens"]) == {}


def test_rates_at_the_edge_are_told():
    shown = standing("base", 2.0, tried={0.5: 3.0, 1.0: 2.5, 2.0: 2.2, 4.0: 2.0}, rate=4.0)
    assert (shown.at_edge, shown.extended) == (True, [4.0])
    assert tables([shown])[3].rows == [
        ["base", "3.0000", "2.5000", "2.2000", "2.0000", "4", "0.1", "at the edge, extended"]
    ]
    inside = standing("base", 2.0)
    assert (inside.at_edge, inside.extended) == (False, [])


def test_runs_on_other_tokens_are_not_compared(finished, tmp_path, monkeypatch):
    comparison, out, _ = finished

    def other(comparison, run, out):
        found = find(comparison, run, out)
        return dataclasses.replace(found, data="another") if (run.contender, run.tuning) == ("plain", False) else found

    monkeypatch.setattr(comparison_standings, "find", other)
    with pytest.raises(InputError, match="did not learn from the same tokens"):
        gather(comparison, out)
