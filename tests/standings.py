"""Results of comparisons that never ran."""

from megalodon_lm.evaluation.comparison_runs import Result
from megalodon_lm.evaluation.comparison_standings import Standing


def result(name, seed, bits, speed=100.0, flops=10, tokens=(100, 200), **changes):
    """A run with validations at so many tokens, in the end with so many bits."""
    curve = [[at, bits + 1 - at / tokens[-1]] for at in tokens]
    told = {"bits_per_byte_by_context": {"64": bits + 0.5, "300": bits}}
    return Result(**{
        "contender": name, "rate": 1.0, "learning_rate": 0.1, "seed": seed, "parameters": 1000, "state_bytes": 10,
        "flops_per_token": flops, "tokens": tokens[-1], "seconds": 9.0, "speed": speed, "memory": 5_000_000,
        "curve": curve, "diverged": "", "documents": {"": told}, "data": "x", "machine": {}, "measured": {}, **changes,
    })  # fmt: skip


def standing(name, *bits, tried=None, rate=1.0, **changes):
    tried = {0.5: 3.0, 1.0: 2.0, 2.0: 2.5} if tried is None else tried
    results = [result(name, seed, value, **changes) for seed, value in enumerate(bits)]
    return Standing(name, [0.5, 1.0, 2.0], rate, tried, results, [])
