"""`python -m benchmarks.reuse`: twins see the same, both sides of the comparison are equal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import page  # noqa: E402
from benchmarks.reuse import accuracy, tables, timing  # noqa: E402
from benchmarks.reuse.workloads import Stage, Workload, padded, random_texts  # noqa: E402


class Tower(nn.Module):
    """Two layers with dropout, and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2))
        self.top = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 2)

    def forward(self, points):
        return self.head(self.top(self.layers(points)))


def group(count, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 4, generator=generator)
    return {"points": points, "labels": torch.arange(count) % 2}


def tower(limit=None):
    return Workload(
        name="tower",
        title="a tower",
        model=Tower,
        arguments=lambda batch: (batch["points"],),
        groups=[group(8, 0), group(12, 1)],
        size=4,
        stages=(Stage("head only", "head.*", limit), Stage("top", "head.* | top.*")),
        tunes=(Stage("all layers", "*", limit),),
    )


# --- batches --------------------------------------------------------------------------------------


def test_an_epoch_has_every_example_once_in_another_order_each_time():
    workload = tower()
    epochs = [workload.epoch(epoch) for epoch in (0, 1, 0)]
    assert workload.steps_per_epoch == 5
    assert workload.count == 20
    sums = [torch.cat([batch["points"].sum(1) for batch in epoch]) for epoch in epochs]
    assert torch.equal(sums[0], sums[2])
    assert not torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0].sort().values, sums[1].sort().values)
    of_first = set(workload.groups[0]["points"].sum(1).tolist())
    for batch in epochs[0]:
        assert len({value in of_first for value in batch["points"].sum(1).tolist()}) == 1


def test_texts_are_cut_and_padded_to_a_length():
    items = random_texts(6)
    batch = padded(items, 5)
    assert batch["input_ids"].shape == (6, 5)
    for row, item in enumerate(items):
        kept = item.tokens[:5]
        assert batch["input_ids"][row].tolist() == kept + [0] * (5 - len(kept))
        assert batch["attention_mask"][row].sum() == len(kept)


def test_texts_of_the_search_follow_those_of_the_task():
    sys.path.append(str(ROOT / "examples" / "tasks"))
    from task_helpers.snippets import Snippet, split

    pool = [Snippet(f"text {number}", number % 2) for number in range(50)]
    train, held_out = split(pool, 20, 10, seed=3)
    more, same = split(pool, 30, 10, seed=3)
    assert more[:20] == train
    assert same == held_out


# --- steps in turns -------------------------------------------------------------------------------


def test_a_stage_tells_times_space_and_that_the_bits_are_the_same():
    found = timing.stage_rows(tower(limit=1e9), tower().stages[0], epochs=3)
    assert list(found["rows"]) == [timing.WITHOUT, timing.MEMORY, timing.FILES]
    assert all(row["same_bits"] for row in found["rows"].values())
    assert len(found["rows"][timing.MEMORY]["epochs_ms"]) == 3
    assert found["estimated_bytes"] == 20 * 8 * 4  # examples, numbers, bytes
    assert found["rows"][timing.MEMORY]["stored_bytes"] >= found["estimated_bytes"]
    assert found["rows"][timing.FILES]["disk_bytes"] >= found["estimated_bytes"]
    table = tables.stages([found])
    assert table.count("| yes ") == 2
    found["rows"][timing.MEMORY]["same_bits"] = False
    assert tables.stages([found]).count("| NO ") == 1


def test_twins_that_differ_are_told_apart():
    workload = tower()
    plans = [timing.stage_plan(workload, stage) for stage in workload.stages]
    first, same, other = (
        timing.Trainee(workload, plan, 1, reuse=False, folder=None)
        for plan in (plans[0], plans[0], plans[1])
    )
    for each in (first, same, other):
        for batch in workload.epoch(0):
            each.step(0, batch)
    assert first.same_bits(same)
    assert not first.same_bits(other)
    with torch.no_grad():
        same.model.head.bias[0] += 1
    assert not first.same_bits(same)


def test_a_probe_then_fine_tuning_reuses_in_the_probe_and_ends_the_same():
    workload = tower(limit=0.5)
    found = timing.tune_rows(workload, workload.tunes[0], 3, 1)
    assert found["same_bits"]
    assert found["stored_bytes"] >= found["estimated_bytes"] > 0
    assert [len(times) for times in found["epochs_ms"].values()] == [4, 4]
    assert found["ratio"] > 0
    assert "all layers" in tables.tunes([found])


# --- accuracy -------------------------------------------------------------------------------------


def test_both_sides_are_tried_equally_often_and_the_best_setting_is_judged(monkeypatch):
    def fake(trial, train, judged_by, seed):
        texts = ("train", "search" if seed == accuracy.SEARCH_SEED else "held-out")
        assert (train, judged_by) == texts
        best = trial is tried[name_of[id(trial)]][2]
        return {
            "accuracy": 0.9 if best else 0.5 + seed / 1000,
            "seconds": 4.0 if trial.reuse else 10.0,
            "processor_seconds": 5.0 if trial.reuse else 10.0,
        }

    tried = accuracy.sides(6)
    name_of = {id(trial): name for name, trials in tried.items() for trial in trials}
    monkeypatch.setattr(accuracy, "trained", fake)
    texts = accuracy.Texts("train", "search", "held-out")
    *_, found = accuracy.search_and_judge(texts, tried, seeds=3)
    assert {len(runs) for runs in found["search"].values()} == {4}
    for name, side in found["sides"].items():
        assert side["chosen"] == tried[name][2].label
        assert len(side["runs"]) == 3
    assert found["differences"] == [0.0, 0.0, 0.0]
    assert (found["time_ratio"], found["processor_ratio"]) == (0.4, 0.5)
    assert "0.40 of that" in tables.verdict(found)
    assert "0.9000" in tables.judged(found)


def test_a_run_of_the_accuracy_goes_on_where_it_ended(monkeypatch):
    seeds = []

    def fake(trial, train, judged_by, seed):
        seeds.append(seed)
        return {"accuracy": 0.5, "seconds": 1.0, "processor_seconds": 1.0}

    monkeypatch.setattr(accuracy, "trained", fake)
    texts, tried = accuracy.Texts("train", "search", "held-out"), accuracy.sides(6)
    *_, whole = accuracy.search_and_judge(texts, tried, seeds=3)
    assert len(seeds) == 8 + 2 * 3
    *_, cut = accuracy.search_and_judge(texts, tried, seeds=1)
    seeds.clear()
    *_, found = accuracy.search_and_judge(texts, tried, 3, json.loads(json.dumps(cut)))
    assert seeds == [1, 1, 2, 2]
    assert found == whole


def test_a_staged_plan_thaws_after_the_probe_and_reuses():
    for trial in accuracy.sides(6)["staged, with reuse"]:
        assert trial.reuse
        text = trial.plan.to_toml()
        assert "top_down" in text
    assert not any(trial.reuse for trial in accuracy.sides(6)["full fine-tuning"])


# --- targets and page -----------------------------------------------------------------------------


def results():
    return {
        "about": {"torch": "2"},
        "stages": [timing.stage_rows(tower(limit=1e9), tower(1e9).stages[0], epochs=2)],
        "tunes": [],
        "targets": [],
    }


def test_targets_are_held_against_what_was_measured():
    found = results()
    found["stages"][0]["rows"][timing.MEMORY]["ratio"] = 0.5
    assert [row["verdict"] for row in tables.targets(found)] == ["met"]
    found["stages"][0]["limit"] = 0.4
    assert [row["verdict"] for row in tables.targets(found)] == ["missed"]
    assert "missed" in tables.target_table(tables.targets(found))
    found["accuracy"] = {"limit": 0.6, "time_ratio": 0.6}
    assert [row["verdict"] for row in tables.targets(found)] == ["missed", "met"]
    found["accuracy"]["limit"] = None  # a try with small models is held against nothing
    assert len(tables.targets(found)) == 1


def test_the_page_shows_the_figures_of_reuse_beside_the_others(tmp_path):
    (tmp_path / "benchmarks.md").write_text(
        f"{page.BEGIN}\nkept\n{page.END}\n{page.REUSE[0]}\nstale\n{page.REUSE[1]}\nThe end.\n"
    )
    found = results()
    for _ in range(2):
        page.write(found, tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "kept" in text
    assert "stale" not in text
    assert text.count("a tower:") == 1
    assert text.endswith("The end.\n")
    assert json.loads((tmp_path / "benchmarks" / "reuse.json").read_text()) == found


def test_the_tables_of_the_page_are_those_of_the_committed_results():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    committed = ROOT / "docs" / "benchmarks" / "reuse.json"
    found = page.read(committed) if committed.is_file() else None
    assert page.replaced(text, page.reuse_figures(found), page.REUSE) == text


@pytest.mark.slow
def test_the_quick_command_runs_and_finds_the_same_bits(tmp_path):
    path = tmp_path / "reuse.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.reuse", "--quick", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    found = page.read(path)
    assert all(row["same_bits"] for each in found["stages"] for row in each["rows"].values())
    assert all(each["same_bits"] for each in found["tunes"])
    assert len(found["accuracy"]["differences"]) == 1
    assert "random words" in page.reuse_figures(found)
