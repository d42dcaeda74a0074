"""Options that several commands have."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class Quiet:
    """A command that shows its progress on standard error."""

    quiet: bool = False
    """Show results and errors, but no progress and no remarks."""
