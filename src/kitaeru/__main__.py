"""`python -m kitaeru` is `kitaeru`."""

import sys

from kitaeru.cli import main

if __name__ == "__main__":
    sys.exit(main())
