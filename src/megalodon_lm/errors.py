"""What a user gave cannot be used, or not all of it."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A wrong value, a damaged file, a full disk: the message names what was given, the limit and the remedy.

    Commands show it as one line and end with exit code 2. Anything else that is raised is a fault of this package.
    """


class Diverged(InputError):
    """The loss of a model is not finite, or rose too often: with these settings there is nothing more to be had."""


class RankLost(InputError):
    """Another process that worked together with this one is gone, or did not answer in time."""


class InputNote(UserWarning):
    """Part of what a user gave was not used; the rest was. Commands show it as one line and go on."""


def nearest(word: object, known: Iterable[str]) -> str:
    """For a message about an unknown word: "; did you mean 'x'?", or nothing where no known word is near."""
    match = difflib.get_close_matches(str(word), list(known), 1, 0.4)
    return f"; did you mean {match[0]!r}?" if match else ""
