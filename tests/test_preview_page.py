"""What a preview shows: notebooks, many groups folded, ties, plain data."""

import json
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import lamina as lm
from lamina.preview.fold import MOST
from lamina.preview.table import text
from models import Tied
from test_preview import Net, example


class Tags(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


# ------------------------------------------------------------------------------------- notebooks


def test_a_notebook_shows_what_the_text_shows():
    preview = example().preview(Net(), epochs=2, steps_per_epoch=6)
    page = Tags(preview._repr_html_())
    assert page.open == []
    assert page.tags.count("tr") == 1 + len(preview.rows)
    shown = " ".join(page.texts)
    for part in ("12 steps (2 epochs of 6)", "head.*", "until step 8 (epoch 1.33)", "0.625"):
        assert part in shown
    assert "clip norm: 0.5 over head.* together, 1 over everything else together" in shown


def test_findings_stand_in_a_notebook():
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("head.*", thaw=20)])
    assert "thaw-after-end" in plan.preview(Net(), steps=12)._repr_html_()


ATTACKS = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a&b<b>", "\x1b[31mred"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_names_with_markup_are_escaped(attack):
    model = nn.Module()
    model.add_module("body", nn.Linear(1, 1))
    name = attack.replace(".", "_")
    model.register_parameter(name, nn.Parameter(torch.zeros(2)))
    model.register_parameter("other", model._parameters[name])
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule(lambda info: info.ndim == 1, lr=1.0, thaw=99)])
    preview = plan.preview(model, steps=5)
    pages = [preview._repr_html_(), lm.diff(lm.Plan("SGD", lr=0.2), plan, model)._repr_html_()]
    for page in pages:
        read = Tags(page)
        assert set(read.tags) <= {"div", "b", "table", "tr", "th", "td", "br", "pre"}
        assert "\x1b" not in page
        assert attack.replace("\x1b", "\\x1b") in "".join(read.texts)


# ------------------------------------------------------------------------------------------ ties


def test_ties_are_named_and_each_row_knows_its_own():
    preview = lm.Plan("SGD", lr=0.1).preview(Tied(), steps=5)
    (row,) = preview.rows
    assert row.ties == (("encoder.weight", "decoder.weight"),)
    assert "tied, each updated once: encoder.weight = decoder.weight" in str(preview)
    assert "encoder.weight = decoder.weight" in preview._repr_html_()
    assert preview.data()["groups"][0]["ties"] == [["encoder.weight", "decoder.weight"]]


# --------------------------------------------------------------------------------------- folding


class Many(nn.Module):
    """A thousand layers of ten tensors, on the meta device."""

    def __init__(self, layers=1000, tensors=10):
        super().__init__()
        self.embed = nn.Parameter(torch.empty(4, 2, device="meta"))
        self.layer = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            for place in range(tensors):
                layer.register_parameter(f"w{place}", nn.Parameter(torch.empty(2, device="meta")))
            self.layer.append(layer)


def many_groups(**settings):
    return lm.Plan(
        "AdamW",
        lr=1e-3,
        schedule=lm.warmup("10%") >> lm.cosine(),
        rules=[lm.Rule("layer.{depth}.*", lr=lm.by_depth(0.999), **settings)],
    )


def test_a_thousand_groups_are_a_few_lines():
    preview = many_groups(weight_decay=0.3).preview(Many(), steps=100)
    assert len(preview.rows) == 1001
    shown = text(preview, 110, unicode=True)
    lines = shown.splitlines()
    assert len(lines) < 12
    assert max(map(len, lines)) <= 110
    assert lines[0].startswith("100 steps · AdamW · 1001 groups · 20,008 of 20,008 parameters")
    (layers,) = [line for line in lines if line.startswith("layer.0–999.*")]
    assert "20k in 10000" in layers
    assert "3.68e-4…0.001" in layers
    assert "1,000 groups are folded" in shown


def test_groups_that_thaw_one_by_one_say_from_when_to_when():
    preview = many_groups(thaw=lm.top_down(every=1)).preview(Many(130, 1), steps=300)
    shown = text(preview, 120, unicode=True)
    (layers,) = [line for line in shown.splitlines() if line.startswith("layer.0–")]
    assert "step 130 … step 1" in layers


def test_frozen_groups_are_folded_apart():
    rules = [lm.Rule(f"layer.{n}.*", lr=1e-3 * (n + 1), frozen=n < 50) for n in range(150)]
    shown = str(lm.Plan("SGD", lr=0.1, rules=rules).preview(Many(150, 1), steps=10))
    assert "layer.50–149.*" in shown
    frozen = [line for line in shown.splitlines() if "frozen" in line and line.startswith("layer")]
    assert len(frozen) == 1


def test_groups_without_a_common_name_are_counted():
    model = nn.Module()
    for n in range(200):
        name = "".join(chr(97 + int(digit)) for digit in f"{n:03}")
        model.register_parameter(name, nn.Parameter(torch.zeros(n + 1)))
    rules = [lm.Rule(name, lr=1e-3 * (n + 1)) for n, name in enumerate(model._parameters)]
    preview = lm.Plan("SGD", lr=0.1, rules=rules).preview(model, steps=5)
    lines = text(preview, 100).splitlines()
    (rest,) = [line for line in lines if "more groups" in line]
    assert rest.startswith(f"{200 - MOST + 1} more groups")
    assert "0.001…0.177" in rest
    assert len(lines) < MOST + 10
    assert len(text(preview, 100, full=True).splitlines()) > 200
    assert len(preview.text(full=True, width=100).splitlines()) > 200


def test_few_groups_are_not_folded():
    preview = many_groups().preview(Many(MOST - 1, 1), steps=10)
    assert "folded" not in str(preview)
    assert f"layer.{MOST - 3}.*" in str(preview)


def sixty_groups():
    """A plan of 60 groups on 30 layers: decay by depth, and no weight decay on vectors."""
    model = nn.Module()
    model.encoder = nn.ModuleList(nn.Linear(4, 4) for _ in range(30))
    return lm.Plan(
        "AdamW",
        lr=1e-3,
        weight_decay=0.05,
        clip_norm=1.0,
        schedule=lm.warmup("10%") >> lm.cosine(),
        stop=lm.early_stop("val_loss", patience=2),
        rules=[
            lm.Rule("encoder.{depth}.*", lr=lm.by_depth(0.8)),
            lm.Rule("ndim<2", weight_decay=0.0, clip_norm=2.0),
            lm.Rule("encoder.0.*", thaw="10%"),
        ],
    ).preview(model, epochs=3, steps_per_epoch=100)


def test_a_plan_of_sixty_groups_fits_a_laptop_terminal():
    preview = sixty_groups()
    assert len(preview.rows) == 60
    lines = text(preview, 100, unicode=True).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("encoder.1–29.*  ") for line in lines)
    full = text(preview, 100, unicode=True, full=True).splitlines()
    assert sum(line.startswith("encoder.") for line in full) == 60
    assert "folded" not in "".join(full)


def frozen_with_settings():
    """Frozen layers that were given an lr each, and another weight decay for biases."""
    model = nn.Module()
    model.features = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    model.stem = nn.Linear(3, 3)
    model.head = nn.Linear(3, 1)
    return lm.Plan(
        "SGD",
        lr=0.1,
        weight_decay=0.1,
        rules=[
            lm.Rule("features.{depth}.*", lr=lm.by_depth(0.9)),
            lm.Rule("ndim<2", weight_decay=0.0),
            lm.Rule("features.*", frozen=True),
            lm.Rule("stem.*", frozen=True),
        ],
    ).preview(model, steps=10)


def test_what_one_rule_freezes_is_one_line():
    preview = frozen_with_settings()
    assert len(preview.rows) > 8
    lines = text(preview, 100, unicode=True).splitlines()
    frozen = [line.split() for line in lines if line.endswith("frozen")]
    assert [line[:4] for line in frozen] == [
        ["features.*", "48", "in", "8"],
        ["stem.*", "12", "in", "2"],  # its bias is in one group with those of the features
    ]
    assert sum(line.endswith("trains") for line in lines) == 2
    full = text(preview, 100, unicode=True, full=True).splitlines()
    assert sum(line.endswith("frozen") for line in full) == len(preview.rows) - 2


def test_what_thaws_later_is_not_folded_with_what_never_does():
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    thaws = [lm.Rule("0.*", frozen=True), lm.Rule("1.*", thaw=5), lm.Rule("2.*", frozen=True)]
    lines = text(lm.Plan("SGD", lr=0.1, rules=thaws).preview(model, steps=9), 100).splitlines()
    assert sum(line.endswith("frozen") for line in lines) == 1  # one group: the settings are equal
    assert sum(line.endswith("step 5") for line in lines) == 1


def test_a_terminal_with_colours_folds_too():
    console = pytest.importorskip("rich.console").Console(width=110, record=True, file=None)
    with console.capture() as captured:
        console.print(many_groups(weight_decay=0.3).preview(Many(200, 1), steps=10))
    assert "layer.0–199.*" in captured.get()
    assert len(captured.get().splitlines()) < 14


# ------------------------------------------------------------------------------------ plain data


def test_data_is_json_and_says_the_same():
    preview = example().preview(Net(), epochs=2, steps_per_epoch=6)
    data = json.loads(json.dumps(preview.data(), allow_nan=False))
    assert (data["steps"], data["steps_per_epoch"], data["hash"]) == (12, 6, preview.hash)
    (head,) = [group for group in data["groups"] if group["group"] == "head.*"]
    assert (head["lr_start"], head["lr_peak"], head["lr_end"]) == (0.0, 1.0, pytest.approx(5 / 8))
    assert head["names"] == ["head.weight", "head.bias"]
    assert head["rules"] == ["head.*"]
    late = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("head.*", thaw=20)]).preview(Net(), steps=12)
    assert late.data()["findings"][0]["code"] == "thaw-after-end"


def test_infinite_values_are_text_in_json():
    plan = lm.Plan("LBFGS", tolerance_grad=0.0, lr=1.0)
    json.dumps(plan.preview(Net(), steps=3).data(), allow_nan=False)
    assert plan.preview(Net(), steps=3).hash == plan.preview(Net(), steps=3).hash


# ---------------------------------------------------------------------- the work that a preview is


def test_long_runs_evaluate_each_distinct_schedule_once_a_block(monkeypatch):
    """A hundred groups over a long run: a schedule is worked out for each step a few times."""
    asked = []
    kind = type(lm.cosine())
    shape = kind.at

    def counted(self, steps):
        asked.append(len(steps))
        return shape(self, steps)

    monkeypatch.setattr(kind, "at", counted)
    plan = lm.Plan(
        "AdamW",
        lr=1e-3,
        schedule=lm.warmup("10%") >> lm.cosine(),
        rules=[lm.Rule("layer.{depth}.*", lr=lm.by_depth(0.97))],
    )
    preview = plan.preview(Many(100, 1), steps=100_000)
    assert len(preview.text(full=True).splitlines()) > 100
    assert preview.hash
    assert sum(asked) < 8 * 100_000
