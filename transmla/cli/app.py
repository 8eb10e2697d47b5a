"""The application: one command per verb, and errors as one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from transmla import __version__
from transmla.cli.convert_verbs import convert, families, inspect, plan
from transmla.cli.evaluate_verb import evaluate
from transmla.cli.export_verbs import bench, heal, push, verify
from transmla.cli.options import Command
from transmla.errors import TransmlaError

VERBS: dict[str, Callable[..., None]] = {
    "families": families,
    "plan": plan,
    "inspect": inspect,
    "convert": convert,
    "verify": verify,
    "eval": evaluate,
    "heal": heal,
    "bench": bench,
    "push": push,
}
# What a shell reports for Ctrl-C, and what typer turns it into.
INTERRUPTED = 130


def _version(asked: bool) -> None:
    if asked:
        print(f"transmla {__version__}")
        raise typer.Exit


def build() -> typer.Typer:
    """Build the application, one command per verb."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        """Convert pretrained models to Multi-head Latent Attention: a small KV cache, fast decoding."""

    for name, function in VERBS.items():
        app.command(name, cls=Command)(function)
    return app


def _quiet() -> None:
    """Silence the progress bars and advice of libraries."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """Run the command line; bad input is one line on standard error and exit code 2."""
    arguments = sys.argv[1:] or ["--help"]
    try:
        if not {"--help", "--version"} & set(arguments):
            _quiet()
        code = build()(arguments, standalone_mode=False)
    except TransmlaError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        # A misused option. typer carries click inside or beside it, by version, and exports no base class of errors.
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {TransmlaError(error.format_message(), remedy='see --help')}", file=sys.stderr)
        raise SystemExit(2) from error
    if code == INTERRUPTED:
        resumable = arguments[0] in ("convert", "heal")
        hint = f"; `transmla {arguments[0]}` continues with --resume" if resumable else ""
        print(f"interrupted{hint}", file=sys.stderr)
    raise SystemExit(code or 0)
