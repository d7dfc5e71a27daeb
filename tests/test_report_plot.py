"""The picture of a preview: its lines are what `values_at` gives, its bars the windows."""

import sys

import numpy as np
import pytest

import lamina as lm
from test_preview import Net, example

pytest.importorskip("matplotlib")


def drawn(figure):
    """The curves by label, without the dots at thaws."""
    main = figure.axes[0]
    return {line.get_label(): line for line in main.lines if not line.get_label().startswith("_")}


def test_plot_writes_a_picture(tmp_path):
    path = tmp_path / "lr.png"
    example().preview(Net(), epochs=2, steps_per_epoch=6).plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_lines_hold_the_values_and_stop_where_frozen():
    preview = example().preview(Net(), steps=12)
    lines = drawn(preview.plot())
    assert set(lines) == {"layer.0.*", "layer.1.*", "layer.2.*", "head.*"}
    values = lm.values_at(preview.resolved, np.arange(12))
    for index, cell in enumerate(preview.resolved.cells):
        if cell.name in lines:
            lr = values.lr(index)
            shown = values.active(index) & (lr > 0)  # the axis is logarithmic
            expected = np.where(shown, lr, np.nan)
            np.testing.assert_array_equal(lines[cell.name].get_ydata(), expected)
            np.testing.assert_array_equal(lines[cell.name].get_xdata(), np.arange(12))
    assert np.isnan(lines["layer.0.*"].get_ydata()[:9]).all()


def test_bars_cover_exactly_the_windows():
    bars = example().preview(Net(), steps=12).plot().axes[-1]
    filled = {}
    for collection in bars.collections:
        for path in collection.get_paths():
            box = path.get_extents()
            kind = "hatched" if collection.get_hatch() else "filled"
            filled.setdefault(kind, []).append((round(box.ymin), box.xmin, box.xmax))
    assert [(a, b) for _, a, b in filled["hatched"]] == [(0, 12)] * 5
    assert sorted((a, b) for _, a, b in filled["filled"]) == [(0, 8), (3, 12), (6, 12), (9, 12)]
    assert bars.texts[0].get_text() == "embeddings.*"


def test_groups_that_move_alike_are_one_line():
    rules = [lm.Rule("*.bias", weight_decay=0.0), lm.Rule("head.*", lr=0.2)]
    plan = lm.Plan("SGD", lr=0.1, weight_decay=0.1, rules=rules)
    preview = plan.preview(Net(), steps=5)
    assert len(preview.rows) == 4
    assert sorted(drawn(preview.plot())) == ["default, *.bias", "head.*, *.bias + head.*"]


@pytest.mark.parametrize(("lr", "scale"), [(0.2, "linear"), (10.0, "log")])
def test_log_axis_where_groups_are_far_apart(lr, scale):
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("head.*", lr=lr)])
    axes = plan.preview(Net(), steps=5).plot().axes[0]
    assert axes.get_yscale() == scale
    assert axes.get_ylim()[1] > lr


@pytest.mark.parametrize(("lr", "log"), [(0.01, True), (0.5, False)])
def test_a_zero_is_drawn_where_the_axis_has_a_place_for_it(lr, log):
    schedule = lm.warmup(4) >> lm.linear(to=0.0)
    plan = lm.Plan("SGD", lr=1.0, schedule=schedule, rules=[lm.Rule("head.*", lr=lr)])
    figure = plan.preview(Net(), steps=12).plot()
    assert figure.axes[0].get_yscale() == ("log" if log else "linear")
    for line in drawn(figure).values():
        assert np.isnan(line.get_ydata()[0]) == log
        assert np.isfinite(line.get_ydata()[1:]).all()


def test_curves_that_coincide_are_dashed_and_named():
    rules = [
        lm.Rule("layer.0.*", thaw=6),
        lm.Rule("layer.1.*", thaw=3),
        lm.Rule("layer.2.*", lr=0.05),
    ]
    schedule = lm.cosine(to=0.1)
    preview = lm.Plan("SGD", lr=0.1, schedule=schedule, rules=rules).preview(Net(), steps=12)
    figure = preview.plot()
    lines = drawn(figure)
    dashed = {name for name, line in lines.items() if line.get_linestyle() != "-"}
    assert dashed == {"layer.0.*", "layer.1.*"}
    # the dashes of the two lie beside each other, over what they hide
    offsets = {lines[name]._unscaled_dash_pattern[0] for name in dashed}
    assert len(offsets) == 2
    order = list(lines)
    assert set(order[-2:]) == dashed
    named = [text.get_text() for text in figure.axes[-1].texts]
    assert named == [
        "default",
        "layer.0.* (same lr as default)",
        "layer.1.* (same lr as default)",
        "layer.2.*",
    ]


def test_one_group_is_told_as_one():
    figure = lm.Plan("SGD", lr=0.1).preview(Net(), steps=12).plot()
    assert any("1 group  ·" in text.get_text() for text in figure.axes[0].texts)


def test_epochs_are_shown_if_known():
    def top(**run):
        figure = example().preview(Net(), **run).plot()
        figure.draw_without_rendering()
        children = figure.axes[0].child_axes
        return [label.get_text() for child in children for label in child.get_xticklabels()]

    assert top(epochs=2, steps_per_epoch=6) == ["epoch 0", "epoch 1", "epoch 2"]
    assert top(steps=12) == []


def test_many_groups_share_a_ramp_and_keep_the_figure_small():
    rule = lm.Rule("layer.{depth}.*", lr=lm.by_depth(0.9))
    figure = lm.Plan("SGD", lr=0.1, rules=[rule]).preview(Net(layers=60), steps=50).plot()
    lines = drawn(figure)
    assert len(lines) == 60  # the top layer has the lr of the rest
    assert len({tuple(line.get_color()) for line in lines.values()}) == 60
    assert figure.get_figheight() < 10
    assert 2 <= len(figure.axes[-1].get_yticklabels()) <= 19


def test_all_frozen_is_drawn(tmp_path):
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("*", frozen=True)])
    figure = plan.preview(Net(), steps=5).plot(tmp_path / "frozen.svg")
    assert drawn(figure) == {}
    assert (tmp_path / "frozen.svg").stat().st_size > 1000


def test_own_axes_are_used_without_pyplot():
    from matplotlib.figure import Figure

    before = "matplotlib.pyplot" in sys.modules
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert example().preview(Net(), steps=12).plot(ax=left) is figure
    assert len(left.lines) >= 4
    assert len(right.lines) == 0
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_unknown_length_cannot_be_drawn():
    with pytest.raises(lm.TimeUnitError, match="pass steps="):
        lm.Plan("SGD", lr=0.1).preview(Net()).plot()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(lm.MissingExtraError, match=r"lamina\[plot\]"):
        example().preview(Net(), steps=12).plot()
