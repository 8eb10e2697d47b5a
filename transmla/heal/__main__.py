"""``accelerate launch -m transmla.heal DIR --teacher …``: the same command on many processes."""

import sys

from transmla.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "heal")
    main()
