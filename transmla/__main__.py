"""``python -m transmla``."""

from transmla.cli import main

main()
