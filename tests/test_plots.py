"""Pictures: drawn whatever the figures are, legible, and never half written."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

from megalodon_lm import ModelConfig
from megalodon_lm.architectures import ARCHITECTURES
from megalodon_lm.benchmark.records import Record
from megalodon_lm.benchmark.report import LOOKS
from megalodon_lm.benchmark.report import draw as draw_benchmark
from megalodon_lm.errors import InputError
from megalodon_lm.evaluation.by_context import Curve
from megalodon_lm.evaluation.by_context import draw as draw_contexts
from megalodon_lm.evaluation.comparison_plots import draw as draw_comparison
from megalodon_lm.evaluation.comparison_report import tables
from megalodon_lm.evaluation.perplexity import Losses
from megalodon_lm.evaluation.recall import Recalled
from megalodon_lm.evaluation.recall_report import Summary, draw_pairs
from megalodon_lm.evaluation.recall_report import draw as draw_recall
from megalodon_lm.evaluation.recall_tasks import VOCAB_SIZE, AssociativeRecall
from megalodon_lm.evaluation.recall_trials import Result, Trial
from megalodon_lm.evaluation.report import Report
from megalodon_lm.plots import finite, picture, short
from megalodon_lm.training.metrics import EXAMPLES
from megalodon_lm.training.recipe import TrainingRecipe
from megalodon_lm.training.report import write_report

from .standings import standing

NAN = math.nan
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results.json"


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, kept open to be looked at."""
    drawn, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", drawn.append)
    yield drawn
    for figure in drawn:
        close(figure)


def boxes(figure):
    """What may not lie on each other: the tick labels of an axis, and titles."""
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label for label in axis.get_ticklabels(which="both") if label.get_text() and label.get_visible()]
            low, high = sorted(axis.get_view_interval())
            inside = [t for t, at in zip(labels, axis.get_ticklocs(), strict=False) if low <= at <= high]
            yield [label.get_window_extent(renderer) for label in inside]
    yield [a._left_title.get_window_extent(renderer) for a in figure.axes]


def check_legible(figure):
    for group in boxes(figure):
        assert not [pair for pair in itertools.combinations(group, 2) if pair[0].overlaps(pair[1])]
        assert all(box.x1 <= figure.bbox.x1 for box in group)
    renderer = figure.canvas.get_renderer()
    for legend in figure.legends:
        box = legend.get_window_extent(renderer)
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
    assert all(text.get_size() >= 10 for text in figure.findobj(pyplot.Text) if text.get_text())


def report(**changes):
    values = dict(
        parameters=10, train_bytes=4096, train_seconds=2.0, total_seconds=3.0, bits_per_byte=1.9,
        bits_per_byte_by_position={1: 5.0, 2: 4.0, 4: 3.0, 2048: 2.0, 5000: 1.9},
        error_by_position={1: 0.1, 2: 0.1, 4: 0.1, 2048: 0.001, 5000: 0.0},
        baselines={"gzip": 2.9, "xz": 2.4, "bzip2": 2.1}, training_length=1024,
    )  # fmt: skip
    return Report(**{**values, **changes})


@pytest.mark.parametrize(
    ("curve", "changes"),
    [
        ([], {"train_seconds": 0.0, "baselines": {}}),
        ([(10, 5.0)], {"bits_per_byte_by_position": {7: 3.0}, "error_by_position": {7: 0.0}}),
        (
            [(10, NAN)],
            {
                "bits_per_byte": NAN,
                "bits_per_byte_by_position": {1: NAN, 9: NAN},
                "error_by_position": {1: NAN, 9: 0.0},
            },
        ),
        ([(10, NAN), (20, 3.0)], {"train_seconds": 0.0}),
    ],
)
def test_a_report_is_written_whatever_was_measured(curve, changes, tmp_path):
    report(**changes).save(tmp_path, curve)
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert {"report.json", "report.md", "report.png"} == {p.name for p in tmp_path.iterdir()}


def test_a_report_says_what_context_does():
    assert report()._verdict() == "It uses context beyond its training length"
    worse = {1: 5.0, 512: 2.0, 5000: 2.1}
    assert "worse" in report(bits_per_byte_by_position=worse, error_by_position=dict.fromkeys(worse, 0.0))._verdict()
    assert "holds" in report(bits_per_byte_by_position=worse, error_by_position=dict.fromkeys(worse, 0.06))._verdict()


def test_means_by_context_follow_from_those_by_position():
    bits = {1: 8.0, 2: 6.0, 4: 5.0, 8: 3.0, 16: 2.5, 100: 2.0}
    found = report(training_length=16, bits_per_byte=2.0, bits_per_byte_by_position=bits).bits_per_byte_by_context
    each = [8.0, 6.0, *[5.0] * 2, *[3.0] * 4, *[2.5] * 8]
    assert found == pytest.approx({1: 8.0, 4: np.mean(each[:4]), 16: np.mean(each), 100: 2.0})


def step(number, **changes):
    values = dict(
        step=number, tokens=100 * number, bits_per_token=6.0, learning_rate=1e-3, gradient_norm=1.0,
        tokens_per_second=1500.0, seconds=1.0, progress=0.5, utilisation=0.5, memory=10**6, validation=None, event="",
    )  # fmt: skip
    return {**values, **changes}


BAD = dict(bits_per_token=None, gradient_norm=None, event="skipped: the loss is nan")


@pytest.mark.parametrize(
    ("steps", "bytes_per_token"),
    [
        ([step(1)], 4.2),
        ([step(1, **BAD)], 1.0),
        ([step(1, **BAD, validation=None), step(2), step(3, validation=3.0)], 1.0),
        ([step(1, gradient_norm=0.0, tokens_per_second=None, utilisation=None, memory=None)], 0),
        ([step(1, validation=3.0), step(2)], 0),
    ],
)
def test_every_training_run_has_a_report(steps, bytes_per_token, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    write_report(tmp_path, bytes_per_token)
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert "| steps |" in (tmp_path / "training.md").read_text()


def test_training_and_validation_share_one_axis_in_bits_per_byte(tmp_path, figures):
    steps = [step(n, bits_per_token=8.0, validation=2.5 if n % 10 == 0 else None) for n in range(1, 101)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    write_report(tmp_path, 4.0)
    loss, *small = figures[0].axes
    assert loss.get_ylabel() == "bits per byte"
    assert [set(line.get_ydata()) for line in loss.lines] == [{2.0}, {2.0}, {2.5}]
    assert [axis.get_title(loc="left") for axis in small] == [
        "Learning rate", "Norm of the gradient", "Tokens per second",
    ]  # fmt: skip
    check_legible(figures[0])


def test_the_whole_of_what_a_classifier_learns_is_in_sight(tmp_path, figures):
    wrong = {50: 0.4, 70: 0.1, 100: 0.2}
    steps = [step(n, bits_per_token=3.3 * 0.9**n, validation=wrong.get(n)) for n in range(1, 101)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    write_report(tmp_path, 0.0, EXAMPLES)
    loss, *_, right, _ = figures[0].axes
    smoothed = loss.lines[1].get_ydata()
    assert loss.get_ylim()[0] <= min(smoothed) < 0.01 < 2 < max(smoothed) <= loss.get_ylim()[1]
    assert list(right.lines[0].get_ydata()) == [0.6, 0.9, 0.8]
    assert right.get_title(loc="left") == "80.00% right at the end, 90.00% right at best"
    check_legible(figures[0])


def test_the_benchmark_picture_is_legible_and_alike_in_every_panel(tmp_path, figures):
    draw_benchmark(tmp_path / "r.png", [Record(**r) for r in json.loads(RESULTS.read_text())])
    check_legible(figures[0])
    colours = {}
    for axis in figures[0].axes:
        shown = [line.get_color() for line in axis.lines]
        assert shown == sorted(shown, key=lambda c: [*colours, *shown].index(c)), "the order is the same"
        colours |= dict.fromkeys(shown)
        assert all(len(line.get_xdata()) > 1 for line in axis.lines), "a single length is drawn as bars"
    assert len(figures[0].legends[0].texts) == len(colours) == 6


def test_a_benchmark_of_all_contenders_is_legible(tmp_path, figures):
    records = [Record(**r) for r in json.loads(RESULTS.read_text()) if r["peer_name"] == "llama"]
    draw_benchmark(
        tmp_path / "r.png", [replace(r, peer_name=name) for r in records for name in LOOKS if name != "megalodon"]
    )
    check_legible(figures[0])
    assert len(figures[0].legends[0].texts) == len(LOOKS)


def test_a_benchmark_of_one_length_or_of_slower_models_is_drawn(tmp_path, figures):
    one = json.loads(RESULTS.read_text())[0]
    draw_benchmark(tmp_path / "r.svg", [Record(**{**one, "ratio_median": 0.5})])
    draw_benchmark(tmp_path / "s.pdf", [Record(**{**one, "peer_name": "megalodon at 1K"})])
    assert figures[0].axes[0].get_title(loc="left") == "Training: 0.5 times as fast as Llama"


@pytest.mark.parametrize("values", [[NAN], [NAN, 2.0], [3.0, 2.0, 2.5]])
def test_loss_by_context_is_drawn(values, tmp_path, figures):
    found = {}
    for number, value in enumerate(values):
        found[10**number] = Losses()
        found[10**number].add(0, np.full((1, 100), value * math.log(2)))
    draw_contexts(tmp_path / "c.png", [Curve("cumulative", 100, found), Curve("windowed", 100, found)])
    check_legible(figures[0])


def test_recall_by_distance_and_by_state_is_drawn(tmp_path, figures):
    config = ModelConfig.named("tiny", vocab_size=VOCAB_SIZE)
    summaries = []
    for pairs, distances in ((8, (0, 1, 4, 16, 64)), (32, (1, 4, 16, 64))):
        for number, name in enumerate(dict.fromkeys(["megalodon", "sliding", "memory", "gecko", *ARCHITECTURES])):
            trial = Trial(name, config, AssociativeRecall(pairs, 64), (1,), distances, 1, TrainingRecipe())
            recalled = tuple(Recalled(d, 100 - d - number, 100, 8432 + 40_000 * number * (d > 0)) for d in distances)
            summaries.append(Summary((Result(trial, recalled, 1.0, 1.0, 1, 0.5),)))
    draw_recall(tmp_path / "r.png", summaries)
    check_legible(figures[0])
    assert [axis.get_ylim() for axis in figures[0].axes] == [(-4, 104)] * 4
    draw_recall(tmp_path / "s.svg", summaries[:1])
    check_legible(figures[1])
    draw_pairs(tmp_path / "pairs.png", [s for s in summaries if s.name in ("memory", "gecko")])
    check_legible(figures[2])
    shown = {axis.get_title(loc="left"): {text.get_text() for text in axis.texts} for axis in figures[2].axes}
    assert shown["gecko: mqar, % right"] == {"97", "96", "93", "81", "33"}, "what 32 pairs have no place for is empty"


@pytest.mark.parametrize("name", ["r.gif", "r", "missing/r.png"])
def test_a_picture_that_cannot_be_written_is_refused_before_it_is_drawn(name, tmp_path):
    with pytest.raises(InputError, match="cannot"), picture(tmp_path / name, [["a"]]):
        pytest.fail("nothing should be drawn")


def test_a_failure_while_drawing_leaves_the_old_picture(tmp_path):
    path = tmp_path / "r.png"
    path.write_bytes(b"\x89PNG old")
    with pytest.raises(ZeroDivisionError), picture(path, [["a"]]):
        _ = 1 / 0
    assert path.read_bytes() == b"\x89PNG old"


def test_lengths_are_short():
    assert [short(n) for n in (1, 1000, 1024, 102_400, 1 << 20, 845_696)] == [
        "1", "1,000", "1K", "100K", "1M", "845,696",
    ]  # fmt: skip
    assert finite([(1, NAN), (2, None), (3, 4.0)]) == ([3], [4.0])


@pytest.mark.parametrize(
    "standings",
    [
        [standing("base", 2.0, 2.1, 2.2), standing("other, with a long name", 2.1)],
        [standing("base"), standing("other", 2.0)],
        [standing("base", math.inf, diverged="x"), standing("other", 2.0, tried={1.0: math.inf, 2.0: math.inf})],
        [standing("base", 2.0, tried={}), *(standing(f"choice_number_{n}", 2.0 + 0.01 * n) for n in range(22))],
        [standing("base", 2.0, speed=1e6, flops=10**7, tokens=(2_000_000, 8_000_000))],
        [standing("base")],
    ],
)  # fmt: skip
def test_comparisons_are_drawn_whatever_the_figures(standings, tmp_path, figures):
    drawn = draw_comparison(tmp_path, standings)
    assert sorted(drawn) == sorted(p.name for p in tmp_path.iterdir())
    assert len(figures) == len(drawn)
    for figure in figures:
        check_legible(figure)
    assert [len(row) == len(table.columns) for table in tables(standings) for row in table.rows].count(False) == 0


def test_a_reading_far_above_does_not_hide_how_far_the_others_lie_apart(tmp_path, figures):
    """Positions scaled without training can come out at several times the loss."""
    told = [{"bits_per_byte_by_context": {"64": bits + 0.1, "300": bits}} for bits in (2.0, 9.0)]
    draw_comparison(tmp_path, [standing("base", 2.05), standing("other", 2.0, documents={"": told[0], "far": told[1]})])
    (axis,) = (f.axes[0] for f in figures if "by context" in f.axes[0].get_title("left"))
    low, high = axis.get_ylim()
    assert low < 2.0 < 2.15 < high < 3
