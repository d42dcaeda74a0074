"""The benchmark: its timer, its floors, its records, and the command as a real process."""

import json
import sys
from dataclasses import fields

import pytest
import torch

from megalodon_lm import ModelConfig
from megalodon_lm.benchmark import library_model, own_model
from megalodon_lm.benchmark.floor import MatrixProducts, MemoryCopy, MemoryRead, weight_bytes
from megalodon_lm.benchmark.measures import random_tokens
from megalodon_lm.benchmark.peers import NAMES
from megalodon_lm.benchmark.records import Record, write_records
from megalodon_lm.benchmark.report import draw, table
from megalodon_lm.benchmark.suite import LENGTHS, LINEAR, MEASURES, PEERS, QUICK_LENGTHS, left_out, plan
from megalodon_lm.benchmark.worker import ContenderFailed, Worker
from megalodon_lm.benchmark.workloads import Fastest, contender
from megalodon_lm.config import NUM_TAPS
from megalodon_lm.pairs import alternate, least, rate_ratio, rounds_within
from megalodon_lm.training.memory import resident

from .processes import megalodon

TINY = ModelConfig.named("tiny")


def test_contenders_take_turns_and_ratios_are_those_of_their_rates():
    order = []

    def timer(name, seconds):
        return lambda: order.append(name) or seconds

    ours, peer = alternate([timer("ours", 0.01), timer("peer", 0.03)], 4)
    assert order == ["ours", "peer", "peer", "ours"] * 2
    ratio = rate_ratio(ours, peer)
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.median == pytest.approx(3)
    twice_the_work = rate_ratio(ours, peer, 2, 1)
    assert twice_the_work.median == pytest.approx(2 * ratio.median)


def test_a_ratio_is_the_median_of_the_rounds_not_of_the_times():
    ratio = rate_ratio([1, 2, 10], [2, 2, 10])  # the machine slowed down, for both
    assert (ratio.median, ratio.low, ratio.high) == (1, 1, 2)


def test_rounds_fit_the_budget_within_bounds():
    assert rounds_within(20, 2.1, 3, 15) == 9
    assert rounds_within(20, 60, 3, 15) == 3
    assert rounds_within(20, 0, 3, 15) == 15


@pytest.mark.parametrize("name", ["tiny", "bench22M", "paper7B", "gecko_tiny", "gecko7B", "gecko7.1B"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_floor_counts_every_matrix_product(name, backward):
    """Of a text so long that its first chunks, which have fewer before them, do not matter."""
    config = ModelConfig.named(name)
    tokens = (2 if config.attention == "chunk" else 2**26) * config.chunk_size
    with torch.device("meta"):
        floor = MatrixProducts(config, 1, tokens, torch.bfloat16, backward)
    averages = 16 * config.model_dim * config.cema_ndim
    if config.mixer == "convolution":
        averages = 2 * NUM_TAPS * (2 * config.z_dim + config.value_dim)
    averages *= config.num_layers * (3 if backward else 1)
    assert floor.flops + averages * tokens == pytest.approx(config.flops_per_token(backward) * tokens, rel=1e-6)


def test_floors_are_positive_and_grow_with_the_work(monkeypatch):
    monkeypatch.setattr("megalodon_lm.benchmark.floor.BUFFER_BYTES", 1 << 22)
    for dtype in (torch.float32, torch.bfloat16):
        short, long = (MatrixProducts(TINY, 1, length, dtype, True) for length in (256, 32_768))
        assert long.flops == pytest.approx(128 * short.flops)
        assert 0 < short() < long()
    for floor in (MemoryRead(1e6), MemoryCopy(1e6)):
        assert floor() > 0
        assert "1.0 GB/s" in floor.describe(1e-3)


def test_decoding_reads_every_weight_but_the_unread_embeddings():
    tied = ModelConfig.named("tiny", share_emb=True)
    assert weight_bytes(TINY, torch.bfloat16) == weight_bytes(tied, torch.bfloat16)
    assert weight_bytes(tied, torch.float32) == 4 * tied.num_parameters


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", ["megalodon", "floor"])
def test_every_measure_runs(name, measure, monkeypatch):
    monkeypatch.setattr("megalodon_lm.benchmark.floor.BUFFER_BYTES", 1 << 22)
    competitor = contender(name, TINY, "bf16")
    assert competitor.settle(measure, 2, 100)
    timer = competitor.timer(measure, 2, 100)
    assert timer() > 0


RIVALS = sorted({*LINEAR, *NAMES, "transformers_llama"} - {"gecko"})


@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
@pytest.mark.parametrize("name", RIVALS)
def test_rivals_run_at_their_fastest_settings(name, monkeypatch):
    for module in (own_model, library_model):
        monkeypatch.setattr(module, "STEPS", 4)
    competitor = contender(name, TINY, "bf16")
    assert isinstance(competitor, library_model.LibraryModel) == (name == "transformers_llama")
    for measure in ("training", "prefill", "decode"):
        note = competitor.settle(measure, 1, 24)
        count = int(note.split(" parameters")[0].replace(",", ""))
        assert count == pytest.approx(TINY.num_parameters, rel=0.01)
        assert competitor.timer(measure, 1, 24)() > 0


def test_the_least_of_several_runs_in_turns():
    """After one that does not count; work that takes long runs three times in all."""
    order = []

    def timer(name, *seconds):
        left = iter(seconds)

        def run():
            order.append(name)
            return next(left)

        return run

    assert least([timer("a", 9, 0.3, 0.1, 0.2), timer("b", 9, 0.2, 0.2, 0.3)], budget=1) == [0.1, 0.2]
    assert order == [*"ab", *"ab", *"ba"]
    order.clear()
    assert least([timer("a", 0.1, *[0.5] * 8, 0.4)], budget=9) == [0.4]
    assert len(order) == 10


def test_of_two_forms_the_faster_one_runs():
    class Form:
        def __init__(self, seconds):
            self.seconds = seconds

        def settle(self, measure, batch, length):
            return f"{length} tokens"

        def timer(self, measure, batch, length):
            return lambda: self.seconds[measure]

    rival = Fastest({"one": Form({"training": 1, "decode": 2}), "other": Form({"training": 2, "decode": 1})})
    assert rival.settle("training", 1, 9) == "9 tokens, one"
    assert rival.timer("training", 1, 9)() == 1
    assert rival.settle("decode", 1, 9) == "9 tokens, other"
    assert rival.timer("decode", 1, 9)() == 1


def test_a_made_up_context_decodes_as_a_read_one():
    """Of a Llama: as many entries, at the same positions; and its window holds them and what is written."""
    llama = contender("llama", TINY, "float32").forms["ours"]
    llama.timer("decode", 1, 40)()
    state = llama._context(40)
    _, read = llama._read(random_tokens(1, 40, TINY.vocab_size))
    for (name, made), t in zip(state.tensors().items(), read.tensors().values(), strict=True):
        assert (made.shape, made.dtype) == (t.shape, t.dtype)
        assert torch.equal(made, t) if not t.is_floating_point() else ((made != 0) == (t != 0)).all(), name


def test_the_plan_keeps_to_what_is_bearable_and_holds_every_bar():
    cases = {str(case): case for case in plan(MEASURES, PEERS, LENGTHS)}
    for bar in (
        "training at 4K against llama", "training at 16K against llama", "training at 32K against llama",
        "training at 1K against mamba", "training at 4K against mamba", "training at 1K against rwkv4",
        "training at 4K against rwkv4", "training at 4K against megalodon-jax",
        "training at 4K against matrix-product floor", "training at 128K against megalodon at 8K",
        "decode at 100K against megalodon at 1K", "decode at 16K against llama",
        "decode at 16K against weight-bandwidth floor", "cema at 4K against portable",
    ):  # fmt: skip
        assert bar in cases
    long = cases["training at 128K against megalodon at 8K"]
    assert long.batch * long.length == long.peer_batch * long.peer_length
    assert "training at 16K against rwkv4" not in cases
    assert all(f"{measure} at 4K against {peer}" in cases for measure in ("training", "prefill") for peer in LINEAR)
    assert plan(["cema"], ["llama"], LENGTHS) == []
    slow = plan(MEASURES, ["rwkv4", "mamba", "rwkv7", "jax"], QUICK_LENGTHS, quick=True)
    assert all(case.length == 1024 for case in slow)


def test_missing_peers_are_told_with_the_remedy(monkeypatch):
    monkeypatch.setattr("megalodon_lm.benchmark.peers.find_spec", lambda name: None)
    reasons = left_out(PEERS, None)
    assert set(reasons) == {"rwkv4", "transformers_llama", "jax"}
    assert all("megalodon-lm[bench]" in reasons[name] for name in ("rwkv4", "transformers_llama"))
    assert "--jax-python" in reasons["jax"]
    assert "jax" not in left_out(PEERS, "python")


def record(**changes):
    values = dict(
        measure="training", length=1024, batch=4, ours=10.0, peer=5.0, peer_name="llama", ratio_median=2.0,
        ratio_low=1.5, ratio_high=2.5, floor_fraction=0.6, rounds=3, ours_memory=10**6, peer_memory=None, note="",
    )  # fmt: skip
    return Record(**{**values, **changes})


def test_records_become_json_a_table_and_a_picture(tmp_path):
    records = [record(), record(length=4096), record(measure="decode", peer_name="megalodon at 1K")]
    write_records(tmp_path / "r.json", records)
    found = json.loads((tmp_path / "r.json").read_text())
    assert [r["length"] for r in found] == [1024, 4096, 1024]
    assert set(found[0]) == {f.name for f in fields(Record)}
    assert table(records).row_count == 3
    draw(tmp_path / "r.png", records)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_a_contender_that_fails_says_so_in_one_line():
    with pytest.raises(ContenderFailed, match="jax cannot start: /no/such/python"):
        Worker("jax", ["/no/such/python"])
    with pytest.raises(ContenderFailed, match="jax ended with code 3"):
        Worker("jax", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(ContenderFailed, match="SIGKILL; out of memory"):
        Worker("jax", [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])


@pytest.mark.skipif(resident() is None, reason="this system does not tell the memory of a process")
def test_a_worker_tells_the_memory_of_a_run():
    config = json.dumps(TINY.to_dict())
    worker = Worker("megalodon", [sys.executable, "-m", "megalodon_lm.benchmark.worker", "megalodon", config, "bf16"])
    try:
        short, long = (worker.prepare("training", 1, length) for length in (256, 8192))
        assert worker.run() > 0
        worker.release()
    finally:
        worker.close()
    assert short.memory < long.memory < 1e9
    assert long.memory > 8192 * TINY.model_dim * 4 * TINY.num_layers


def bench(*arguments, cwd):
    return megalodon("bench", "--model", "tiny", *arguments, cwd=cwd)


def test_the_command_measures_and_writes(tmp_path):
    choices = ("--measures", "decode", "cema", "--peers", "itself", "portable", "jax")
    result = bench("--quick", *choices, "--lengths", 2048, "--json", "r.json", "--plot", "r.svg", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "jax is left out: needs an interpreter of its own: python -m venv v" in result.stderr
    records = json.loads((tmp_path / "r.json").read_text())
    assert {(r["measure"], r["peer_name"]) for r in records} == {
        ("decode", "megalodon at 1K"),
        ("cema", "portable"),
    }
    for r in records:
        assert r["ratio_low"] <= r["ratio_median"] <= r["ratio_high"]
        assert r["ours"] > 0
        assert r["floor_fraction"] > 0
    assert "megalodon at 1K" in result.stdout
    assert (tmp_path / "r.svg").exists()


def test_a_broken_interpreter_for_jax_is_one_line(tmp_path):
    choices = ("--quick", "--measures", "training", "--peers", "jax", "--lengths", 64)
    for more in ((), ("--quiet",)):
        result = bench(*choices, "--jax-python", "/no/such/python", *more, cwd=tmp_path)
        left_out = "training at 64 against megalodon-jax is left out: megalodon-jax cannot start"
        assert f"nothing could be compared: {left_out}" in " ".join(result.stderr.split())
        assert (result.returncode, result.stdout) == (2, "")
        assert "Traceback" not in result.stderr


def test_wrong_choices_are_refused(tmp_path):
    for arguments, says in (
        (("--lengths", 0), "--lengths 0 must be at least 1"),
        (("--peers", "jax"), "leave nothing to compare"),
    ):
        result = bench(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert says in result.stderr
        assert "Traceback" not in result.stderr
