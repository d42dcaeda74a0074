"""The generalised delta rule as a recurrence over tokens, in the fastest cache: forward, and backward chunk by chunk.

Every column of a matrix (K, V) changes by itself. Forward takes the columns in vectors, so that sums over K need no
sums over lanes. Backward sums over V for most gradients, so there a matrix lies transposed: a row of K features for
each column. It makes the states within a chunk anew, a block of rows at a time, and goes through them from the last
token to the first.
"""

from typing import Any

import numpy as np

from .simd import LANES, add_product, compiled, inner, load, splat, store, total
from .team import share

CHUNK = 32  # tokens, of which backward keeps all states of a block of rows
ROWS = 16  # of a block
PAIR = 2 * LANES


@inner
def _spread(array: Any, at: int) -> Any:
    """One element in all lanes; unsigned, the place is not looked at."""
    return splat(array[np.uintp(at)])


@inner
def _advance(states: Any, at: int, to: int, w: Any, b: Any, k: Any, of: int, u: Any, x: Any, width: int) -> None:
    """A row after a token: w times it, plus b times what was asked of it, plus k times the token's value."""
    for i in range(0, width, LANES):
        row = load(w, of + i) * load(states, at + i)
        store(states, to + i, add_product(add_product(row, u, load(b, of + i)), x, load(k, of + i)))


@inner
def _clear(array: Any, begin: int, size: int) -> None:
    for i in range(begin, begin + size, LANES):
        store(array, i, splat(np.float32(0)))


@inner
def _take_in(
    matrix: Any,
    c: int,
    r: Any,
    w: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    y: Any,
    asked: Any,
    of: int,
    own: int,
    width: int,
    height: int,
) -> None:
    """Two vectors of columns of a matrix (K, V) from c on after a token, and what the token reads of them."""
    u0, u1, u2, u3 = splat(np.float32(0)), splat(np.float32(0)), splat(np.float32(0)), splat(np.float32(0))
    for i in range(0, width, 2):  # sums of every other row, so that none waits for the one before
        at, even, odd = i * height + c, _spread(a, of + i), _spread(a, of + i + 1)
        u0 = add_product(u0, even, load(matrix, at))
        u1 = add_product(u1, even, load(matrix, at + LANES))
        u2 = add_product(u2, odd, load(matrix, at + height))
        u3 = add_product(u3, odd, load(matrix, at + height + LANES))
    u0, u1 = u0 + u2, u1 + u3
    x0, x1 = load(v, own + c), load(v, own + c + LANES)
    y0, y1 = splat(np.float32(0)), splat(np.float32(0))
    for i in range(width):
        at = i * height + c
        decay, taken, key, reading = _spread(w, of + i), _spread(b, of + i), _spread(k, of + i), _spread(r, of + i)
        m0 = add_product(add_product(decay * load(matrix, at), taken, u0), key, x0)
        m1 = add_product(add_product(decay * load(matrix, at + LANES), taken, u1), key, x1)
        store(matrix, at, m0)
        store(matrix, at + LANES, m1)
        y0, y1 = add_product(y0, reading, m0), add_product(y1, reading, m1)
    store(y, own + c, y0)
    store(y, own + c + LANES, y1)
    if asked.size > 0:
        store(asked, own + c, u0)
        store(asked, own + c + LANES, u1)


@inner
def _forward(
    first: int,
    last: int,
    shape: Any,
    r: Any,
    w: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    entry: Any,
    starts: Any,
    lengths: Any,
    y: Any,
    leaving: Any,
    saved: Any,
    asked: Any,
) -> None:
    length, heads, width, height, chunks = shape
    size = width * height
    matrix = np.empty(size, np.float32)
    for task in range(first, last):
        row, head = task // heads, task % heads
        for i in range(0, size, LANES):
            store(matrix, i, load(entry, task * size + i))
        for t in range(lengths[row]):
            token = (row * length + t) * heads + head
            if chunks > 0 and t % CHUNK == 0:
                to = (task * chunks + t // CHUNK) * size
                for i in range(0, size, LANES):
                    store(saved, to + i, load(matrix, i))
            if starts[row * length + t]:
                _clear(matrix, 0, size)
            for c in range(0, height, PAIR):
                _take_in(matrix, c, r, w, k, v, a, b, y, asked, token * width, token * height, width, height)
        for i in range(0, size, LANES):
            store(leaving, task * size + i, load(matrix, i))


@inner
def _into_row(grad: Any, at: int, r: Any, k: Any, b: Any, of: int, of_output: Any, width: int) -> tuple[Any, Any]:
    """Take the gradient of a row's output into that of the row; gradients of its value and of what was asked of it."""
    dy = splat(of_output)
    one, two = splat(np.float32(0)), splat(np.float32(0))
    for i in range(0, width, LANES):
        g = add_product(load(grad, at + i), dy, load(r, of + i))
        store(grad, at + i, g)
        one = add_product(one, g, load(k, of + i))
        two = add_product(two, g, load(b, of + i))
    return total(one), total(two)


@inner
def _backward(
    first: int,
    last: int,
    shape: Any,
    r: Any,
    w: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    saved: Any,
    asked: Any,
    starts: Any,
    lengths: Any,
    dy: Any,
    dleaving: Any,
    dr: Any,
    dw: Any,
    dk: Any,
    dv: Any,
    da: Any,
    db: Any,
    dentry: Any,
) -> None:
    length, heads, width, height, chunks = shape
    size, block = width * height, ROWS * width
    nothing = (CHUNK + 1) * block
    states = np.empty((CHUNK + 2) * block, np.float32)  # of a block before each token, and after the last; then zeros
    _clear(states, nothing, block)
    back = np.empty(ROWS, np.float32)
    grad = np.empty(size, np.float32)
    zero = splat(np.float32(0))
    for task in range(first, last):
        row, head = task // heads, task % heads
        for i in range(0, size, LANES):
            store(grad, i, load(dleaving, task * size + i))
        for chunk in range((lengths[row] + CHUNK - 1) // CHUNK - 1, -1, -1):
            begin = chunk * CHUNK
            count = min(CHUNK, lengths[row] - begin)
            token = (row * length + begin) * heads + head
            for top in range(0, height, ROWS):
                at = (task * chunks + chunk) * size + top
                for i in range(width):
                    for j in range(ROWS):
                        states[j * width + i] = saved[at + i * height + j]
                for n in range(count):
                    of, own = (token + n * heads) * width, (token + n * heads) * height + top
                    before = nothing if starts[row * length + begin + n] else n * block
                    for j in range(ROWS):
                        here, to = before + j * width, (n + 1) * block + j * width
                        _advance(states, here, to, w, b, k, of, _spread(asked, own + j), _spread(v, own + j), width)

                for n in range(count - 1, -1, -1):
                    of, own = (token + n * heads) * width, (token + n * heads) * height + top
                    begins = starts[row * length + begin + n]
                    before, after = nothing if begins else n * block, (n + 1) * block
                    for j in range(ROWS):
                        of_row = _into_row(grad, (top + j) * width, r, k, b, of, dy[own + j], width)
                        dv[own + j], back[j] = of_row
                    for i in range(0, width, LANES):
                        decay, asking = load(w, of + i), load(a, of + i)
                        to_r, to_w, to_k, to_a, to_b = zero, zero, zero, zero, zero
                        if top > 0:
                            to_r, to_w, to_k = load(dr, of + i), load(dw, of + i), load(dk, of + i)
                            to_a, to_b = load(da, of + i), load(db, of + i)
                        for j in range(ROWS):
                            here = (top + j) * width + i
                            g, old = load(grad, here), load(states, before + j * width + i)
                            by = _spread(back, j)
                            to_r = add_product(to_r, _spread(dy, own + j), load(states, after + j * width + i))
                            to_w = add_product(to_w, g, old)
                            to_k = add_product(to_k, _spread(v, own + j), g)
                            to_a = add_product(to_a, by, old)
                            to_b = add_product(to_b, _spread(asked, own + j), g)
                            store(grad, here, add_product(decay * g, by, asking))
                        store(dr, of + i, to_r)
                        store(dw, of + i, to_w)
                        store(dk, of + i, to_k)
                        store(da, of + i, to_a)
                        store(db, of + i, to_b)
                    if begins:
                        _clear(grad, top * width, block)
        for i in range(0, size, LANES):
            store(dentry, task * size + i, load(grad, i))


@compiled
def forward(threads: int, num_tasks: int, args: Any) -> None:
    """Heads of rows 0..num_tasks - 1: shape, r, w, k, v, a, b, entry, starts, lengths; out: y, leaving, saved, asked.

    Args:
        threads: to run on.
        num_tasks: B H.
        args: shape is (L, H, K, V, chunks that are saved); matrices are (B, H, K, V). Kept for backward are those
            before each chunk, and like v what each token asked, a S; or nothing.
    """
    share(_forward, threads, num_tasks, args)


@compiled
def backward(threads: int, num_tasks: int, args: Any) -> None:
    """Gradients: shape, r, w, k, v, a, b, saved, asked, starts, lengths, dy, dleaving; out: of the inputs, and dentry.

    Gradients of matrices are (B, H, V, K).
    """
    share(_backward, threads, num_tasks, args)
