"""The record of a run: bounded, spikes kept, tensors read late, files read as data."""

import json
import math

import numpy as np
import pytest
import torch

from lamina.errors import LaminaError, StateError
from lamina.model.finding import Finding
from lamina.record import METRICS, Record
from lamina.record.series import Series, thin

FINDING = Finding("a-code", "a cause", "a fix")


def filled():
    record = Record()
    for step in range(5):
        record.add(step, "head", lr=0.1 * step, grad_norm=torch.tensor(float(step)))
        record.metrics(step, loss=1.0 / (step + 1))
    record.add(4, "body", lr=math.inf)
    record.event(3, "thaw", "body trains", ["body"])
    record.finding(FINDING)
    record.finding(FINDING)
    return record


def test_values_come_back_by_group_and_name():
    record = filled()
    steps, values = record.series("head", "grad_norm")
    assert steps.tolist() == [0, 1, 2, 3, 4]
    assert values.tolist() == [0, 1, 2, 3, 4]
    assert record.groups == ("head", "body")
    assert record.names("head") == ("lr", "grad_norm")
    assert record.names() == ("loss",)
    assert record.series(METRICS, "loss")[1][-1] == 0.2
    assert record.findings == (FINDING,)
    assert record.events[0].groups == ("body",)
    assert record.last_step == 4
    assert len(record.series("nobody", "lr")[0]) == 0


def test_every_name_of_a_value_can_be_recorded():
    record = Record()
    record.add(1, "g", **{"step": 1.0, "group": 2.0, "self": 3.0, "a b": 4.0})
    assert record.names("g") == ("step", "group", "self", "a b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_tensors_are_read_in_batches(dtype, monkeypatch):
    record, reads = Record(batch=8), []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda each: reads.append(len(each)) or stack(each))
    for step in range(20):
        record.add(step, "g", norm=torch.tensor(step, dtype=dtype))
    assert reads == [8, 8]
    assert record.series("g", "norm")[1].tolist() == list(range(20))
    assert reads == [8, 8, 4]


def test_thinning_keeps_every_spike_and_bounds_memory():
    series, rng = Series(100, 200), np.random.default_rng(0)
    values = rng.random(50_000)
    spikes = {7: 50.0, 12_345: -40.0, 30_001: 60.0, 49_990: 70.0}
    for step, value in spikes.items():
        values[step] = value
    values[20_000], values[20_001] = math.nan, math.inf
    for step, value in enumerate(values.tolist()):
        series.add(step, value)
    steps, kept = series.arrays()
    assert len(steps) <= 2 * 200 + 2 * 100 + 2
    assert np.all(np.diff(steps) > 0)
    assert steps[0] == 0
    assert steps[-1] == 49_999
    np.testing.assert_array_equal(kept, values[steps])  # every point is one of the run
    assert set(spikes) <= set(steps.tolist())
    assert not np.isfinite(kept[(steps >= 20_000) & (steps < 20_300)]).all()
    np.testing.assert_array_equal(steps[-100:], np.arange(49_900, 50_000))
    assert np.diff(steps).max() < 50_000 / 200 * 4  # evenly


def test_thinning_again_loses_no_extreme():
    steps = np.arange(10_000)
    values = np.sin(steps / 50.0)
    values[5_555] = 9.0
    once = thin(steps, values, 2_000)
    twice = thin(*once, 100)
    assert len(twice[0]) <= 104
    assert 9.0 in twice[1]
    assert twice[1].min() == values.min()


def test_thinning_survives_huge_steps():
    steps = np.array([0, 1, 2**52, 2**53 - 2, 2**53 - 1])
    found, _ = thin(steps, np.ones(5), 4)
    assert found[0] == 0
    assert found[-1] == 2**53 - 1


def test_events_stay_bounded_the_first_and_the_latest():
    record = Record()
    for step in range(5_000):
        record.event(step, "skipped", str(step))
    assert len(record.events) == 2_000
    assert record.dropped_events == 3_000
    assert record.events[0].step == 0
    assert record.events[-1].step == 4_999


def test_save_and_load_give_the_same(tmp_path):
    path, record = tmp_path / "record.jsonl", filled()
    record.add(5, 'a "b" </script>\n\udc80', lr=math.nan)
    record.save(path)
    again = Record.load(path)
    assert again.events == record.events
    assert again.findings == record.findings
    assert [row[:2] for row in again.curves()][:3] == [row[:2] for row in record.curves()][:3]
    for mine, its in zip(record.curves(), again.curves(), strict=True):
        np.testing.assert_array_equal(mine[2], its[2])
        np.testing.assert_array_equal(mine[3], its[3])
    assert again.damaged_lines == 0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_a_file_cut_off_anywhere_is_read_as_far_as_it_goes(tmp_path, share):
    path = tmp_path / "record.jsonl"
    filled().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    record = Record.load(path)
    assert record.damaged_lines == 0
    assert set(record.groups) <= {"head", "body"}


def test_damaged_lines_are_counted_and_the_others_read(tmp_path):
    path = tmp_path / "record.jsonl"
    rows = [
        {"kind": "step", "step": 1, "loss": 2.0, "lr": {"g": 0.1}, "norms": {"g": 3.0}},
        {"kind": "step", "step": -1, "loss": 2.0, "lr": {}},
        {"kind": "step", "step": True, "loss": 2.0, "lr": {}},
        {"kind": "step", "step": 2, "loss": "1e3", "lr": {"g": 0.2}},
        {"kind": "step", "step": 3, "loss": None, "lr": {"g": [1]}},
        {"kind": "series", "group": "g", "name": "x", "steps": [1], "values": []},
        {"kind": "elsewhere"},
        ["kind"],
        7,
        {"kind": "validation", "step": 2, "averages": {"accuracy": 0.5}},
    ]
    text = "\n".join(map(json.dumps, rows)) + "\n" + "[" * 100_000 + "\n\xff\n"
    path.write_text(text, encoding="latin-1")
    record = Record.load(path)
    assert record.damaged_lines == 10
    assert record.series("g", "lr")[0].tolist() == [1]
    assert record.series(METRICS, "val_accuracy")[1].tolist() == [0.5]
    assert record.series(METRICS, "norm/g")[1].tolist() == [3.0]


@pytest.mark.parametrize("content", [b"no record\n", b"PK\x03\x04", b'{"kind": "other"}\n'])
def test_a_file_that_is_no_record_is_refused(tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(StateError, match="no line of this file"):
        Record.load(path)


def test_an_empty_file_is_an_empty_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    record = Record.load(path)
    assert record.groups == ()
    assert record.last_step is None
    record.save(path)
    assert Record.load(path).groups == ()


def test_files_that_are_missing_or_cannot_be_written(tmp_path):
    with pytest.raises(StateError, match="cannot be read"):
        Record.load(tmp_path / "none")
    with pytest.raises(LaminaError, match="cannot be written"):
        filled().save(tmp_path / "no" / "folder")


def test_cut_forgets_what_follows():
    record = filled()
    record.cut(3)
    assert record.series("head", "lr")[0].tolist() == [0, 1, 2]
    assert record.events == ()
    assert record.last_step == 2
    record.add(3, "head", lr=7.0)
    assert record.series("head", "lr")[1].tolist()[-1] == 7.0


@pytest.mark.parametrize(
    ("step", "values"),
    [
        (-1, {"lr": 1.0}),
        (1.0, {"lr": 1.0}),
        (True, {"lr": 1.0}),
        (1, {"lr": "0.1"}),
        (1, {"lr": torch.ones(2)}),
        (1, {"lr": torch.tensor(1j)}),
    ],
)
def test_what_is_no_value_is_refused(step, values):
    record = Record()
    with pytest.raises(StateError, match="expected"):
        record.add(step, "g", **values)
    assert record.last_step is None


@pytest.mark.parametrize("sizes", [{"capacity": 0}, {"points": 2}, {"batch": 0.5}])
def test_sizes_are_checked(sizes):
    with pytest.raises(StateError, match="whole number"):
        Record(**sizes)


def test_a_meta_tensor_has_no_number():
    record = Record()
    record.add(0, "g", norm=torch.tensor(1.0, device="meta"))
    assert math.isnan(record.series("g", "norm")[1][0])
