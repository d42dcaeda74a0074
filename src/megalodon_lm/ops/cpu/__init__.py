"""Native CPU kernels for the ops, compiled by Numba: same signatures and meaning as the portable files above."""
