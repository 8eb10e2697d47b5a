"""The application: one command per verb, and errors as one line."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from inspect import cleandoc
from typing import Annotated

import typer

from transmla import __version__
from transmla.boundary import explain
from transmla.cli.convert_verbs import convert, families, inspect, plan
from transmla.cli.evaluate_verb import evaluate
from transmla.cli.export_verbs import bench, heal, push, verify
from transmla.cli.gguf_verb import gguf
from transmla.cli.options import Command
from transmla.cli.serve_verbs import chat, serve
from transmla.cli.streams import Tolerant, abandon_output, flush_output, prepare_streams
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
    "chat": chat,
    "serve": serve,
    "gguf": gguf,
    "push": push,
}
# What a shell reports for Ctrl-C, and what typer turns it into; and for a command whose reader has left.
INTERRUPTED, PIPE_CLOSED = 130, 141
# Loggers that warn of torchao's own code where torchao is installed, because transformers imports it.
TALKATIVE = ("torchao", "torch.utils._pytree")
# DeepSpeed, which accelerate imports where it is installed, warns of a computer without a GPU.
NO_GPU = "Setting accelerator to CPU"
ISSUES = "https://pypi.org/project/transmla"


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
        context = {"allow_extra_args": True} if function is serve else None
        # typer keeps the line breaks of a docstring, and wraps each of its lines again.
        help_text = "\n\n".join(" ".join(part.split()) for part in cleandoc(function.__doc__ or "").split("\n\n"))
        app.command(name, cls=Command, context_settings=context, help=help_text)(function)
    return app


def main() -> None:
    """Run the command line; bad input is one line on standard error and exit code 2."""
    prepare_streams()
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_says_more)
    arguments = sys.argv[1:] or ["--help"]
    try:
        code = build()(arguments, standalone_mode=False)
        flush_output()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of standard output has left, as `head` does
        abandon_output()
        code = PIPE_CLOSED
    except Exception as error:
        code = INTERRUPTED if _was_interrupted(error) else _report(error, arguments[0])
    if code == INTERRUPTED:
        resumable = arguments[0] in ("convert", "heal")
        hint = f"; `transmla {arguments[0]}` continues with --resume" if resumable else ""
        _complain(f"interrupted{hint}")
    raise SystemExit(code or 0)


def _says_more(record: logging.LogRecord) -> bool:
    """Return whether a record of DeepSpeed's logger says more than that there is no GPU."""
    return not record.getMessage().startswith(NO_GPU)


def _was_interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused ``error``.

    Python 3.11 raises RuntimeError if it interrupts ``__set_name__``, and SystemError if C code has ignored it.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _report(error: Exception, verb: str) -> int:
    """Print an error of the command ``verb``, and return the exit code. Only a bug of transmla shows its traceback.

    Another process prints an error that is already ``told`` (``Ranks.on_first``).
    """
    if getattr(error, "told", False):
        return 2
    # A misused option. typer carries click inside or beside it, by version, and exports no base class of errors.
    message = getattr(error, "format_message", None)
    remedy = "see --help; the server's own options go after --" if verb == "serve" else "see --help"
    explained = TransmlaError(message(), remedy=remedy) if message else explain(error)
    if explained is not None:
        if isinstance(error, OSError):  # standard output may be what failed
            abandon_output()
        _complain(f"error: {explained}")
        return 2
    _complain("".join(traceback.format_exception(error)).rstrip())
    _complain(f"This is a bug of transmla {__version__}. Please report the lines above and the command at {ISSUES}")
    return 1


def _complain(text: str) -> None:
    print(text, file=Tolerant())
