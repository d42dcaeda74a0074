"""Entry point of the command `megalodon`."""

import sys
from typing import Annotated, Any

import tyro
from tyro.conf import arg, subcommand

from .. import __version__
from ..errors import InputError
from .bench import Bench
from .chat import Chat
from .evaluate import Evaluate
from .generate import Generate
from .info import Info
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
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Info, subcommand("info")]
)

DESCRIPTION = f"""Megalodon {__version__}: language models without a context limit.

Start with `megalodon quickstart`: it trains a small model on novels that come with the package, measures it and lets
it write. Then train on your own text with `megalodon train RECIPE`.
"""


def main(arguments: list[str] | None = None) -> None:
    """Parse and run; wrong input ends in one line and exit code 2."""
    command: Any = tyro.cli(
        Annotated[Command, arg(name="")],
        prog="megalodon",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    try:
        command.run()
    except InputError as error:
        print(f"megalodon: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("megalodon: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)


if __name__ == "__main__":
    main()
