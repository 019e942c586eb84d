"""
The command line `mars-hf`: words to calls.

`drawing.py` uses a checkpoint, `workshop.py` makes one; `app.py` holds what they share. Every command imports what it
needs when it runs, so that help is instant.
"""

from . import drawing, workshop  # noqa: F401  they add their commands
from .app import app


def main() -> None:
    """Run the command line."""
    app(prog_name="mars-hf")


__all__ = ["app", "main"]
