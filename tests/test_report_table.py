"""The table of a preview: plain text and rich, wide and narrow, and its sparklines."""

import io

import pytest

import lamina as lm
from lamina.preview.rows import number, span
from lamina.preview.sparkline import can_show, curve
from lamina.preview.table import shorten, text
from lamina.runtime.flags import REDUCED, Flags
from test_preview import Net, example


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (2e-5, "2e-5"), (1.234e-4, "1.23e-4"), (0.001, "0.001"), (0.5, "0.5"), (1, "1"),
     (1e6, "1e6"), (None, "–")],
)  # fmt: skip
def test_numbers_as_people_write_them(value, shown):
    assert number(value) == shown


def test_span_says_a_constant_once():
    assert (span(0.1, 0.1), span(0.1, 0.2), span(0.1, None)) == ("0.1", "0.1 → 0.2", "0.1")


def test_text_says_everything():
    shown = text(example().preview(Net(), epochs=2, steps_per_epoch=6), 120, unicode=True)
    lines = shown.splitlines()
    assert lines[0] == "12 steps (2 epochs of 6) · SGD · 5 groups · 70 of 110 parameters train"
    assert "weight decay 0.01" in lines[1]  # the same for all groups, so it is said once
    assert "requires_grad is off" in lines[2]
    head = next(line for line in lines if line.startswith("head.*"))
    assert head.split()[:8] == ["head.*", "10", "in", "2", "0", "1", "0.625", "0.5"]
    assert "until step 8 (epoch 1.33)" in head
    frozen = next(line for line in lines if line.startswith("embeddings.*"))
    assert "frozen" in frozen
    assert "··········" in frozen
    assert "clip norm: 0.5 over head.* together, 1 over everything else together" in lines
    assert max(map(len, lines)) <= 120
    assert all(line == line.rstrip() for line in lines)


def test_columns_line_up():
    lines = text(example().preview(Net(), steps=12), 120, unicode=True).splitlines()
    rule = next(line for line in lines if line.startswith("──"))
    ends = [i for i, (a, b) in enumerate(zip(rule, f"{rule[1:]} ", strict=True)) if a > b]
    body = [line.ljust(len(rule)) for line in lines[lines.index(rule) + 1 :][:5]]
    assert len(ends) == 8
    assert all(line[end + 1 : end + 3].strip() == "" for line in body for end in ends)


def test_constant_plan_needs_few_columns():
    shown = str(lm.Plan("SGD", lr=0.1).preview(Net(), steps=10))
    assert "peak" not in shown
    assert "thaw" not in shown
    assert "0.1" in shown.splitlines()[-1]


@pytest.mark.parametrize("width", [110, 80, 60])
def test_narrow_terminals_lose_columns_and_say_so(width):
    shown = text(example().preview(Net(), epochs=2, steps_per_epoch=6), width, unicode=True)
    assert max(map(len, shown.splitlines())) <= width
    assert all(name in shown for name in ("layer.0.*", "layer.1.*", "layer.2.*", "head.*"))
    assert ("left out at this width: lr over time" in shown) == (width < 110)


def test_terminal_width_is_respected(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    preview = example().preview(Net(), epochs=2, steps_per_epoch=6)
    assert max(map(len, str(preview).splitlines())) <= 60


def test_unknown_run_length_is_said():
    shown = str(lm.Plan("SGD", lr=0.1).preview(Net()))
    assert shown.startswith("run length unknown · SGD")
    assert "Pass steps=" in shown
    assert "0.1" in shown.splitlines()[-1]


def test_all_frozen():
    shown = str(lm.Plan("SGD", lr=0.1, rules=[lm.Rule("*", frozen=True)]).preview(Net(), steps=5))
    assert "0 of 110 parameters train" in shown
    assert "! nothing-trains: every parameter is frozen" in shown


def test_findings_stand_below_and_wrap():
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("head.*", thaw=20)])
    lines = text(plan.preview(Net(), steps=12), 60).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("! thaw-after-end:"))
    assert lines[start - 1] == ""
    assert "Thaw earlier" in " ".join(line.strip() for line in lines[start:])
    assert max(map(len, lines)) <= 60


def test_freezing_under_a_reducer_is_announced():
    resolved = example().preview(Net(), steps=12).resolved
    said = "requires_grad stays on and the gradient is zero"
    kept = Flags({"layer.0.weight": REDUCED})
    assert said in " ".join(str(lm.Preview(resolved, flags=kept)).split())
    assert said not in " ".join(str(lm.Preview(resolved)).split())


def test_equal_thresholds_of_two_rules_stay_apart():
    plan = lm.Plan("SGD", lr=0.1, clip_norm=1.0, rules=[lm.Rule("head.*", clip_norm=1.0)])
    shown = str(plan.preview(Net(), steps=10))
    assert "clip norm: 1 (a) over head.* together, 1 (b) over everything else together" in shown
    assert next(x for x in shown.splitlines() if x.startswith("head.*")).endswith("1 (a)")


def test_several_optimizers_get_a_column():
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("head.*", optimizer="AdamW", lr=1e-3)])
    lines = str(plan.preview(Net(), steps=10)).splitlines()
    assert "SGD" not in lines[0]
    assert "AdamW" in next(line for line in lines if line.startswith("head.*"))


def test_many_groups_are_all_shown_in_full():
    rule = lm.Rule("layer.{depth}.*", lr=lm.by_depth(0.9))
    preview = lm.Plan("SGD", lr=0.1, rules=[rule]).preview(Net(layers=100), steps=10)
    shown = preview.text(full=True)
    # the top layer has the settings of the plan, so it is in the plan's own group
    assert all(f"layer.{depth}.*" in shown for depth in range(99))
    assert "100 groups" in shown


def test_shortened_names_stay_distinct():
    names = [f"encoder.layer.{i}.* + *.bias | type:LayerNorm" for i in range(12)]
    cut = shorten(names, 24)
    assert len(set(cut)) == 12
    assert max(map(len, cut)) <= 28
    assert all("…" in name for name in cut)
    hard = [f"{'a' * 30}{i}{'b' * 30}" for i in range(3)]
    assert len(set(shorten(hard, 20))) == 3


def test_ascii_only_output():
    preview = example().preview(Net(), epochs=2, steps_per_epoch=6)
    shown = text(preview, 120, unicode=False)
    assert shown.isascii()
    assert "?" not in shown
    assert not can_show(io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert can_show(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert can_show(io.StringIO())


def test_curve():
    nan = float("nan")
    assert curve([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert curve([nan, nan, 1, 1], 4) == "··██"
    assert curve([nan, nan, 1, 1], 4, unicode=False) == "  @@"
    assert curve([0.0, 0.0]) == "▁▁"
    assert len(curve(range(1000), 10)) == 10


def test_rich_table():
    console_module = pytest.importorskip("rich.console")
    stream = io.StringIO()
    console = console_module.Console(file=stream, width=120, force_terminal=True)
    console.print(example().preview(Net(), epochs=2, steps_per_epoch=6))
    shown = stream.getvalue()
    assert "\x1b[" in shown  # styled
    plain = io.StringIO()
    console_module.Console(file=plain, width=120).print(example().preview(Net(), steps=12))
    lines = [line.rstrip() for line in plain.getvalue().splitlines()]
    assert lines[0] == "12 steps · SGD · 5 groups · 70 of 110 parameters train"
    assert any(line.startswith("layer.2.*") and "step 3" in line for line in lines)
    assert max(map(len, lines)) <= 120


def test_rich_takes_brackets_for_what_they_are():
    console_module = pytest.importorskip("rich.console")
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("re:head[.](weight|bias)", lr=1.0)])
    stream = io.StringIO()
    console_module.Console(file=stream, width=120).print(plan.preview(Net(), steps=12))
    assert "re:head[.](weight|bias)" in stream.getvalue()
