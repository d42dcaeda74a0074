"""Options that several commands have, and what holds for those that take several values."""

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from ..errors import InputError


@dataclass(kw_only=True)
class Quiet:
    """A command that shows its progress on standard error."""

    quiet: bool = False
    """Show results and errors, but no progress and no remarks."""


@dataclass(kw_only=True)
class Shared(Quiet):
    """A command that several processes can carry out together."""

    ranks: int = 1
    """Processes of this machine that share the work; torchrun starts those of several machines."""
    words: ClassVar[list[str]] = []
    """Of the command line."""

    def launched(self, more: Collection[str] = (), restarts: int = 0) -> int | None:
        """Start the ranks that were asked for, and wait for their end.

        Args:
            more: words of the command line, behind those that were given.
            restarts: how often all are started again when one is lost.

        Returns:
            The exit code; None where this process does the work itself.

        Raises:
            InputError: fewer than one, or restarts of a single process.
            RankLost: one was lost.
        """
        from ..parallel.launch import launch
        from ..parallel.started import started_ranks

        if self.ranks < 1:
            raise InputError(f"--ranks {self.ranks} must be at least 1")
        if restarts < 0 or (restarts and self.ranks == 1):
            raise InputError(f"--restarts {restarts} must not be negative, and needs --ranks of at least 2")
        if self.ranks == 1 or started_ranks() > 1:
            return None
        return launch([*self.words, *more], self.ranks, restarts)


def options_of_many(command: Any) -> Iterator[str]:
    """The options that take several values, such as --set, of a command, its subcommands, or a union of commands."""
    if dataclasses.is_dataclass(command):
        for name, hint in get_type_hints(command, include_extras=True).items():
            if get_origin(hint) in (list, tuple):  # positional ones are annotated
                yield "--" + name.replace("_", "-")
            yield from options_of_many(hint)
    elif get_origin(command) is Annotated:
        yield from options_of_many(get_args(command)[0])
    else:
        for one in get_args(command):
            yield from options_of_many(one)


def joined(arguments: list[str], of_many: Collection[str]) -> list[str]:
    """A command line in which each option of `of_many` stands once, at the end, with the values of all its mentions.

    The parser alone would keep those of the last one.
    """
    others: list[str] = []
    values: dict[str, list[str]] = {}
    place = others
    for argument in arguments:
        option, assigned, value = argument.partition("=")
        option = option.replace("_", "-")
        if option in of_many:
            place = values.setdefault(option, [])
            if assigned:
                place.append(value)
                place = others
        else:
            place = others if argument.startswith("--") else place
            place.append(argument)
    return others + [word for option, given in values.items() for word in (option, *given)]
