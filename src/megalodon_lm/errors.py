"""What a user gave cannot be used."""


class InputError(ValueError):
    """A wrong value, a damaged file, a full disk: the message names what was given, the limit and the remedy.

    Commands show it as one line and end with exit code 2. Anything else that is raised is a fault of this package.
    """
