"""The report in a real browser: no errors, curves, hover, toggles, keyboard, phone and dark."""

import json
import time

import pytest

from browser import CHROMIUM, Browser
from lamina.model.finding import Finding
from lamina.record import Record
from lamina.record.planned import ParameterEntry
from lamina.report_page import write_report

pytest.importorskip("plotly")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)"),
    pytest.mark.slow,
]

from test_report_page import ATTACKS, recorded  # noqa: E402

DRAWN = "document.querySelectorAll('#chart-lr .scatterlayer .trace').length"
VISIBLE = "document.getElementById('chart-lr').data.filter((t) => t.visible).length"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One browser for all tests here: starting it takes longer than they do."""
    browser = Browser(tmp_path_factory.mktemp("browser"), seconds=150)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    record, planned = recorded()
    record.finding(Finding("clip-never-acts", "the norm of head.* is never clipped.", "Lower it."))
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(record, path, planned=planned, title="A run", facts={"seed": "1"})
    return path


def opened(browser, report, **size):
    browser.console.clear()
    browser.requests.clear()
    browser.open(report, **size)
    show(browser, "lr")
    browser.wait(f"{DRAWN} > 0")


def show(browser, chart):
    """Scroll to a chart, and wait until it is drawn: charts far below are not drawn yet."""
    place = f"document.getElementById('chart-{chart}')"
    browser.run(f"{place}.scrollIntoView({{behavior: 'instant', block: 'center'}})")
    browser.wait(f"{place}.querySelector('.scatterlayer path, .heatmaplayer image')")


def click(browser, selector):
    browser.run(f"document.querySelector({json.dumps(selector)}).click()")


def test_it_opens_without_errors_and_without_a_network(browser, report):
    opened(browser, report)
    assert browser.run(DRAWN) == 6
    for chart in ("metric-0", "gradients", "clip", "updates", "weights"):
        show(browser, chart)
    assert browser.console == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in browser.requests)


def test_toggles_show_and_hide(browser, report):
    opened(browser, report)
    click(browser, "[data-planned=lr]")
    browser.wait(f"{VISIBLE} === 3")
    group = browser.run("document.querySelector('[data-group]').dataset.group")
    click(browser, "[data-group]")
    browser.wait(f"{VISIBLE} === 2")
    pressed = f"document.querySelector('[data-group=\"{group}\"]').ariaPressed"
    assert browser.run(pressed) == "false"
    click(browser, "[data-all='1']")
    click(browser, "[data-planned=lr]")
    browser.wait(f"{VISIBLE} === 6")
    click(browser, "[data-axis=lr][data-type=linear]")
    browser.wait("document.getElementById('chart-lr').layout.yaxis.type === 'linear'")
    click(browser, "[data-only]")  # of a finding: its groups alone
    browser.wait(f"{VISIBLE} === 2")
    click(browser, "button[data-tree=state]")
    assert browser.run("document.body.dataset.tree") == "state"
    assert browser.console == []


def test_hover_shows_values(browser, report):
    opened(browser, report)
    box = browser.run(
        "(() => { const b = document.querySelector('#chart-lr .nsewdrag').getBoundingClientRect();"
        "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    shown = "document.querySelector('#chart-lr .hoverlayer').textContent.includes('0')"
    for nudge in range(50):
        browser.move(box[0] + nudge % 5, box[1])
        time.sleep(0.1)
        if browser.run(shown):
            break
    said = browser.run("document.querySelector('#chart-lr .hoverlayer').textContent")
    assert "head.*" in said


def test_the_keyboard_reads_a_chart(browser, report):
    opened(browser, report)
    browser.run("document.getElementById('chart-lr').focus()")
    browser.press("ArrowRight")
    browser.wait("document.getElementById('said').textContent.startsWith('step 0: ')")
    browser.press("End")
    browser.wait("document.getElementById('said').textContent.startsWith('step 11: ')")
    assert "head.* applied" in browser.run("document.getElementById('said').textContent")
    show(browser, "updates")
    browser.run("document.getElementById('chart-updates').focus()")
    browser.press("ArrowRight")
    browser.wait("document.getElementById('said').textContent.startsWith('steps 0 to 0: ')")


def test_it_fits_a_phone_and_follows_a_dark_scheme(browser, report):
    opened(browser, report, width=390, height=844)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    light = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.resize(390, 844, dark=True)
    browser.wait(f"getComputedStyle(document.body).backgroundColor !== '{light}'")
    line = "document.getElementById('chart-lr').layout.xaxis.gridcolor"
    browser.wait(f"{line} === getComputedStyle(document.documentElement)"
                 ".getPropertyValue('--line').trim()")  # fmt: skip
    browser.resize(1280, 800)
    assert browser.console == []


def test_no_name_runs_or_becomes_markup(browser, tmp_path):
    record = Record()
    for step in range(4):
        for attack in ATTACKS:
            record.add(step, attack, lr=0.1 + step, ratio=0.1, grad_norm=1.0 + step, clip=0.5)
            record.metrics(step, **{attack: 1.0 + step, f"norm/{attack}": 1.0})
    for attack in ATTACKS:
        record.event(1, attack, attack)
        record.finding(Finding(attack, attack, attack))
    entries = [ParameterEntry(attack, (1,), attack) for attack in ATTACKS]
    path = tmp_path / "report.html"
    write_report(record, path, parameters=entries, title=ATTACKS[1])
    browser.run("window.attacked = 0")
    opened(browser, path)
    browser.run("window.attacked = 0; window.attack = () => { window.attacked += 1; }")
    for chart in ("metric-0", "gradients", "updates"):
        show(browser, chart)
    browser.run("document.getElementById('chart-lr').focus()")
    browser.press("ArrowRight")
    browser.wait("document.getElementById('said').textContent.includes('step 0')")
    assert browser.run("window.attacked") == 0
    assert (
        browser.run("document.querySelectorAll('main img, main a[href^=javascript]').length") == 0
    )
    assert browser.run("document.querySelectorAll('script').length") == 3
    # In labels of charts, which plotly would read as markup, the names stand as they are.
    labels = browser.run("document.getElementById('chart-updates').textContent")
    assert "<script>attack()</script>" in labels
    assert not any("Refused" in line for line in browser.console), browser.console
