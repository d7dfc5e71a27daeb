"""Text and data in HTML: everything that comes from names is escaped here."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import printable

#: longer names are cut in the middle; the whole stays in the `title`
_LONGEST = 120


def text(value: object) -> str:
    """Return a text as HTML; control characters are spelled out."""
    return html.escape(printable(str(value)), quote=True)


def name(value: str, limit: int = _LONGEST) -> str:
    """Return a name as HTML in the font of code; of a very long one its beginning and end."""
    short = value if len(value) <= limit else f"{value[: limit // 2]}…{value[-limit // 2 :]}"
    whole = f' title="{text(value[:2000])}"' if short != value else ""
    return f"<code{whole}>{text(short)}</code>"


def data(value: Any) -> str:
    """Return JSON that can stand in a script element, whatever the texts in it are."""
    written = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return written


def script_hash(source: str) -> str:
    """Return what a Content-Security-Policy calls a script, so that no other one may run."""
    digest = hashlib.sha256(source.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], first_is_name: bool = True
) -> str:
    """Return a table; the cells are HTML already, caption and head are texts."""
    columns = "".join(f'<th scope="col">{text(title)}</th>' for title in head)
    body = []
    for cells in rows:
        first, *others = cells
        start = f'<th scope="row">{first}</th>' if first_is_name else f"<td>{first}</td>"
        body.append(f"<tr>{start}{''.join(f'<td>{cell}</td>' for cell in others)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table>'
        f"<caption>{text(caption)}</caption><thead><tr>{columns}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def folded(summary: str, content: str) -> str:
    """Return a part that opens on demand."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def plain(value: float | None) -> float | None:
    """Return a number with the digits that a screen can show; None for what JSON cannot hold."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")
