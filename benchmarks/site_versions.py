"""Keep the site of each version: `python -m benchmarks.site_versions FOLDER` after `make docs`.

Copies `build/site` to `FOLDER/VERSION`, and lists the versions that are there in
`FOLDER/index.html`. The list and the sites need no server.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from benchmarks.site_hooks import version

SITE = Path(__file__).parents[1] / "build" / "site"
_VERSION = re.compile(r"\d+(\.\d+)*")
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>lamina: versions of the documentation</title>
<body style="font-family: system-ui; margin: 2rem">
<h1>lamina</h1>
<p>The documentation of each version, the newest first:</p>
<ul>
{items}
</ul>
</body>
</html>
"""


def keep(site: Path, folder: Path, name: str) -> list[str]:
    """Copy a site to the folder of its version, and write the list; return the versions.

    Args:
        site: what `make docs` built.
        folder: where the sites of all versions are; those of others stay as they are.
        name: the version of this site. One that is there is replaced.
    """
    if not (site / "index.html").is_file():
        raise SystemExit(f"{site} has no index.html; run make docs first.")
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{name}.new"
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(site, new)
    shutil.rmtree(folder / name, ignore_errors=True)
    new.rename(folder / name)
    versions = sorted(
        (path.name for path in folder.iterdir() if _VERSION.fullmatch(path.name)),
        key=lambda text: [int(part) for part in text.split(".")],
        reverse=True,
    )
    items = "\n".join(f'<li><a href="{each}/index.html">{each}</a></li>' for each in versions)
    (folder / "index.html").write_text(_PAGE.format(items=items), encoding="utf-8")
    return versions


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m benchmarks.site_versions FOLDER")
    folder = Path(sys.argv[1])
    versions = keep(SITE, folder, version())
    print(f"{folder / 'index.html'} lists {', '.join(versions)}")


if __name__ == "__main__":
    main()
