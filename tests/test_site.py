"""The documentation site: its links, its build without warnings, and the site in a browser."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks import site_versions
from benchmarks.site_hooks import site_links, version

import lamina
from browser import CHROMIUM, Browser

ROOT = Path(__file__).parents[1]
BUILDS = pytest.mark.skipif(
    importlib.util.find_spec("material") is None, reason="needs the extra docs (make docs)"
)


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("README.md", "[a](../CHANGELOG.md)", "[a](changelog.md)"),
        ("README.md", "[a](install.md#extras)", "[a](install.md#extras)"),
        ("how-to/report.md", "![a](report/phone.png)", "![a](report/phone.png)"),
        ("how-to/report.md", "[a](../../README.md)", "[a](../README.md)"),
        ("how-to/report.md", "[a](../../examples/own_task.py)", "a"),
        ("contributing.md", "[a](docs/faq.md)", "[a](faq.md)"),
        ("faq.md", "[a](https://example.org/x)", "[a](https://example.org/x)"),
    ],
)
def test_links_lead_to_pages_of_the_site(page, link, expected):
    assert site_links(f"text {link}.", page) == f"text {expected}."


def test_the_site_has_the_version_of_lamina():
    assert version() == lamina.__version__


def test_sites_of_several_versions_stand_beside_each_other_the_newest_first(tmp_path):
    site, folder = tmp_path / "site", tmp_path / "all"
    site.mkdir()
    for name in ("0.9.0", "0.10.0", "0.2.0", "0.10.0"):
        (site / "index.html").write_text(f"pages of {name}")
        versions = site_versions.keep(site, folder, name)
    assert versions == ["0.10.0", "0.9.0", "0.2.0"]
    page = (folder / "index.html").read_text()
    assert page.index('href="0.10.0/index.html"') < page.index('href="0.9.0/index.html"')
    assert {path.name for path in folder.iterdir()} == {*versions, "index.html"}
    assert (folder / "0.9.0" / "index.html").read_text() == "pages of 0.9.0"


def test_a_site_that_was_not_built_replaces_none(tmp_path):
    (tmp_path / "all" / "0.2.0").mkdir(parents=True)
    with pytest.raises(SystemExit, match="run make docs first"):
        site_versions.keep(tmp_path / "site", tmp_path / "all", "0.2.0")
    assert (tmp_path / "all" / "0.2.0").is_dir()


def built(folder, root=ROOT):
    """Build the site with every warning an error, and return what was said."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = built(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"), seconds=240)
    yield browser
    browser.close()


@BUILDS
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)")
def test_the_site_fits_a_phone_says_nothing_on_the_console_and_fetches_nothing(site, browser):
    pages = [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]
    assert len(pages) > 40
    wide = []
    for page in pages:
        browser.open(page, 390, 844)
        if browser.run("document.documentElement.scrollWidth > innerWidth"):
            wide.append(page.name)
    assert wide == []
    assert browser.console == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []


@BUILDS
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)")
def test_the_search_works_from_the_file_system(site, browser):
    browser.open(site / "index.html")
    browser.run("document.querySelector('.md-search__input').focus()")
    browser.run(
        "(() => { const input = document.querySelector('.md-search__input');"
        "input.value = 'plateau';"
        "input.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true})); })()"
    )
    found = "document.querySelectorAll('.md-search-result__item').length"
    browser.wait(f"{found} > 0")
    assert browser.run(found) >= 5


@BUILDS
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)")
def test_the_site_is_dark_where_the_reader_prefers_it(site, tmp_path):
    browser = Browser(tmp_path, seconds=60)
    browser.open(site / "index.html", dark=True)
    time.sleep(0.5)
    scheme = browser.run("document.body.getAttribute('data-md-color-scheme')")
    browser.close()
    assert scheme == "slate"


@BUILDS
@pytest.mark.slow
def test_canary_a_broken_link_fails_the_build(tmp_path):
    for name in ("docs", "src", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    with (tmp_path / "docs" / "faq.md").open("a", encoding="utf-8") as page:
        page.write("\n[nowhere](nowhere.md)\n")
    done = built(tmp_path / "site", tmp_path)
    assert done.returncode != 0
    assert "Aborted with 1 warnings" in done.stdout + done.stderr
    assert "nowhere.md" in done.stderr
