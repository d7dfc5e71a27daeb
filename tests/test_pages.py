"""The glossary and the page of pitfalls: sorted, one sentence each, and about what is there."""

import re
from pathlib import Path

import lamina as lm
from lamina.schedules import SCHEDULES

ROOT = Path(__file__).parents[1]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
PITFALLS = (ROOT / "docs" / "explanation" / "pitfalls.md").read_text()


def entries(page):
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line[:2] == "| "]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_glossary_is_sorted_and_says_something_of_each_word():
    words = [word for word, _ in entries(GLOSSARY)[1:]]
    assert words == sorted(words)
    assert len(words) == len(set(words))
    assert all(meaning.endswith(".") for _, meaning in entries(GLOSSARY)[1:])
    for word in ("plan", "rule", "cell", "scope", "window", "factor", "value", "clock", "guest"):
        assert word in words


def unknown_tests(page):
    """Tests that the last column names and that are not there."""
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = [row[3].strip("`") for row in entries(page) if len(row) == 4 and row[3] != "test"]
    files = [name for name in named if name.startswith("tests/")]
    missing = [name for name in files if not (ROOT / name).is_file()]
    functions = [name for name in named if name not in files]
    return missing + [name for name in functions if f"def {name}(" not in sources]


def test_the_tests_of_the_pitfalls_are_there():
    assert unknown_tests(PITFALLS) == []
    assert unknown_tests(PITFALLS.replace("test_ties.py", "test_tries.py")) == [
        "tests/test_tries.py"
    ]
    assert unknown_tests("| a | b | c | `test_gone` |") == ["test_gone"]


def listed_schedules(page):
    """The names in the table of schedules."""
    table = page[page.index("### Every schedule") : page.index("`print(lm.cosine")]
    return set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


def test_the_page_of_schedules_lists_them_all():
    page = (ROOT / "docs" / "reference" / "schedules.md").read_text()
    assert listed_schedules(page) == set(SCHEDULES)
    renamed = page.replace("`multi_step`", "`multi_steps`")
    assert "multi_steps" in listed_schedules(renamed) - set(SCHEDULES)


def unknown_names(page):
    """Names such as `lm.cosine` that lamina does not have."""
    return sorted({name for name in re.findall(r"\blm\.(\w+)", page) if not hasattr(lm, name)})


def test_names_in_the_pages_are_there():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    assert {page.name: unknown_names(page.read_text()) for page in pages} == {
        page.name: [] for page in pages
    }
    assert unknown_names("lm.cosine and lm.cosines") == ["cosines"]
