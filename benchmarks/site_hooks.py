"""Hooks of the documentation site: its version, pages in the root of the repository, and links.

On disk a page links to `../CHANGELOG.md` and to files of the source, so that its links lead
somewhere when the repository itself is read. A site has only its own pages: the texts of the root
become pages of it, and links to other files become plain text.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parents[1]
#: texts of the root that are pages of the site too, by the name they have there
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
#: the first page of the site stands for the README of the repository
PAGES_BY_PATH = {**ROOT_PAGES, "README.md": "README.md"}
_LINK = re.compile(r"(!?\[(?P<text>[^\]]*)\])\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def version() -> str:
    """Return the version of lamina that the pages describe."""
    source = (ROOT / "src" / "lamina" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert found is not None
    return found[1]


def on_config(config: Any) -> None:
    """Put the version into the title and the footer of every page."""
    config.site_name = f"{config.site_name} {version()}"
    config.copyright = f"The pages of {config.site_name}"


def on_files(files: Any, config: Any) -> Any:
    """Add the texts of the root as pages."""
    from mkdocs.structure.files import File

    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at the pages of the site."""
    return site_links(markdown, page.file.src_uri)


def site_links(markdown: str, uri: str) -> str:
    """Return a page with its links as the site has them.

    Args:
        markdown: the text of the page.
        uri: its place in the site, such as `how-to/find-lr.md`.
    """
    on_disk = {page: source for source, page in ROOT_PAGES.items()}
    place = PurePosixPath(on_disk.get(uri, f"docs/{uri}"))
    folder = str(PurePosixPath(uri).parent)

    def point(match: re.Match[str]) -> str:
        path = os.path.normpath(place.parent / match["target"])
        anchor = match["anchor"] or ""
        if path in PAGES_BY_PATH:
            return f"{match[1]}({os.path.relpath(PAGES_BY_PATH[path], folder)}{anchor})"
        if path.startswith("docs/"):
            return f"{match[1]}({os.path.relpath(path.removeprefix('docs/'), folder)}{anchor})"
        return match["text"]

    return _LINK.sub(point, markdown)
