"""Attacks on lamina that can be repeated: `python -m benchmarks.attacks --help`.

Each is seeded, takes its full size by default, and counts what became of every attempt. The tests
hold the mutators and drivers; here they are used in greater numbers.
"""

import sys
from pathlib import Path

#: shared with the tests: mutators, small tasks, the driver that kills
TESTS = Path(__file__).parents[2] / "tests"
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))
