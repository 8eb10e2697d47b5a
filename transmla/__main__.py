"""``python -m transmla``; on several processes ``accelerate launch -m transmla convert …``."""

from transmla.cli import main

if __name__ == "__main__":
    main()
