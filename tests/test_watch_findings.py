"""Every section of docs/findings.md: its wrong code gives its finding, its right code none."""

import ast
import contextlib
import re
import warnings
from pathlib import Path

import pytest

import lamina as lm
from test_docs import namespace

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "findings.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTION = re.compile(r"^### ([a-z0-9-]+)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
SECTIONS = {match[1]: match[2] for match in SECTION.finditer(TEXT)}


def blocks(section, language):
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)


def codes_of(code):
    """What is found in a block: by watching it, and by the `lm.check` in it."""
    names = namespace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of some of this too
        with lm.watch() as seen:
            with contextlib.suppress(TypeError, ValueError):  # torch refuses some of it
                exec(compile(ast.parse(code), str(PAGE), "exec"), names)
    assert seen.failure is None
    return {finding.code for finding in (*seen.findings, *names.get("findings", ()))}


@pytest.mark.parametrize("code", SECTIONS)
def test_wrong_code_gives_its_finding_only(code, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")  # one block sets it
    (wrong,) = blocks(code, "py")
    assert codes_of(wrong) == {code}


@pytest.mark.parametrize("code", SECTIONS)
def test_right_code_gives_nothing(code):
    (right,) = blocks(code, "python")
    assert codes_of(right) == set()
