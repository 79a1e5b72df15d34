"""``python -m hmg_gpu``, the same as the command ``hmg-gpu``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
