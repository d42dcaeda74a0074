"""Products of a weight matrix with the few vectors of one decoding step: the weights pass through once, unpacked.

At a handful of rows such a product is bound by reading the weights, and a library's matrix product packs them first.
"""

from typing import Any

import numpy as np

from .simd import add_product, compiled, load, splat, total
from .team import share

FEATURES = 4  # outputs computed together: four streams of weights, one load of the input


@compiled
def _one_row(x: Any, at: int, weight: Any, start: int, width: int) -> Any:
    a, b, c, d = splat(np.float32(0)), splat(np.float32(0)), splat(np.float32(0)), splat(np.float32(0))
    for i in range(0, width, 16):
        some = load(x, at + i)
        a = add_product(a, some, load(weight, start + i))
        b = add_product(b, some, load(weight, start + width + i))
        c = add_product(c, some, load(weight, start + 2 * width + i))
        d = add_product(d, some, load(weight, start + 3 * width + i))
    return total(a), total(b), total(c), total(d)


@compiled
def _four_rows(x: Any, at: int, weight: Any, start: int, width: int) -> Any:
    zero = splat(np.float32(0))
    a, b, c, d, e, f, g, h = zero, zero, zero, zero, zero, zero, zero, zero
    j, k, m, n, o, p, q, r = zero, zero, zero, zero, zero, zero, zero, zero
    for i in range(0, width, 16):
        first, second = load(x, at + i), load(x, at + width + i)
        third, fourth = load(x, at + 2 * width + i), load(x, at + 3 * width + i)
        some = load(weight, start + i)
        a, e = add_product(a, first, some), add_product(e, second, some)
        j, o = add_product(j, third, some), add_product(o, fourth, some)
        some = load(weight, start + width + i)
        b, f = add_product(b, first, some), add_product(f, second, some)
        k, p = add_product(k, third, some), add_product(p, fourth, some)
        some = load(weight, start + 2 * width + i)
        c, g = add_product(c, first, some), add_product(g, second, some)
        m, q = add_product(m, third, some), add_product(q, fourth, some)
        some = load(weight, start + 3 * width + i)
        d, h = add_product(d, first, some), add_product(h, second, some)
        n, r = add_product(n, third, some), add_product(r, fourth, some)
    upper = total(a), total(b), total(c), total(d), total(e), total(f), total(g), total(h)
    return upper, (total(j), total(k), total(m), total(n), total(o), total(p), total(q), total(r))


@compiled
def _dot(x: Any, at: int, weight: Any, start: int, width: int) -> Any:
    a = splat(np.float32(0))
    for i in range(0, width, 16):
        a = add_product(a, load(x, at + i), load(weight, start + i))
    return total(a)


@compiled
def _product(first: int, last: int, x: Any, rows: int, width: int, weight: Any, bias: Any, y: Any) -> None:
    """Groups first..last of FEATURES outputs of y = x weight^T + bias; the sum of an output has one order for all rows.

    Args:
        x: (B, K) float32, K a multiple of 16.
        rows: B.
        width: K.
        weight: (F, K) float32 or bf16.
        bias: (F,) float32.
        y: (B, F) float32, out.
    """
    outputs = len(bias)
    for group in range(first, last):
        feature = group * FEATURES
        start = feature * width
        if feature + FEATURES > outputs:
            for f in range(feature, outputs):
                for b in range(rows):
                    y[b * outputs + f] = _dot(x, b * width, weight, f * width, width) + bias[f]
            continue
        p, q, r, s = bias[feature], bias[feature + 1], bias[feature + 2], bias[feature + 3]
        for b in range(0, rows - 3, 4):
            upper, lower = _four_rows(x, b * width, weight, start, width)
            to = b * outputs + feature
            y[to], y[to + 1], y[to + 2], y[to + 3] = upper[0] + p, upper[1] + q, upper[2] + r, upper[3] + s
            to += outputs
            y[to], y[to + 1], y[to + 2], y[to + 3] = upper[4] + p, upper[5] + q, upper[6] + r, upper[7] + s
            to += outputs
            y[to], y[to + 1], y[to + 2], y[to + 3] = lower[0] + p, lower[1] + q, lower[2] + r, lower[3] + s
            to += outputs
            y[to], y[to + 1], y[to + 2], y[to + 3] = lower[4] + p, lower[5] + q, lower[6] + r, lower[7] + s
        for b in range(rows // 4 * 4, rows):
            one = _one_row(x, b * width, weight, start, width)
            to = b * outputs + feature
            y[to], y[to + 1], y[to + 2], y[to + 3] = one[0] + p, one[1] + q, one[2] + r, one[3] + s


@compiled
def _product_list(first: int, last: int, rows: int, some: Any) -> None:
    at = 0
    for x, width, weight, bias, y in some:
        groups = -(-len(bias) // FEATURES)
        low, high = max(first - at, 0), min(last - at, groups)
        if low < high:
            _product(low, high, x, rows, width, weight, bias, y)
        at += groups


@compiled
def products(threads: int, rows: int, a: Any, b: Any, c: Any, d: Any) -> None:
    """Four products as one list of tasks, each (x, width, weight, bias, y) as in `_product`; without a bias, none."""
    some = (a, b, c, d)
    tasks = 0
    for product in some:
        tasks += -(-len(product[3]) // FEATURES)
    share(_product_list, threads, tasks, (rows, some))
