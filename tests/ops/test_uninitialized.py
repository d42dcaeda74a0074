"""That the tests see what is read before it was written."""

import platform

import numba
import numpy as np
import pytest
import torch


def test_tensors_are_full_of_nan():
    like = torch.ones(5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.empty(3, 5, dtype=dtype).isnan().all()
        assert like.new_empty(7, dtype=dtype).isnan().all()
        assert torch.empty_like(like, dtype=dtype).isnan().all()


@numba.njit
def scratch(count):
    return np.empty(count, np.float32)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries leave memory as it was")
@pytest.mark.parametrize("empty", [lambda count: np.empty(count, np.float32), scratch])
def test_arrays_and_scratch_of_kernels_are_full_of_what_no_sum_survives(empty):
    for count in (400, 5000, 1 << 20):
        empty(count)[:] = 1
        assert (empty(count) < -1e38).all()
