"""Preview: rows against numbers worked out by hand, long runs, and what reads one."""

import numpy as np
import pytest
from torch import nn

import lamina as lm
from lamina.preview import Preview
from lamina.preview.sampling import SAMPLES


class Net(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.embeddings = nn.Embedding(10, 4)
        self.layer = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.head = nn.Linear(4, 2)


def example(**plan):
    settings = {"lr": 0.1, "weight_decay": 0.01, "clip_norm": 1.0}
    settings |= {"schedule": lm.warmup(4) >> lm.linear(to=0.0)}
    return lm.Plan(
        "SGD",
        **settings | plan,
        rules=[
            lm.Rule("embeddings.*", frozen=True),
            lm.Rule("layer.{depth}.*", lr=lm.by_depth(0.5), thaw=lm.top_down(every=3)),
            lm.Rule("head.*", lr=1.0, clip_norm=0.5, freeze=8),
        ],
    )


def rows_of(preview):
    return {row.group: row for row in preview.rows}


def test_rows_by_hand():
    rows = rows_of(example().preview(Net(), epochs=2, steps_per_epoch=6))
    head, top, low, embeddings = (
        rows[name] for name in ("head.*", "layer.2.*", "layer.0.*", "embeddings.*")
    )
    # warmup over steps 0 to 3, then a line from 1 at step 4 to 0 at step 12
    assert (head.lr_start, head.lr_peak, head.lr_end) == (0.0, 1.0, pytest.approx(5 / 8))
    assert (head.first, head.last, head.thaw) == (0, 7, "until step 8 (epoch 1.33)")
    assert top.lr_start == pytest.approx(0.1 * 3 / 4)
    assert (top.lr_peak, top.lr_end) == (pytest.approx(0.1), pytest.approx(0.1 / 8))
    assert (top.first, top.thaw) == (3, "step 3 (epoch 0.5)")
    assert low.lr_start == low.lr_peak == pytest.approx(0.025 * 3 / 8)
    assert (low.first, low.last, low.thaw) == (9, 11, "step 9 (epoch 1.5)")
    assert (head.clip, top.clip, embeddings.clip) == ("0.5 (head.*)", "1 (plan)", "")
    assert (head.tensors, head.parameters, head.weight_decay) == (2, 10, 0.01)
    assert (head.optimizer, head.rules) == ("SGD", ("head.*",))
    assert (embeddings.thaw, embeddings.first, embeddings.weight_decay) == ("frozen", None, None)
    assert (embeddings.lr_start, embeddings.lr_peak, embeddings.lr_end) == (None, None, None)


def test_several_windows_are_all_shown():
    rules = [lm.Rule("head.*", thaw=[2, "1.5 epochs"], freeze="1 epochs")]
    preview = lm.Plan("SGD", lr=0.1, rules=rules).preview(Net(), epochs=2, steps_per_epoch=6)
    row = rows_of(preview)["head.*"]
    assert (row.first, row.last, row.thaw) == (2, 11, "steps 2 to 5, then step 9 (epoch 1.5)")
    assert "steps 2 to 5, then step 9" in str(preview)
    assert "trains steps 2 to 5 and from step 9" in str(preview.explain("head.bias"))
    assert "thaw=(2, '1.5 epochs'), freeze='1 epochs'" in str(preview.explain("head.bias"))


def test_rows_sample_what_is_applied():
    model = Net()
    preview = example().preview(model, steps=12)
    optimizer = example().build(model, steps=12)
    applied = {name: [] for name in preview.at(0)}
    for _ in range(12):
        sum(parameter.sum() for parameter in model.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, hyper in optimizer.applied.items():
            applied[name].append(hyper["lr"])
    assert preview.steps.tolist() == list(range(12))
    for row in preview.rows:
        assert row.lr.tolist() == applied[row.group]
        assert (row.lr[~row.active] == 0).all()


def test_at_has_the_form_of_applied():
    preview = example().preview(Net(), steps=12)
    assert preview.at(4)["head.*"]["lr"] == 1.0
    assert preview.at(4)["embeddings.*"]["lr"] == 0.0
    assert preview.at(0).keys() == {row.group for row in preview.rows}
    assert preview.values(4).lr(preview.resolved.cell_of["head.bias"]) == 1.0


def test_explain_and_findings_are_those_of_the_plan():
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("head.*", thaw=20)])
    preview = plan.preview(Net(), steps=12)
    assert "lr = 0.1" in str(preview.explain("layer.0.weight"))
    assert [finding.code for finding in preview.findings] == ["thaw-after-end"]
    assert preview.findings == preview.resolved.findings
    assert rows_of(preview)["head.*"].thaw == "never (step 20)"
    assert rows_of(preview)["head.*"].lr_start is None


def test_unknown_length_shows_the_first_values():
    plan = lm.Plan(
        "SGD", lr=0.1, schedule=lm.warmup(4, start=0.5), rules=[lm.Rule("head.*", thaw=2)]
    )
    preview = plan.preview(Net())
    rows = rows_of(preview)
    assert rows["default"].lr_start == pytest.approx(0.05)
    assert rows["head.*"].lr_start == pytest.approx(0.075)
    assert (rows["head.*"].lr_peak, rows["head.*"].lr_end, rows["head.*"].last) == (None,) * 3


def test_feedback_changes_what_is_shown():
    plan = lm.Plan("SGD", lr=0.1)
    resolved = lm.resolve_plan(plan, Net(), plan.preview(Net(), steps=10).run)
    changed = Preview(resolved, lm.Feedback(overrides={"default": [[6, {"lr": 0.7}]]}))
    (row,) = changed.rows
    assert (row.lr_start, row.lr_peak, row.lr_end) == (0.1, 0.7, 0.7)
    assert changed.at(5)["default"]["lr"] == 0.1
    assert changed.at(6)["default"]["lr"] == 0.7


def test_scheduled_weight_decay_and_clip_show_both_ends():
    plan = lm.Plan(
        "SGD", lr=0.1, weight_decay=lm.linear(0.0, 1.0), clip_norm=lm.linear(2.0, 1.0, length=9)
    )
    (row,) = plan.preview(Net(), steps=10).rows
    assert (row.weight_decay, row.weight_decay_end) == (0.0, pytest.approx(0.9))
    assert row.clip == "2 → 1 (plan)"


def test_long_run_of_many_groups():
    steps = 1_000_000
    plan = lm.Plan(
        "SGD",
        lr=0.1,
        schedule=lm.warmup(1234) >> lm.cosine(to=0.0),
        rules=[lm.Rule("layer.{depth}.*", lr=lm.by_depth(0.9), thaw=lm.top_down(every=7001))],
    )
    preview = plan.preview(Net(layers=100), steps=steps)
    assert len(preview.rows) == 101
    assert len(preview.steps) <= SAMPLES
    drawn = set(preview.steps.tolist())
    assert {0, 1233, 1234, 7000, 7001, 700099, 700100, steps - 1} <= drawn
    every = preview.values(np.arange(steps))
    for index in (0, 1, 50, 100):
        row = preview.rows[index]
        assert row.lr_peak == every.lr(index).max()
        assert row.lr.tolist() == every.lr(index)[preview.steps].tolist()
        assert row.lr_end == every.lr(index)[-1]


def test_the_peak_is_found_between_samples():
    spike = lm.from_function(lambda step: np.where(step == 77_777, 5.0, 1.0))
    (row,) = lm.Plan("SGD", lr=0.1, schedule=spike).preview(Net(), steps=100_000).rows
    assert row.lr_peak == 0.5
    assert 0.5 in row.lr


def test_repr_is_short():
    assert repr(example().preview(Net(), steps=12)).startswith("<Preview of 5 groups")


def test_the_hash_is_this_one_on_every_machine():
    """Kept as text: another Python, NumPy, torch or processor has to give the same."""
    plan = lm.Plan(
        "AdamW",
        lr=3e-4,
        betas=(0.9, 0.98),
        schedule=lm.warmup(7) >> lm.cosine(to=0.01) * lm.exponential(0.999),
        clip_norm=lm.linear(2.0, 1.0),
        rules=[lm.Rule("layer.{depth}.*", lr=lm.by_depth(0.93), thaw=lm.top_down(every=5))],
    )
    assert plan.preview(Net(), steps=1000).hash == (
        "15cc12ffdb81d852edf5cbe328b2684de18f4cfe50e50370a57fa77ba9ced1f8"
    )
