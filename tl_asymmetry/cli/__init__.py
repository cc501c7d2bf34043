"""The command line, `tl-asymmetry` or `python -m tl_asymmetry`: `command.py` parses, a module a command."""

from tl_asymmetry.cli.command import main

__all__ = ["main"]
