"""Plain code for what the tile instructions of AMX do, where the processor has none, so that kernels can be tested.

Tiles are eight tables of 16 rows of 16 words of 32 bits. A product takes pairs of bf16 and adds in float32: all first
elements of the pairs, all second ones, then both to the sum, in the order the manual gives. The processor also takes
denormal numbers for zero, which is left out.
"""

from typing import Any

import numpy as np

TILE = 16  # rows of a tile, and words of a row
EMULATED = np.zeros((8, TILE, TILE), np.uint32)  # stands for such tiles where kernels are called


def zero(tiles: Any, tile: int) -> None:
    """As tilezero."""
    tiles[tile] = 0


def load(tiles: Any, tile: int, array: Any, at: int, stride: int) -> None:
    """As tileloadd: 16 rows of 64 bytes of a flat array from element `at`, `stride` elements from one to the next."""
    words, size = array.view(np.uint32), 4 // array.itemsize
    for row in range(TILE):
        for i in range(TILE):
            tiles[tile, row, i] = words[(at + row * stride) // size + i]


def store(tiles: Any, tile: int, array: Any, at: int, stride: int) -> None:
    """As tilestored: the inverse of `load`."""
    words, size = array.view(np.uint32), 4 // array.itemsize
    for row in range(TILE):
        for i in range(TILE):
            words[(at + row * stride) // size + i] = tiles[tile, row, i]


def multiply(tiles: Any, sums: int, left: int, right: int) -> None:
    """As tdpbf16ps: sums[m, n] += left[m, k] . right[k, n], words being pairs of bf16."""
    upper = np.uint32(0xFFFF0000)
    first_left, second_left = (tiles[left] << np.uint32(16)).view(np.float32), (tiles[left] & upper).view(np.float32)
    first_right = (tiles[right] << np.uint32(16)).view(np.float32)
    second_right = (tiles[right] & upper).view(np.float32)
    target = tiles[sums].view(np.float32)
    for m in range(TILE):
        for n in range(TILE):
            first, second = np.float32(0), np.float32(0)
            for k in range(TILE):
                first += first_left[m, k] * first_right[k, n]
                second += second_left[m, k] * second_right[k, n]
            target[m, n] += first + second
