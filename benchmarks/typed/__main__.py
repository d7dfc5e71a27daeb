"""Check a typed program against an installed lamina: `python -m benchmarks.typed [PYTHON]`.

`PYTHON` is an interpreter in whose environment lamina is installed from its wheel; this one by
default. mypy in strict mode and pyright read `program.py` there. Each `reveal_type` must have the
type of its comment, each line that is marked wrong an error, and no other line one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROGRAM = Path(__file__).with_name("program.py")
_NAME = r"[\w.]*?(\w+)"


class Answer(NamedTuple):
    """What a checker says of a line: an error, or the type that was asked for."""

    line: int
    error: bool
    text: str


def expected(text: str) -> tuple[dict[int, str], set[int]]:
    """Return the types that are asked for and the lines that are wrong, by line number."""
    types, wrong = {}, set()
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.search(r"reveal_type\(.*\)  # (\w+)$", line):
            types[number] = found[1]
        elif "  # wrong: " in line:
            wrong.add(number)
    return types, wrong


def mistakes(text: str, answers: list[Answer]) -> list[str]:
    """Return where the answers of a checker are not those that the program expects."""
    types, wrong = expected(text)
    told = {answer.line for answer in answers if answer.error}
    revealed = {answer.line: answer.text for answer in answers if not answer.error}
    found = [f"line {line}: no error" for line in sorted(wrong - told)]
    found += [
        f"line {answer.line}: {answer.text}"
        for answer in answers
        if answer.error and answer.line not in wrong
    ]
    for line, name in types.items():
        got = revealed.get(line, "nothing")
        if got != name:
            found.append(f"line {line}: {got} instead of {name}")
    return found


def mypy(python: str, program: Path) -> Iterator[Answer]:
    """Yield what mypy says."""
    strict = ("--strict", "--untyped-calls-exclude=torch", "--python-executable", python)
    command = [sys.executable, "-m", "mypy", *strict, program.name]
    done = subprocess.run(command, cwd=program.parent, capture_output=True, text=True)
    if "checked 1 source file" not in done.stdout:
        raise SystemExit(f"mypy did not read the program:\n{done.stdout}{done.stderr}")
    for number, kind, text in re.findall(r"^program\.py:(\d+): (\w+): (.*)$", done.stdout, re.M):
        revealed = re.fullmatch(rf'Revealed type is "{_NAME}"', text)
        if kind == "error" or revealed:
            yield Answer(int(number), kind == "error", revealed[1] if revealed else text)


def pyright(python: str, program: Path) -> Iterator[Answer]:
    """Yield what pyright says."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", python]
    done = subprocess.run(
        [*command, program.name], cwd=program.parent, capture_output=True, text=True
    )
    try:
        said = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        raise SystemExit(f"pyright did not run:\n{done.stdout}{done.stderr}") from None
    for each in said["generalDiagnostics"]:
        number, text = each["range"]["start"]["line"] + 1, each["message"]
        revealed = re.fullmatch(rf'Type of ".*" is "{_NAME}"', text, re.DOTALL)
        if each["severity"] == "error" or revealed:
            yield Answer(number, each["severity"] == "error", revealed[1] if revealed else text)


def main() -> None:
    python = str(Path(sys.argv[1]).absolute()) if len(sys.argv) > 1 else sys.executable
    text = PROGRAM.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"  # away from the source, which would be read instead
        program.write_text(text, encoding="utf-8")
        subprocess.run([python, "-W", "error", program.name], cwd=folder, check=True)
        failed = False
        for checker in (mypy, pyright):
            found = mistakes(text, list(checker(python, program)))
            types, wrong = expected(text)
            done = f"{len(types)} types as expected, {len(wrong)} mistakes found"
            print(f"{checker.__name__}: {'; '.join(found) or done}")
            failed = failed or bool(found)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
