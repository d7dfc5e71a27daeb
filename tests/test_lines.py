"""The programs of `python -m benchmarks.lines`: both of a driver train the same, also resumed."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks.lines import __main__ as command  # noqa: E402
from benchmarks.lines.programs import (  # noqa: E402
    DRIVERS,
    HERE,
    code_lines,
    largest_difference,
    run,
)

#: rounding: lamina multiplies the clip factor in while it reads a gradient
TOLERANCE = 1e-5
SLOW = [driver for driver in DRIVERS if driver != "plain"]


@pytest.mark.parametrize(
    "driver", ["plain", *(pytest.param(driver, marks=pytest.mark.slow) for driver in SLOW)]
)
def test_both_programs_train_the_same_also_killed_and_resumed(driver, tmp_path):
    ends = []
    for program in DRIVERS[driver]:
        whole = run(program, tmp_path / f"{program}, whole")
        resumed = run(program, tmp_path / f"{program}, killed", killed=True)
        assert largest_difference(whole, resumed) == 0
        ends.append(whole)
    assert largest_difference(*ends) < TOLERANCE


def test_lines_are_those_with_code():
    text = "\n".join(
        [
            *('"""A program', 'with a docstring."""', "import os  # a comment", "", "# another"),
            *("def f():", '    """Say what."""', "    return g(", "        1,", "    )"),
            *('x = """a', 'b"""'),
        ]
    )
    assert code_lines(text) == 7
    assert code_lines(f"{text}\ny = 2") == 8


def test_every_program_belongs_to_a_driver():
    programs = {path.stem for path in HERE.glob("*_*.py") if not path.stem.startswith("_")}
    assert programs == {program for pair in DRIVERS.values() for program in pair}


def rows_in(page):
    """The rows of the page's table, without the differences of the weights."""
    begin = page.index(command.HEAD)
    rows = page[begin:].split("\n\n", 1)[0].splitlines()[2:]
    return [row.rsplit("|", 2)[0] + "|" for row in rows]


def test_the_page_has_what_the_command_counts():
    page = (ROOT / "docs" / "how-to" / "trainers" / "README.md").read_text()
    counted = [command.row(driver) for driver in DRIVERS]
    assert rows_in(page) == counted
    assert rows_in(page.replace("| plain | ", "| plain | 1")) != counted
