"""The command line: ``transmla VERB``."""

from transmla.cli.app import main
from transmla.cli.verbs import VERBS

__all__ = ["VERBS", "main"]
