"""The docstrings on the documentation site: `Example:` is read as the section `Examples:`.

The parser of Google's style knows only the plural, and would read the prompts of an example as
prose.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension


class SingleExamples(Extension):  # type: ignore[misc,unused-ignore]
    """Rename the section before the docstring is parsed."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Rename the section of one object."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
