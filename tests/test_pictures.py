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


def contrast(one, other):
    """The ratio of the luminances of two colours, as WCAG 2 defines it."""
    levels = []
    for colour in (one, other):
        parts = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        levels.append(0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)
    return max(levels) / min(levels)


def is_transparent(path):
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("RGBA").getpixel((0, 0))[3] == 0


@pytest.mark.parametrize("name", pictures.ALL)
def test_a_picture_has_no_background(name):
    assert is_transparent(pictures.OUT / f"{name}.png")


def test_ink_can_be_read_on_light_and_dark_pages():
    light, dark = "#ffffff", "#1e2129"  # the pages of the site
    colours = (pictures.INK, pictures.CURVE, *pictures.PALETTE)
    assert min(contrast(ink, page) for ink in colours for page in (light, dark)) > 3
    assert contrast("#000000", light) == pytest.approx(21)
    assert contrast("#24292f", dark) < 3  # a canary


def test_canary_a_background_is_noticed():
    assert not is_transparent(DOCS / "reference" / "optimizers" / "adam.png")


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
