"""A model for a budget: which size learns most from the operations that a machine can make in a given time."""

BYTE_MODELS = (
    # Operations from which a size is the better one, counted as the machine's rate of matrix products times the time.
    (0.0, "nano"),
    (1e14, "micro"),
    (1e15, "mini"),
    (5e15, "small"),
)


def byte_model(operations: float) -> str:
    """The name of the size that ends with the lowest loss on text.

    Small models learn more from few operations: they read more text with them, in more steps. The first limit lies
    above a trial in which nano won against micro (docs/log.md); the others keep its ratio of bytes read to parameters,
    about 3.

    Args:
        operations: of the whole training, at the rate of large matrix products; of that, models so small reach a
            quarter to a half.
    """
    return next(name for least, name in reversed(BYTE_MODELS) if operations >= least)
