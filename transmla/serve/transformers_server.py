"""Start transformers' server: ``python -m transmla.serve.transformers_server FOLDER [OPTION ...]``.

The options are those of ``transformers serve``. The server calls its model by the path that it is given, so it works in
the folder above, and the path is the folder's name.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

INTERRUPTED, REFUSED = 130, 2


def main() -> None:
    """Serve until Ctrl-C; a wrong option is one line and exit code 2."""
    folder, *options = sys.argv[1:]
    path = Path(folder).resolve()
    os.chdir(path.parent)
    try:
        _serve(path.name, options)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        # typer carries click inside or beside it, by version, and exports neither of these classes.
        message: Any = getattr(error, "format_message", None)
        if type(error).__name__ == "Abort":
            code = INTERRUPTED
        elif message is not None:
            where = "arguments after -- go to `transformers serve`; see `transformers serve --help`"
            # The lines that follow list all options.
            print(f"error: {message().splitlines()[0].rstrip('. ')}; {where}", file=sys.stderr)
            code = REFUSED
        else:
            raise
    else:
        code = 0
    if code == INTERRUPTED:
        print("stopped", file=sys.stderr)
    raise SystemExit(code)


def _serve(name: str, options: list[str]) -> None:
    # Registers the format of transmla even where its start-up file is not installed.
    from transformers.cli.transformers import app

    import transmla.autoload  # noqa: F401

    app(["serve", name, *options], prog_name="transformers", standalone_mode=False)


if __name__ == "__main__":
    main()
