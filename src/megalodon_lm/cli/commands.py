"""The commands, and which of them a command line names."""

import sys
from typing import Annotated, Any, get_args

import tyro
from tyro.conf import arg, subcommand

from .. import __version__
from ..errors import InputError, nearest
from ..parallel.started import started_ranks
from .bench import Bench
from .chat import Chat
from .classify import Classify
from .compare import Compare
from .convert import Convert
from .evaluate import Evaluate
from .generate import Generate
from .info import Info
from .options import Quiet, Shared, joined, options_of_many
from .plan import PlanCommand
from .prepare import Prepare
from .quickstart import Quickstart
from .read import Read
from .state import StateFile
from .tokenizer import Tokenizer
from .train import Train

Command = (
    Annotated[Quickstart, subcommand("quickstart")]
    | Annotated[Tokenizer, subcommand("tokenizer")]
    | Annotated[Prepare, subcommand("prepare")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Read, subcommand("read")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Chat, subcommand("chat")]
    | Annotated[StateFile, subcommand("state")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Classify, subcommand("classify")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Info, subcommand("info")]
    | Annotated[PlanCommand, subcommand("plan")]
    | Annotated[Convert, subcommand("convert")]
)
COMMANDS = {get_args(choice)[1].name: choice for choice in get_args(Command)}

DESCRIPTION = f"""Megalodon {__version__}: language models without a context limit.

Start with `megalodon quickstart`: it trains a small model on novels that come with the package, measures it and lets
it write. Then train on your own text with `megalodon train RECIPE`. `megalodon --version` prints the version.
"""


def parse(arguments: list[str] | None = None) -> Any:
    """The command, ready to run.

    Args:
        arguments: of the command line; None for those of the process.

    Raises:
        InputError: no such command.
        SystemExit: wrong options, or help was asked for; it was printed then.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    first = next(iter(arguments), "--help")
    if first == "--version":
        print(f"megalodon {__version__}")
        sys.exit()
    if not first.startswith("-") and first not in COMMANDS:
        raise InputError(f"no command {first!r}{nearest(first, COMMANDS)}; commands: {', '.join(COMMANDS)}")
    command: Any = tyro.cli(
        Annotated[Command, arg(name="")],
        prog="megalodon",
        description=DESCRIPTION,
        args=joined(arguments, set(options_of_many(COMMANDS.get(first)))),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    chosen = getattr(command, "task", command)
    if isinstance(chosen, Quiet):
        from .progress import console

        console.quiet = chosen.quiet
    if isinstance(chosen, Shared):
        Shared.words = arguments
    elif started_ranks() > 1:  # each would do all of it
        raise InputError(f"megalodon {first} is one process and cannot be shared; start it without torchrun")
    return command
