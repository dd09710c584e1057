"""The first edition's name for :mod:`flatmin.book.experiments`: ``python -m`` works with both."""

import sys

from .book.experiments import *  # noqa: F403
from .book.experiments.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
