"""The report: what comes from names is text, its data is what was recorded, and it is small."""

import json
import math
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

import lamina as lm
from lamina.model.finding import Finding
from lamina.record import METRICS, Record
from lamina.record.planned import ParameterEntry, Planned
from lamina.report_page import write_report

pytest.importorskip("plotly")
from lamina.report_page.charts import heat_map, lr_chart
from lamina.report_page.source import Source

#: what names could try: to end an element, to be one, to end a script, an attribute or a string
ATTACKS = [
    "<script>attack()</script>",
    "</script><script>attack()</script>",
    '"><img src=x onerror=attack()>',
    "' onmouseover='attack()",
    "<a href='javascript:attack()'>x</a>",
    "</style><svg/onload=attack()>",
    "&lt;script&gt;attack()&lt;/script&gt;",
    "<!--<script>",
    "%{x}<b>bold</b>\u2028\u0000\x1b[31m",
    "{{7*7}}${attack()}`",
]
EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source"}


class Page(HTMLParser):
    """The elements of a page, with their text and whether they are well nested."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.scripts, self.text = [], [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.open and self.open[-1] != "style":
            self.text += data

    @property
    def data(self):
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == "data"))

    def chart(self, key):
        return next(chart for chart in self.data["charts"] if chart["id"] == key)


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


PLAN = lm.Plan(
    "AdamW",
    lr=1e-3,
    schedule=lm.cosine(to=0.1),
    clip_norm=0.5,
    rules=[
        lm.Rule("body.0.*", frozen=True),
        lm.Rule("body.2.*", thaw=4),
        lm.Rule("head.*", lr=0.1),
    ],
)


def recorded(steps=12):
    """A run that was recorded, and what was planned of it."""
    model = Net()
    optimizer = PLAN.build(model, steps=steps)
    with optimizer.recorder(every=1) as recorder:
        for step in range(steps):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            optimizer.step()
            recorder.metrics(loss=loss, accuracy=step / steps)
        optimizer.report(val_loss=0.5)
        return recorder.record, PLAN.preview(Net(), steps=steps).planned()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    record, planned = recorded()
    write_report(record, path, planned=planned, title="A run", facts={"seed": "1"})
    return page_of(path)


def test_the_charts_hold_what_was_recorded_and_planned(page):
    record, _planned = recorded()
    names = [group["name"] for group in page.data["groups"]]
    traces = {(names[trace["group"]], trace["name"]): trace for trace in page.chart("lr")["traces"]}
    trained = ("body.2.*", "head.*")
    assert set(traces) >= {(g, kind) for g in trained for kind in ("applied", "planned")}
    applied = traces["head.*", "applied"]
    steps, lr = record.series("head.*", "lr")
    assert applied["x"] == steps.tolist()
    np.testing.assert_allclose(applied["y"], lr, rtol=1e-4)
    np.testing.assert_allclose(traces["head.*", "planned"]["y"], lr, rtol=1e-4)
    assert traces["body.2.*", "applied"]["y"][:4] == [None] * 4  # frozen until step 4
    ids = [chart["id"] for chart in page.data["charts"]]
    assert ids == [
        "lr",
        "metric-0",
        "metric-1",
        "gradients",
        "scopes",
        "clip",
        "updates",
        "weights",
    ]
    assert {"x": 4, "kind": "thaw", "text": "thaw"} in page.data["marks"]


def test_the_page_is_well_formed_and_fetches_nothing(page):
    for tag, key, value in page.attributes:
        assert key not in ("src", "srcset") or tag == "never"
        assert not key.startswith("on")
        if key == "href":
            assert value.startswith("#")
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    links = {value[1:] for _, key, value in page.attributes if key == "href"}
    assert links <= set(ids)
    policy = next(
        value for tag, key, value in page.attributes if key == "content" and "src" in value
    )
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_every_chart_has_a_name_and_a_table(page):
    places = {value for _, key, value in page.attributes if key == "id"}
    for chart in page.data["charts"]:
        assert f"chart-{chart['id']}" in places
    labels = [value for tag, key, value in page.attributes if key == "aria-label"]
    assert sum("Arrow keys" in label for label in labels) == len(page.data["charts"])
    assert page.tags.count("caption") == page.tags.count("table") >= 8
    assert ("html", "lang", "en") in page.attributes


def test_the_table_says_how_far_applied_and_planned_are_apart(page):
    assert "largest difference" in page.text
    assert page.text.count("none") >= 3


def test_a_difference_from_the_plan_is_shown(tmp_path):
    record, planned = recorded()
    other = Record()
    for step, lr in zip(*record.series("head.*", "lr"), strict=True):
        other.add(int(step), "head.*", lr=float(lr) * (2 if step == 7 else 1))
    write_report(other, tmp_path / "x.html", planned=planned)
    assert " at step 7" in page_of(tmp_path / "x.html").text


@pytest.mark.parametrize("attack", ATTACKS)
def test_markup_in_names_stays_text(attack, tmp_path):
    record = Record()
    for step in range(3):
        record.add(step, attack, lr=0.1, ratio=0.1, grad_norm=1.0, clip=0.5, weight_norm=1.0)
        record.add(step, "other", lr=0.2, ratio=0.1)
        record.metrics(step, **{attack: 1.0, f"val_{attack}": 2.0, f"norm/{attack}": 1.0})
    record.event(1, attack, attack, [attack])
    record.event(1, "thaw", attack, [attack])
    record.finding(Finding(attack, f"{attack} of {attack}", attack))
    entries = [
        ParameterEntry(f"{attack}.weight", (2, 2), attack),
        ParameterEntry(attack.replace(".", ""), (2,), None),
    ]
    path = tmp_path / "report.html"
    write_report(record, path, parameters=entries, title=attack, facts={attack: attack})
    hostile = page_of(path)
    path_of_plain = tmp_path / "plain.html"
    plain = "a name"
    twin = Record()
    for step in range(3):
        twin.add(step, plain, lr=0.1, ratio=0.1, grad_norm=1.0, clip=0.5, weight_norm=1.0)
        twin.add(step, "other", lr=0.2, ratio=0.1)
        twin.metrics(step, **{plain: 1.0, f"val_{plain}": 2.0, f"norm/{plain}": 1.0})
    twin.event(1, plain, plain, [plain])
    twin.event(1, "thaw", plain, [plain])
    twin.finding(Finding(plain, f"{plain} of {plain}", plain))
    entries = [ParameterEntry(f"{plain}.weight", (2, 2), plain), ParameterEntry("x", (2,), None)]
    write_report(twin, path_of_plain, parameters=entries, title=plain, facts={plain: plain})
    expected = page_of(path_of_plain)
    # No element, attribute or script more than a page of plain names has.
    dots = attack.count(".")
    if not dots:  # else the tree has more levels
        assert hostile.tags == expected.tags
    assert {(t, k) for t, k, _ in hostile.attributes} == {(t, k) for t, k, _ in expected.attributes}
    assert len(hostile.scripts) == len(expected.scripts) == 3
    assert [text for _, text in hostile.scripts[1:]] == [text for _, text in expected.scripts[1:]]
    assert hostile.data["groups"][0]["name"] == attack
    assert "\x1b" not in path.read_text(encoding="utf-8").partition('id="data"')[0]


def test_an_empty_record_gives_a_page(tmp_path):
    write_report(Record(), tmp_path / "x.html")
    page = page_of(tmp_path / "x.html")
    assert page.data == {"charts": [], "marks": [], "groups": []}
    assert "Training report" in page.text


@pytest.mark.filterwarnings("ignore:thaw-after-end")
def test_a_run_of_one_step(tmp_path):
    record, planned = recorded(1)
    write_report(record, tmp_path / "x.html", planned=planned)
    page = page_of(tmp_path / "x.html")
    assert page.chart("lr")["traces"][0]["x"] == [0]
    assert len(page.chart("updates")["x"]) == 1


def test_numbers_that_are_not_finite(tmp_path):
    record = Record()
    for step in range(6):
        bad = [1.0, math.nan, math.inf, -math.inf, 2.0, 0.0][step]
        record.add(step, "g", lr=bad, grad_norm=bad, ratio=bad, weight_norm=math.nan, clip=bad)
        record.metrics(step, loss=bad, always=math.nan)
    write_report(record, tmp_path / "x.html")
    page = page_of(tmp_path / "x.html")
    assert page.chart("metric-0")["traces"][0]["y"] == [1.0, None, None, None, 2.0, 0.0]
    assert "not finite" in page.text
    assert [chart["id"] for chart in page.data["charts"]].count("weights") == 0


def test_a_preview_is_a_page(tmp_path):
    path = tmp_path / "plan.html"
    PLAN.preview(Net(), steps=50).html(path, title="My plan")
    page = page_of(path)
    assert [chart["id"] for chart in page.data["charts"]] == ["lr"]
    assert {trace["name"] for trace in page.chart("lr")["traces"]} == {"planned"}
    assert "body.0" not in [g["name"] for g in page.data["groups"]]
    assert "frozen" in page.text


def test_a_preview_of_unknown_length_is_a_page(tmp_path):
    lm.Plan("SGD", lr=0.1).preview(Net()).html(tmp_path / "plan.html")
    assert page_of(tmp_path / "plan.html").chart("lr")["traces"][0]["y"] == [0.1]


def test_planned_comes_back_from_its_file(tmp_path):
    path = tmp_path / "planned.json"
    _, planned = recorded()
    planned.save(path)
    again = Planned.load(path)
    assert again.header == planned.header
    assert again.parameters == planned.parameters
    for mine, its in zip(planned.groups, again.groups, strict=True):
        assert (mine.name, mine.thaw) == (its.name, its.thaw)
        np.testing.assert_array_equal(mine.active, its.active)
        np.testing.assert_allclose(its.lr, mine.lr, rtol=1e-6)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{", b'{"format": 2}', b"[" * 100_000, b"\xff",
        b'{"format":1,"header":[1],"total":3,"steps_per_epoch":null,"steps":[],"curves":[],'
        b'"groups":[],"parameters":[],"findings":[]}',
        b'{"format":1,"header":[],"total":3,"steps_per_epoch":null,"steps":[0,1],"curves":[[1]],'
        b'"groups":[],"parameters":[],"findings":[]}',
        b'{"format":1,"header":[],"total":3,"steps_per_epoch":null,"steps":[0],"curves":[[1]],'
        b'"groups":[{"name":"g","optimizer":"","thaw":"","gradients":"","lr":5,"turns":[]}],'
        b'"parameters":[],"findings":[]}',
    ],
)  # fmt: skip
def test_a_damaged_plan_is_refused(tmp_path, content):
    path = tmp_path / "planned.json"
    path.write_bytes(content)
    with pytest.raises(lm.StateError, match=r"planned\.json"):
        Planned.load(path)


def test_findings_lead_to_the_charts_and_their_groups(tmp_path):
    record, planned = recorded()
    record.finding(Finding("clip-never-acts", "the norm of head.* is never clipped.", "Lower it."))
    record.event(3, "clip-never-acts", "first seen")
    write_report(record, tmp_path / "x.html", planned=planned)
    page = page_of(tmp_path / "x.html")
    assert ("a", "href", "#gradients") in page.attributes
    chosen = [value for _, key, value in page.attributes if key == "data-only"]
    names = [group["name"] for group in page.data["groups"]]
    assert [names[int(place)] for place in chosen[0].split()] == ["head.*"]
    assert "from step 3" in page.text
    assert any(mark["kind"] == "clip-never-acts" for mark in page.data["marks"])


def long_record(steps, groups):
    """A record as a run of that length leaves it, without its two minutes of calls."""
    record, at = Record(), np.arange(steps)
    for index in range(groups):
        lr = np.cos(at / steps * 1.5) * (index + 1) * 1e-4
        lr[steps // 3 + index] = 7.0  # a spike of one step
        for name in ("lr", "grad_norm", "ratio", "weight_norm", "clip"):
            record.put(f"layer.{index}.*", name, at, lr)
    return record


def test_a_million_steps_of_a_hundred_groups_stay_small_and_show_their_spikes(tmp_path):
    path, steps = tmp_path / "x.html", 1_000_000
    record = long_record(steps, 2)
    for index in range(2, 100):
        for name in ("lr", "grad_norm", "ratio", "weight_norm", "clip"):
            record.put(f"layer.{index}.*", name, *record.series(f"layer.{index % 2}.*", name))
    began = time.process_time()
    write_report(record, path)
    assert time.process_time() - began < 20
    assert path.stat().st_size < 9_000_000
    page = page_of(path)
    assert len(page.chart("lr")["traces"]) == 60
    assert all(max(filter(None, trace["y"])) == 7.0 for trace in page.chart("lr")["traces"])
    record.save(tmp_path / "record.jsonl")
    assert (tmp_path / "record.jsonl").stat().st_size < 60_000_000


def test_many_groups_and_parameters_are_folded(tmp_path):
    record, names = Record(), [f"g{place}" for place in range(1500)]
    for step in range(3):
        for name in names:
            record.add(step, name, lr=1e-3, ratio=1e-3)
    entries = [
        ParameterEntry(f"layer.{place}.sub.weight", (10, 10), names[place % 1500])
        for place in range(10_000)
    ]
    write_report(record, tmp_path / "x.html", parameters=entries)
    assert (tmp_path / "x.html").stat().st_size < 9_000_000
    page = page_of(tmp_path / "x.html")
    assert "60 of 1,500 groups are drawn" in page.text
    assert len(page.chart("updates")["z"]) == 200
    assert page.tags.count("li") < 6000


def test_the_heat_map_keeps_the_largest_of_a_span():
    record = Record()
    for step in range(1000):
        record.add(step, "g", lr=0.1, ratio=1e-3 if step != 500 else 0.1)
    chart = heat_map(Source(record))
    assert len(chart["x"]) == 120
    assert max(chart["z"][0]) == -1.0
    place = chart["z"][0].index(-1.0)
    assert chart["from"][place] <= 500 <= chart["to"][place]
    assert chart["from"][0] == 0
    assert chart["to"][-1] == 999


def test_far_apart_learning_rates_are_drawn_on_a_logarithmic_axis():
    record = Record()
    record.add(0, "a", lr=1e-3)
    record.add(0, "b", lr=1e-5)
    assert lr_chart(Source(record))["log"]
    record = Record()
    record.add(0, "a", lr=1e-3)
    assert not lr_chart(Source(record))["log"]


def test_without_plotly_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    path = tmp_path / "x.html"
    path.write_text("before")
    with pytest.raises(lm.MissingExtraError, match=r"lamina\[report\]"):
        write_report(Record(), path)
    assert path.read_text() == "before"


def test_a_page_that_cannot_be_written_leaves_what_was_there(tmp_path):
    with pytest.raises(lm.LaminaError, match="cannot be written"):
        write_report(Record(), tmp_path / "no" / "x.html")
    assert list(tmp_path.iterdir()) == []
    assert METRICS == ""
