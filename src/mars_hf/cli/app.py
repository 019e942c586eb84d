"""What all commands share: the application, its options and its errors."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

MARKUP: Literal["markdown"] = "markdown"  # the default, rich's own, would swallow "[default: the model's]"
EXIT_CODES = "Exit codes: 0 done, 1 the machine failed, 2 a wrong argument or input, 130 interrupted."


class OneLineGroup(TyperGroup):
    """Commands whose wrong options are told in one line, as all their other errors."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except typer.TyperException as error:
            if said := error.format_message():  # without a command there is only the help, which is shown already
                typer.echo(f"mars-hf: {in_one_line(said)}", err=True)
            status = error.exit_code
        except typer.Abort:
            status = 1
        sys.exit(status)


app = typer.Typer(
    cls=OneLineGroup,
    help="MARS: a language model that also draws.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=MARKUP,
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error.")]


def in_one_line(text: object) -> str:
    """Bring a text to one line: messages of libraries may have several."""
    return " ".join(str(text).split())


@contextmanager
def one_line_errors(debug: bool, extra: str = "data") -> Iterator[None]:
    """Tell what a user can mend in one line, and exit with 2 for a wrong argument, 1 for a failing machine."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, MemoryError, ModuleNotFoundError, FloatingPointError) as error:
        if debug or isinstance(error, (typer.Exit, typer.Abort)):
            raise
        missing = isinstance(error, ModuleNotFoundError) and error.name  # without a name it says itself what to do
        hint = f". The extras bring it: pip install 'mars_hf[{extra}]'" if missing else ""
        typer.echo(f"mars-hf: {in_one_line(error) or type(error).__name__}{hint}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None


def examples(*lines: str) -> str:
    """Write the end of a command's help; blank lines keep lines apart."""
    return "\n\n".join(["Examples:", *lines, EXIT_CODES])
