"""Count the lines that a user writes for one training run, with lamina and by hand.

The run is that of tests/scenario.py: a learning rate per layer, warmup and cosine, layers thawed
from the top, clipping by part, a plateau on the validation loss, accumulation over two batches with
a last step of one, killed and resumed. Model and data are imported and not counted.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from .programs import DRIVERS, largest_difference, lines_of, plan_lines, run

HEAD = (
    "| driver | program | plan.toml | with lamina | by hand | ratio | difference of the weights |"
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lines", description=__doc__)
    parser.add_argument("--count-only", action="store_true", help="do not run the programs")
    arguments = parser.parse_args()
    print(HEAD, "| --- | ---: | ---: | ---: | ---: | ---: | ---: |", sep="\n")
    for driver in DRIVERS:
        gap = "" if arguments.count_only else f"{difference(driver):.1e}"
        print(f"{row(driver)} {gap} |")


def row(driver: str) -> str:
    """Return the counted cells of a driver's row."""
    program, by_hand = (lines_of(each) for each in DRIVERS[driver])
    plan = plan_lines()
    cells = [driver, program, plan, program + plan, by_hand, f"{by_hand / (program + plan):.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


def difference(driver: str) -> float:
    """Return how far apart the two programs end, both killed once and resumed."""
    with tempfile.TemporaryDirectory() as folder:
        ends = [run(program, Path(folder, program), killed=True) for program in DRIVERS[driver]]
    return largest_difference(*ends)


if __name__ == "__main__":
    main()
