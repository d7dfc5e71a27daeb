"""`lamina report` and `lamina compare`: of runs that ended, still go on, were killed or damaged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import training_task
from lamina import Plan
from lamina.cli.app import app
from lamina.record import METRICS, Record
from lamina.record.planned import ParameterEntry
from lamina.report_page.compare import Compared, compare, pairs_of
from lamina.report_page.source import Source
from lamina.training import Task, fit
from lamina.training.read_run import read_run

pytest.importorskip("plotly")
from test_report_page import page_of

PLAN = Plan.from_toml(training_task.PLAN)


def lamina(*words):
    """The exit code and what was printed."""
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in a setting and in the plan."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)
        task = Task("task", training_task)
        fit(task, PLAN, out=folder / "first", epochs=3, cpu=True)
        text = training_task.PLAN.replace("clip_norm = 1.0", "clip_norm = 0.5")
        fit(task, Plan.from_toml(text), out=folder / "second", epochs=2, seed=3, cpu=True)
    return folder


def copy_of(runs, tmp_path, name="first"):
    return Path(shutil.copytree(runs / name, tmp_path / name))


def test_a_run_records_what_each_group_did(runs):
    run = read_run(runs / "first")
    rows = [json.loads(line) for line in (runs / "first/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert all(row["groups"] for row in steps)
    trained = {name for row in steps for name, values in row["groups"].items() if "clip" in values}
    for group in trained:
        measured = [row["groups"][group] for row in steps if "update_norm" in row["groups"][group]]
        assert {"clip", "grad_norm", "weight_norm", "update_norm"} <= set(measured[0])
        ratio = [values["update_norm"] / values["weight_norm"] for values in measured]
        np.testing.assert_allclose(run.record.series(group, "ratio")[1], ratio)
    assert run.planned is not None
    assert run.planned.total == len(steps)


def test_report_writes_a_page_into_the_folder(runs, tmp_path):
    folder = copy_of(runs, tmp_path)
    code, said = lamina("report", folder)
    assert code == 0
    assert "report.html" in said
    page = page_of(folder / "report.html")
    assert {"lr", "updates", "gradients"} <= {chart["id"] for chart in page.data["charts"]}
    assert "Settings" in page.text
    assert "finished" in page.text


def test_report_of_a_run_that_is_still_written(runs, tmp_path):
    folder = copy_of(runs, tmp_path)
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:1500])
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**about, "status": "running"}))
    code, _ = lamina("report", folder, "-o", tmp_path / "x.html")
    assert code == 0
    page = page_of(tmp_path / "x.html")
    assert "running" in page.text
    assert not (folder / "report.html").exists()


def test_report_of_a_run_that_has_just_begun(runs, tmp_path):
    folder = copy_of(runs, tmp_path)
    (folder / "metrics.jsonl").unlink()
    assert lamina("report", folder)[0] == 0
    assert [c["id"] for c in page_of(folder / "report.html").data["charts"]] == ["lr"]


def test_report_of_a_run_of_an_earlier_version(runs, tmp_path):
    folder = copy_of(runs, tmp_path)
    (folder / "planned.json").unlink()
    assert lamina("report", folder)[0] == 0
    names = {t["name"] for t in page_of(folder / "report.html").chart("lr")["traces"]}
    assert names == {"applied"}


def test_report_tells_of_damaged_lines(runs, tmp_path):
    folder = copy_of(runs, tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2] = lines[2][:20]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert lamina("report", folder)[0] == 0
    assert "1 of metrics.jsonl were skipped" in page_of(folder / "report.html").text


def test_a_run_with_markup_in_its_files(runs, tmp_path):
    folder = copy_of(runs, tmp_path)
    attack = "</script><script>attack()</script>"
    metrics = (folder / "metrics.jsonl").read_text()
    group = next(iter(json.loads(metrics.splitlines()[0])["lr"]))
    (folder / "metrics.jsonl").write_text(metrics.replace(json.dumps(group), json.dumps(attack)))
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**about, "task": attack}))
    (folder / "plan.toml").write_text(f"# {attack}\nlr = 1.0\n")
    evil = folder.rename(tmp_path / "<b>run<b>")
    assert lamina("report", evil)[0] == 0
    assert len(page_of(evil / "report.html").scripts) == 3
    assert lamina("compare", evil, runs / "second", "-o", tmp_path / "c.html")[0] == 0
    assert len(page_of(tmp_path / "c.html").scripts) == 3


@pytest.mark.parametrize("words", [("report",), ("compare", "first")])
def test_what_is_no_run_is_one_line(words, runs, tmp_path):
    first = [runs / word for word in words[1:]]
    for path in (tmp_path / "none", tmp_path, runs / "first/metrics.jsonl"):
        code, said = lamina(words[0], *first, path)
        assert code == 2
        assert said.startswith("lamina: ")
        assert "Traceback" not in said


@pytest.mark.parametrize("name", ["planned.json", "metrics.jsonl", "plan.toml"])
def test_a_damaged_file_is_named_and_nothing_written(name, runs, tmp_path):
    folder = copy_of(runs, tmp_path)
    (folder / name).write_bytes(b"\xff\xfe\n\xff\n")
    code, said = lamina("report", folder)
    assert code == 2
    assert name in said
    assert not (folder / "report.html").exists()


def test_a_report_that_cannot_be_written_is_one_line(runs, tmp_path):
    code, said = lamina("report", runs / "first", "-o", tmp_path / "no" / "x.html")
    assert code == 2
    assert "cannot be written" in said


def test_compare_says_what_differs(runs, tmp_path):
    code, said = lamina("compare", runs / "first", runs / "second", "-o", tmp_path / "c.html")
    assert code == 0
    assert "epochs 3 2" in said
    assert "-clip_norm = 1.0" in said
    assert "+clip_norm = 0.5" in said
    assert "val_loss" in said
    page = page_of(tmp_path / "c.html")
    names = {trace["name"] for trace in page.chart("lr")["traces"]}
    assert names == {"first", "second"}
    record = Record.load(runs / "second/metrics.jsonl")
    chart = next(c for c in page.data["charts"] if c["yTitle"] == "val_loss")
    steps, values = record.series(METRICS, "val_loss")
    mine = next(trace for trace in chart["traces"] if trace["name"] == "second")
    assert mine["x"] == steps.tolist()
    np.testing.assert_allclose(mine["y"], values, rtol=1e-4)


def test_compare_of_a_run_with_itself(runs, tmp_path):
    same = Path(shutil.copytree(runs / "first", tmp_path / "other" / "first"))
    code, said = lamina("compare", runs / "first", same)
    assert code == 0
    assert "the plans are the same" in said
    assert "the lr is the same" in said
    assert str(same) in said  # the same name twice would tell nothing


def test_a_resumed_run_has_one_record(runs, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)
        task, folder = Task("task", training_task), tmp_path / "run"
        fit(task, PLAN, out=folder, epochs=2, cpu=True)
        fit(task, resume=folder, epochs=3, extend="stretch", cpu=True)
    run = read_run(folder)
    group = next(name for name in run.record.groups if len(run.record.series(name, "ratio")[0]))
    steps = run.record.series(group, "lr")[0]
    assert steps.tolist() == list(range(run.planned.total))


def test_groups_are_compared_by_their_parameters():
    names = ("a.weight", "b.weight")
    apart = [ParameterEntry(name, (1,), name[0]) for name in names]
    together = [ParameterEntry(name, (1,), "a, b") for name in names]
    one, other = Record(), Record()
    one.add(0, "a", lr=1.0)
    one.add(0, "b", lr=2.0)
    other.add(0, "a, b", lr=1.0)
    left, right = Source(one, parameters=apart), Source(other, parameters=together)
    pairs = [(pair.label, pair.left, pair.right) for pair in pairs_of(left, right)]
    assert pairs == [("a", "a", "a, b"), ("b", "b", "a, b")]
    found = compare(Compared("l", left, {}, ""), Compared("r", right, {}, ""))
    assert found.lr == (("b", "2 → 2", "1 → 1"),)
    by_name = [(p.label, p.left, p.right) for p in pairs_of(Source(one), Source(other))]
    assert by_name == [("a", "a", None), ("b", "b", None), ("a, b", None, "a, b")]
