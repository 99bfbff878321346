"""``python -m pyparallel``."""

import sys

from pyparallel.cli import main

if __name__ == "__main__":
    sys.exit(main())
