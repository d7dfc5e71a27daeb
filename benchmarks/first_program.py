"""Print the first program of the README, which `make dist` runs with the installed wheel."""

from __future__ import annotations

import re
from pathlib import Path

if __name__ == "__main__":
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    first = re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    if first is None:
        raise SystemExit("README.md has no Python program")
    print(first[1])
