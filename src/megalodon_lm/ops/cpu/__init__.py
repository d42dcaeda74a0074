"""Native CPU kernels for the ops, compiled by Numba: same signatures and meaning as the portable files above."""


def try_out() -> None:
    """Compile and run the smallest kernel of all.

    Raises:
        ImportError, KernelError: this machine cannot.
    """
    from .trial import double

    double()
