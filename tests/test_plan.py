"""Plans: what a dry run finds is what a real one takes, and formulas of memory and traffic by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.baselines.llama import LlamaConfig
from megalodon_lm.cli.main import main
from megalodon_lm.errors import InputError
from megalodon_lm.parallel import tensor
from megalodon_lm.planning import here
from megalodon_lm.planning.devices import DEVICES
from megalodon_lm.planning.dry_run import Record, dry_run
from megalodon_lm.planning.layout import Layout
from megalodon_lm.planning.plan import Plan
from megalodon_lm.training.precision import autocast

PAPER = ModelConfig.named("paper7B")
A100 = DEVICES["a100"].attaining(0.6, 0.8)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_dry_run_finds_the_bytes_and_operations_of_a_real_one(precision):
    config = ModelConfig.named("tiny", num_layers=3)
    planned = dry_run(config, 2, 128, precision)
    torch.manual_seed(0)
    model, tokens = Megalodon(config), torch.randint(0, 259, (2, 128))
    model(tokens, targets=tokens)[0].backward()  # tables that are kept for later are none of a step's
    model.zero_grad(set_to_none=True)
    with Record(32.5) as record:
        with autocast(precision, torch.device("cpu")):
            x, *carried = model.body(model.embed(tokens))
            loss, *norm = model.output(x, targets=tokens)
            carried += norm
        kept, forward = record.now, record.total()
        loss.backward()
    assert planned.kept == pytest.approx(kept, rel=0.05)
    assert planned.forward.products == pytest.approx(forward.products, rel=1e-6)
    assert planned.forward.attention == pytest.approx(forward.attention, rel=1e-6)
    assert (planned.forward + planned.backward).vectors == pytest.approx(record.total().vectors, rel=1e-6)


def test_a_dry_run_leaves_nothing_behind():
    torch.manual_seed(0)
    model, tokens = Megalodon(ModelConfig.named("tiny")), torch.arange(150)[None]
    before = model(tokens)[0]
    dry_run(ModelConfig.named("tiny"), 1, 150, "float32")
    assert torch.equal(model(tokens)[0], before)


@pytest.mark.parametrize("size", ["small", "bench22M", "paper7B"])
def test_operations_are_those_of_the_configuration(size):
    config = ModelConfig.named(size)
    run = dry_run(config, 1, 2 * config.chunk_size, "bf16")
    total = run.forward + run.backward
    needed = 2 * config.chunk_size * config.flops_per_token(backward=True)
    assert total.products + total.attention + total.vectors == pytest.approx(needed, rel=0.05)


def test_memory_and_traffic_by_hand():
    p, layers, d = PAPER.num_parameters, PAPER.num_layers, PAPER.model_dim
    one = Plan.of(Layout(PAPER, 8192, accumulate=2), A100)
    assert one.memory.weights == one.memory.gradients == one.memory.optimizer / 2 == 4 * p
    assert one.memory.gathered == one.traffic.shard == one.traffic.replicate == one.traffic.chunk == 0
    shared = Plan.of(Layout(PAPER, 8192, accumulate=2, shard=8), A100)
    assert shared.memory.weights == 4 * p / 8
    assert shared.memory.activations == one.memory.activations
    assert shared.traffic.shard == pytest.approx(7 / 8 * p * 2 * (2 + 2 + 4))  # bf16 twice a batch, a float32 gradient
    copied = Plan.of(Layout(PAPER, 8192, accumulate=2, replicate=4), A100)
    assert copied.traffic.replicate == pytest.approx(2 * 3 / 4 * 4 * p)
    chain = Plan.of(Layout(PAPER, 16384, chunk=2), A100)
    states = layers * d * 16 * 8 + (layers + 1) * (8 + 2 * 8 * 64)  # averages complex; count, mean, variance of groups
    assert chain.traffic.chunk == 2 * states
    assert chain.memory.activations == pytest.approx(one.memory.activations)
    parallel = Plan.of(Layout(PAPER, 32768, chunk=4, exchange="parallel"), A100)
    assert parallel.traffic.chunk == 3 * 2 * states
    cut = Plan.of(Layout(PAPER, 65536, segment=8192), A100)
    assert cut.memory.activations == one.memory.activations
    assert cut.times.products < 8 * 1.4 * one.times.products / 2


def test_checkpointing_saves_activations_for_another_forward_pass():
    plain, again = (Plan.of(Layout(PAPER, 8192, checkpointing=c), A100) for c in (False, True))
    assert again.memory.activations < plain.memory.activations / 5
    assert plain.memory.activations > again.memory.activations > 32 * 8192 * 4096 * 4
    assert 1.2 < again.times.products / plain.times.products < 1.34


def test_the_papers_throughput_with_32k_beside_4k():
    """Published: 1.32 and 1.40 times another model's, on 256 A100, the longer one over 2 chunk ranks."""
    short = Plan.of(Layout(PAPER, 4096, rows=4, shard=256, checkpointing=True), A100)
    long = Plan.of(Layout(PAPER, 32768, shard=128, chunk=2, checkpointing=True), A100)
    assert short.layout.tokens == long.layout.tokens == 1 << 22
    assert long.tokens_per_second / short.tokens_per_second == pytest.approx(1.32 / 1.40, rel=0.1)
    assert long.memory.peak < short.memory.peak < 80e9


def test_a_chain_of_ranks_waits_longer_and_the_parallel_exchange_repeats_work():
    plan = Plan.of(Layout(PAPER, 1 << 20, chunk=32, shard=128, checkpointing=True), A100)
    lines = {line["ranks"]: line for line in plan.exchanges()}
    assert list(lines) == [2, 4, 8, 16, 32, 64, 128, 256]
    assert lines[64]["tokens"] == 16384
    assert lines[256]["chain"] > lines[2]["chain"]
    assert lines[256]["parallel"] < lines[2]["parallel"]
    assert plan.times.waiting == pytest.approx(lines[32]["chain"], rel=0.05)


@pytest.mark.parametrize("context", [32768, 1 << 20])
def test_plans_of_thousands_of_devices_hold_together(context):
    """Each rank has 16,384 tokens of a sequence, whatever its length: memory, work and traffic of one hardly change."""
    chunk = context // 16384
    layouts = {
        devices: Layout(PAPER, context, chunk=chunk, shard=devices // chunk, checkpointing=True)
        for devices in (512, 1024, 8192)
    }
    plans = {devices: Plan.of(layout, A100) for devices, layout in layouts.items()}
    small, large = plans[512], plans[8192]
    for devices, plan in plans.items():
        parts, memory = vars(plan.times), vars(plan.memory)
        assert all(value >= 0 for value in [*parts.values(), *memory.values(), *vars(plan.traffic).values()])
        assert parts["step"] == pytest.approx(sum(parts.values()) - parts["step"])
        assert parts["step"] > plan.needed / A100.products
        assert 0.4 < plan.utilisation < 1
        assert plan.memory.peak < 80e9
        assert plan.memory.weights == pytest.approx(4 * PAPER.num_parameters / devices)
        assert plan.layout.tokens == devices * 16384
    assert large.memory.peak < small.memory.peak
    assert large.tokens_per_second == pytest.approx(small.tokens_per_second, rel=0.05)
    short = Plan.of(Layout(PAPER, 16384, shard=512, checkpointing=True), A100)
    assert small.memory.activations == pytest.approx(short.memory.activations, rel=0.01)
    assert 0.9 < small.tokens_per_second / short.tokens_per_second < 1


def test_the_command_plans_a_million_tokens_on_thousands_of_devices(capsys):
    main(["plan", "--gpus", "4096", "--context", "1048576", "--chunk", "32", "--tensor", "2", "--checkpointing",
          "--batch", "268435456", "--json"])  # fmt: skip
    plan = json.loads(capsys.readouterr().out)
    assert plan["layout"]["devices"] == 4096
    assert plan["layout"]["tokens"] == 268435456
    assert plan["layout"]["accumulate"] == 4
    assert plan["memory"]["peak"] < 80e9
    main(["plan", "--model", "small", "--gpus", "2", "--context", "1024", "--device", "h200"])
    shown = capsys.readouterr().out
    assert "memory of one device" in shown
    assert "between nodes" not in shown


def test_this_machine_is_a_device_whose_rates_are_those_of_the_models_own_parts(capsys, monkeypatch):
    monkeypatch.setattr(here, "SECONDS", 0.01)
    monkeypatch.setattr(here, "TOKENS", 512)
    main(["plan", "--model", "tiny", "--device", "here", "--context", "1024", "--json"])
    plan = json.loads(capsys.readouterr().out)
    device, times = plan["device"], plan["times"]
    assert all(device[rate] > 0 for rate in ("products", "attention", "vectors", "elementwise", "bandwidth", "call"))
    work = [sum(plan["work"][way][kind] for way in ("forward", "backward")) for kind in ("attention", "moved")]
    assert times["attention"] == pytest.approx(work[0] / device["attention"])
    assert times["moved"] == pytest.approx(work[1] / device["elementwise"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "6", "--chunk", "4"], "--gpus 6 cannot be replicate 1 x shard any x chunk 4 x tensor 1"),
        (["--gpus", "8", "--shard", "2", "--chunk", "2"], "is more than the 4 ranks of the mesh"),
        (["--gpus", "3", "--tensor", "3"], "tensor = 3 must divide num_heads = 4"),
        (["--device", "a10"], "unknown device 'a10'; did you mean 'a100'"),
        (["--attained", "0", "1"], "parts must be above 0"),
        (["--context", "0"], "context = 0 must be at least 1"),
        (["--context", "1001", "--gpus", "2", "--chunk", "2"], "2 ranks cannot share 1001 tokens evenly"),
        (["--segment", "-1"], "segment = -1 must not be negative"),
    ],
)
def test_plans_that_cannot_be(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{}, {"heads_without_rope": 2}, {"norm_num_groups": 1}, {"vocab_size": 3}])
def test_what_tensor_ranks_can_share_is_what_can_be_planned(changes):
    config = ModelConfig.named("tiny", num_heads=2, **{"norm_num_groups": 2, **changes})  # of 259 tokens
    try:
        with torch.device("meta"):
            tensor._check(Megalodon(config), 2)
    except InputError:
        with pytest.raises(InputError, match="tensor = 2 must divide norm_num_groups = 1"):
            Layout(config, 64, tensor=2).check()
        return
    plan = Plan.of(Layout(config, 64, tensor=2), DEVICES["a100"])
    assert 0 < plan.memory.peak < Plan.of(Layout(config, 64), DEVICES["a100"]).memory.peak


def test_tensor_ranks_of_another_architecture_are_refused():
    with pytest.raises(InputError, match="tensor = 2 ranks cannot share a llama: Megalodon and Gecko can be cut"):
        Layout(LlamaConfig(), 64, tensor=2).check()


def test_a_model_whose_operators_look_at_numbers_is_refused():
    with pytest.raises(InputError, match="this megalodon cannot be planned: its operators look at numbers"):
        dry_run(ModelConfig.named("gecko_tiny"), 1, 64, "float32")
    with pytest.raises(InputError, match="this llama cannot be planned: only a Megalodon"):
        here.measured(LlamaConfig(), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["small, 2 x 1,024, float32", "micro, 16 x 512, bf16"])
def test_planned_memory_is_that_of_a_run(case):
    command = [sys.executable, "benchmarks/plan.py", "--only", "tensors", "--cases", case]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parent.parent
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["planned_bytes"] == pytest.approx(found["tensors"], rel=0.15)
