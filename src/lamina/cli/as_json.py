"""What a command prints for scripts."""

from __future__ import annotations

import json
from typing import Any


def print_json(content: Any) -> None:
    """Print plain data as one JSON document, in ASCII, which every terminal and pipe takes."""
    print(json.dumps(content, indent=2, allow_nan=False))
