"""Products of a weight matrix with the few vectors of one decoding step: the weights pass through once, unpacked.

At a handful of rows such a product is bound by reading the weights, and a library's matrix product packs them first.
"""

from typing import Any, NamedTuple

import numpy as np

from .simd import add_product, inner, load, splat, total
from .team import share

FEATURES = 4  # outputs of a task


class Matrix(NamedTuple):
    """A weight (F, K) float32 or bf16, K a multiple of 16, and its bias (F,) float32; all flat."""

    weight: np.ndarray
    bias: np.ndarray


@inner
def _one_row(x: Any, at: int, weight: Any, start: int, width: int) -> Any:
    """Sum of x * weight, the weights read in the order in which they lie, as the memory prefetches them."""
    a, b, c, d = splat(np.float32(0)), splat(np.float32(0)), splat(np.float32(0)), splat(np.float32(0))
    whole = width // 64 * 64
    for i in range(0, whole, 64):
        a = add_product(a, load(x, at + i), load(weight, start + i))
        b = add_product(b, load(x, at + i + 16), load(weight, start + i + 16))
        c = add_product(c, load(x, at + i + 32), load(weight, start + i + 32))
        d = add_product(d, load(x, at + i + 48), load(weight, start + i + 48))
    for i in range(whole, width, 16):
        a = add_product(a, load(x, at + i), load(weight, start + i))
    return _joined(a, b, c, d)


@inner
def _joined(a: Any, b: Any, c: Any, d: Any) -> Any:
    one = splat(np.float32(1))
    return total(add_product(add_product(b, a, one), add_product(d, c, one), one))


@inner
def _four_rows(x: Any, at: int, weight: Any, start: int, width: int) -> Any:
    """As _one_row for four rows of x, to the same bits."""
    zero = splat(np.float32(0))
    a, b, c, d, e, f, g, h = zero, zero, zero, zero, zero, zero, zero, zero
    j, k, m, n, o, p, q, r = zero, zero, zero, zero, zero, zero, zero, zero
    first, second, third, fourth = at, at + width, at + 2 * width, at + 3 * width
    whole = width // 64 * 64
    for i in range(0, whole, 64):
        some = load(weight, start + i)
        a, e = add_product(a, load(x, first + i), some), add_product(e, load(x, second + i), some)
        j, o = add_product(j, load(x, third + i), some), add_product(o, load(x, fourth + i), some)
        i += 16
        some = load(weight, start + i)
        b, f = add_product(b, load(x, first + i), some), add_product(f, load(x, second + i), some)
        k, p = add_product(k, load(x, third + i), some), add_product(p, load(x, fourth + i), some)
        i += 16
        some = load(weight, start + i)
        c, g = add_product(c, load(x, first + i), some), add_product(g, load(x, second + i), some)
        m, q = add_product(m, load(x, third + i), some), add_product(q, load(x, fourth + i), some)
        i += 16
        some = load(weight, start + i)
        d, h = add_product(d, load(x, first + i), some), add_product(h, load(x, second + i), some)
        n, r = add_product(n, load(x, third + i), some), add_product(r, load(x, fourth + i), some)
    for i in range(whole, width, 16):
        some = load(weight, start + i)
        a, e = add_product(a, load(x, first + i), some), add_product(e, load(x, second + i), some)
        j, o = add_product(j, load(x, third + i), some), add_product(o, load(x, fourth + i), some)
    return _joined(a, b, c, d), _joined(e, f, g, h), _joined(j, k, m, n), _joined(o, p, q, r)


@inner
def _product(first: int, last: int, x: Any, rows: int, matrix: Any, y: Any) -> None:
    """Groups first..last of FEATURES outputs of y = x weight^T + bias; the sum of an output has one order for all rows.

    Args:
        x: (B, K) float32.
        rows: B.
        matrix: Matrix.
        y: (B, F) float32, out.
    """
    weight, bias = matrix
    outputs = len(bias)
    width = len(weight) // outputs
    for feature in range(first * FEATURES, min(last * FEATURES, outputs)):
        start = feature * width
        for b in range(0, rows - 3, 4):
            to = b * outputs + feature
            sums = _four_rows(x, b * width, weight, start, width)
            y[to], y[to + outputs] = sums[0] + bias[feature], sums[1] + bias[feature]
            y[to + 2 * outputs], y[to + 3 * outputs] = sums[2] + bias[feature], sums[3] + bias[feature]
        for b in range(rows // 4 * 4, rows):
            y[b * outputs + feature] = _one_row(x, b * width, weight, start, width) + bias[feature]


@inner
def _product_list(first: int, last: int, rows: int, some: Any) -> None:
    at = 0
    for x, matrix, y in some:
        groups = -(-len(matrix[1]) // FEATURES)
        low, high = max(first - at, 0), min(last - at, groups)
        if low < high:
            _product(low, high, x, rows, matrix, y)
        at += groups


@inner
def products(threads: int, rows: int, a: Any, b: Any, c: Any, d: Any) -> None:
    """Four products as one list of tasks, each (x, matrix, y) as in `_product`; without a bias, none."""
    some = (a, b, c, d)
    tasks = 0
    for product in some:
        tasks += -(-len(product[1][1]) // FEATURES)
    share(_product_list, threads, tasks, (rows, some))
