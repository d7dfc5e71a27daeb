"""The pictures of the documentation show what the code does now."""

import re
from pathlib import Path

import pytest
from benchmarks import pictures

from lamina.schedules import SCHEDULES

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", pictures.ALL)
def test_a_picture_is_current(name):
    assert pictures.is_current(pictures.OUT / f"{name}.png", pictures.ALL[name]())


def test_canary_another_curve_is_noticed():
    path = pictures.OUT / "schedule-cosine.png"
    places, values = pictures.small("cosine")["cosine"]
    assert not pictures.is_current(path, {"cosine": (places, [*values[:-1], values[-1] + 1e-4])})
    assert not pictures.is_current(path, {"cosine": (places[:50], values[:50])})
    assert not pictures.is_current(path, {"cosines": (places, values)})


def test_every_schedule_has_a_picture_and_every_picture_a_page():
    assert set(pictures.SCHEDULES) == set(SCHEDULES)
    there = {path.name for path in pictures.OUT.glob("*.png")}
    assert there == {f"{name}.png" for name in pictures.ALL}
    pages = [DOCS.parent / "README.md", *DOCS.rglob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert {name for name in there if not re.search(rf"pictures/{name}\)", text)} == set()


def test_the_preview_in_the_readme_is_what_its_program_prints():
    page = pictures.README.read_text("utf-8")
    assert pictures.readme_with_preview(page) == page
    assert pictures.readme_with_preview(page.replace("lr=2e-4", "lr=3e-4")) != page
