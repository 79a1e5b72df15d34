"""Bad luck on purpose; ``python -m tests.torture`` runs it."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
# What pytest's settings do: the checkout, the helper modules, the writers of point files in test_points.py, and the
# client of the review's page.
FOLDERS = (TESTS.parent, TESTS, TESTS / "data", TESTS / "review")
sys.path[:0] = [folder for folder in map(str, FOLDERS) if folder not in sys.path]
