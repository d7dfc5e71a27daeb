"""docs/reference/findings.md: wrong code gives the finding of its section, right code none."""

import ast
import contextlib
import re
import warnings
from pathlib import Path

import pytest
import torch

import lamina as lm
from lamina.model.finding import ADVICE

pytestmark = pytest.mark.usefixtures("little_to_search")
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "findings.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTION = re.compile(r"^### ([a-z0-9-]+)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
#: what a wrong block, which shows only the lines at fault, is put below
OPENING = """
import torch
from torch import nn
import lamina as lm
from lamina.toy import toy_problem
model, loader, loss = toy_problem()
"""
SECTIONS = {match[1]: match[2] for match in SECTION.finditer(TEXT)}


def blocks(section, language):
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)


def codes_of(code):
    """What is found in a block: by watching it, and by the `lm.check` in it."""
    names = {"__name__": "__main__"}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of some of this too
        refused = contextlib.suppress(TypeError, ValueError)  # torch refuses some of it
        with lm.watch() as seen, refused:
            exec(compile(ast.parse(code), str(PAGE), "exec"), names)
    assert seen.failure is None
    return {finding.code for finding in (*seen.findings, *names.get("findings", ()))}


@pytest.mark.parametrize("code", SECTIONS)
def test_wrong_code_gives_its_finding_only(code, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")  # one block sets it
    (wrong,) = blocks(code, "py")
    assert codes_of(OPENING + wrong) == {code}


@pytest.mark.parametrize("code", SECTIONS)
def test_right_code_gives_nothing(code):
    (right,) = blocks(code, "python")
    assert codes_of(right) == set()


# --- the page and the source ------------------------------------------------------------------


def codes_in_source():
    """Every code that the package gives a finding."""
    package = ROOT / "src" / "lamina" / "watch"
    found = set()
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                found.add(ast.unparse(node.args[0]))
    assert "f'nonfinite-{what}'" in found
    found.remove("f'nonfinite-{what}'")
    return {ast.literal_eval(each) for each in found} | {"nonfinite-gradient", "nonfinite-weight"}


def test_the_page_has_every_code_and_no_other():
    # of model/finding.py, given by plans too
    shared = {"module-requires-grad", "not-registered", "requires-grad-misspelt"}
    assert set(SECTIONS) == codes_in_source() | shared


def test_advice_is_marked_on_the_page():
    marked = {code for code, text in SECTIONS.items() if "*Advice.*" in text}
    assert marked == ADVICE
    for code in SECTIONS:
        finding = lm.Finding(code, "", "")
        assert finding.severity == ("advice" if code in marked else "problem")


def test_there_are_many():
    assert len(SECTIONS) >= 44
