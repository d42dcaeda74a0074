"""A model for a budget: which size learns most from the operations that a machine can make in a given time."""

BYTE_MODELS = (
    # Operations from which a size is the better one, counted as the machine's rate of matrix products times the time.
    (0.0, "nano"),
    (2e13, "micro"),
    (1.2e14, "mini"),
    (4e14, "small"),
)


def byte_model(operations: float) -> str:
    """The name of the size that ends with the lowest loss on text, as found by trials (docs/log.md).

    Small models learn more from few operations: they read more text with them, in more steps.

    Args:
        operations: of the whole training, at the rate of large matrix products; a training step reaches half of it.
    """
    return next(name for least, name in reversed(BYTE_MODELS) if operations >= least)
