"""The experiments are scripts that import each other by name; tests find them the same way."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
