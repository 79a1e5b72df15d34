"""Bad luck on purpose; ``python -m tests.torture`` runs it."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
# What pytest's settings do: the checkout, the helper modules, and the writers of point files in test_points.py.
sys.path[:0] = [folder for folder in map(str, (TESTS.parent, TESTS, TESTS / "data")) if folder not in sys.path]
