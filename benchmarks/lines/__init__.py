"""The training run of tests/scenario.py as a user writes it, with lamina and by hand."""

import sys
from pathlib import Path

TESTS = str(Path(__file__).parents[2] / "tests")
if TESTS not in sys.path:  # the model and the data are those of the scenario
    sys.path.append(TESTS)
