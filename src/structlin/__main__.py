"""``python -m structlin`` is the ``structlin`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
