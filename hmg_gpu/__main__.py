"""``python -m hmg_gpu``, the same as the command ``hmg-gpu``."""

import sys

from hmg_gpu.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
