"""Attack lamina and count what became of every attempt: a markdown table on standard output.

The exit status is 1 if anything ran code, hung, ended in a traceback or was wrong.
"""

from __future__ import annotations

import argparse
import sys
import time

from .count import Counts, table
from .gradients import gradients
from .kills import kills
from .plans import plans
from .resumes import resumes
from .states import checkpoints, states
from .steps import steps

ATTACKS = {
    each.__name__: each for each in (gradients, states, checkpoints, plans, kills, resumes, steps)
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(ATTACKS)} (all)")
    parser.add_argument("--tiny", action="store_true", help="a few attempts of each")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(ATTACKS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(ATTACKS)}")
    rows: list[Counts] = []
    for name in arguments.names or ATTACKS:
        begin = time.monotonic()
        rows += ATTACKS[name](full=not arguments.tiny)
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    print(table(rows))
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
