"""What the tests of kernels share."""

import ctypes
import platform

import pytest

M_PERTURB = -6


@pytest.fixture(autouse=True, scope="package")
def filled_scratch():
    """Numbers near the largest in what kernels and NumPy leave uninitialised, beside PyTorch's tensors; see malloc."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(M_PERTURB, 1)  # new memory is full of its complement, 0xFE
    yield
    library.mallopt(M_PERTURB, 0)
