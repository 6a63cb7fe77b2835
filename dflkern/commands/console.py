"""Where tables and progress are printed."""

from __future__ import annotations

from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave a reader that has gone to the command line, as for anything else printed."""
        raise  # the BrokenPipeError that rich is handling


def open_console(width: int) -> Console:
    """The terminal; or, where the output is a file or a pipe, lines of a fixed width."""
    console = _Console()
    return console if console.is_terminal else _Console(width=width)
