"""Alias of ``-m transmla heal``, for example ``accelerate launch -m transmla.heal DIR …``."""

import sys

from transmla.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "heal")
    main()
