"""A run that goes on though its folder is damaged, or what was asked for was not saved yet."""

import json

import pytest

import resume_task
import training_task
from lamina import LaminaError, StateError, checkpoint
from lamina.training import Task, fit, prepare_run
from lamina.training.run_folder import PENDING
from test_resume import PLAN, again, assert_same, cut, rows, variant


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    monkeypatch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)


@pytest.fixture
def stopped(tmp_path):
    """A run that was stopped in its second epoch, saved at steps 7 and 9."""
    out = tmp_path / "run"
    fit(cut(Task("training_task", training_task), 12), PLAN, out=out, cpu=True, seed=3)
    return out


def about(folder, **changes):
    """What run.json says, after it was changed by hand."""
    path = folder / "run.json"
    said = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(said))
    return said


def stopped_again(folder, **asked):
    """The run goes on with what is asked for, and ends before it saves anything."""

    def loss(model, batch):
        raise RuntimeError("the power failed")

    with pytest.raises(RuntimeError, match="the power failed"):
        fit(variant(training_task, loss=loss), resume=folder, cpu=True, **asked)


@pytest.mark.parametrize("extend", ["hold", "stretch"])
def test_what_was_asked_for_last_is_kept_though_nothing_was_saved_since(stopped, extend, tmp_path):
    again(stopped)  # to its end
    stopped_again(stopped, epochs=3, extend=extend, keep=5, save_every="3 steps")
    result = again(stopped)
    assert result.steps == 21
    said = about(stopped)
    assert (said["epochs"], said["keep"], said["save_every"]) == (3, 5, "3 steps")
    settings = checkpoint.newest(stopped / "checkpoints").content["settings"]
    assert (settings["epochs"], settings["keep"], settings["save_every"]) == (3, 5, "3 steps")
    fit(variant(training_task), PLAN, out=tmp_path / "whole", cpu=True)
    again(tmp_path / "whole", epochs=3, extend=extend)
    lr = [[row["lr"] for row in rows(f) if "lr" in row] for f in (stopped, tmp_path / "whole")]
    assert lr[0] == lr[1]
    assert len(lr[0]) == 21


def test_the_word_for_one_length_is_not_taken_for_another(stopped):
    stopped_again(stopped, epochs=3, extend="hold")
    with pytest.raises(StateError, match=r"planned for 14 steps.*this one has 28.*--extend"):
        again(stopped, epochs=4)
    assert again(stopped, epochs=2).steps == 14


def test_a_plan_that_was_given_and_not_yet_written(stopped):
    text = PLAN.to_toml().replace("0.01)", "0.5)")
    about(stopped, **{PENDING: {"plan.toml": text}})
    again(stopped)
    assert (stopped / "plan.toml").read_text() == text
    assert PENDING not in about(stopped)


@pytest.mark.parametrize(("name", "value"), [("epochs", "x"), ("save_every", [1]), ("keep", 0)])
def test_a_setting_in_run_json_that_cannot_be_meant(stopped, name, value):
    said = json.loads((stopped / "run.json").read_text())[name]
    about(stopped, **{name: value})
    with pytest.raises(StateError, match=rf"run\.json.*{name}|run\.json.*length of time"):
        again(stopped)
    about(stopped, **{name: said})
    with pytest.raises(LaminaError, match="keep=-1") as error:
        again(stopped, keep=-1)
    assert "run.json" not in str(error.value)


def test_a_history_in_run_json_that_is_no_list_is_kept_as_it_is(stopped):
    about(stopped, resumed=5)
    again(stopped)
    assert about(stopped)["resumed"][0] == 5
    assert about(stopped)["resumed"][1]["step"] == 9


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: b"\xff\xfe" + line[2:],
        lambda line: b"\0" * len(line),
        lambda line: line.replace(b'"kind"', b'"kinb"'),
        lambda line: line.replace(b'"lr": {', b'"lr": [', 1),
        lambda line: b"[" * len(line),
        lambda line: b"5" * len(line),
        lambda line: line.replace(b'"step": 4', b'"step": "')[:-1] + b"x",
    ],
)
def test_damaged_lines_of_the_record_are_passed_over(stopped, tmp_path, damage):
    """The run goes on as it would have; what can be compared with the plan is what follows."""
    fit(Task("training_task", training_task), PLAN, out=tmp_path / "whole", cpu=True, seed=3)
    metrics = stopped / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines()
    number = next(n for n, line in enumerate(lines) if b'"step": 4,' in line)
    lines[number] = damage(lines[number])
    assert b"\n" not in lines[number]
    data = b"\n".join(lines) + b"\n"
    assert len(data) == metrics.stat().st_size
    metrics.write_bytes(data)
    events = []

    class Heard:
        def on_event(self, event):
            events.append(event.text)

        on_step = on_validation = lambda *_: None

    result = again(stopped, listeners=[Heard()])
    assert "metrics.jsonl: skipped 1 damaged line" in events[0]
    assert str(result.confirmation).startswith("applied as planned: 9 steps")
    assert metrics.read_bytes().startswith(data)
    newest = [checkpoint.newest(f / "checkpoints").content for f in (stopped, tmp_path / "whole")]
    assert all(
        newest[0]["model"][name].equal(newest[1]["model"][name]) for name in newest[0]["model"]
    )


def test_a_run_whose_settings_are_as_they_were_is_as_one_that_was_never_stopped(tmp_path):
    settings = {"cpu": True, "save_every": 1}
    fit(variant(), out=tmp_path / "whole", **settings)
    fit(cut(variant(resume_task), 9), out=tmp_path / "cut", **settings)
    with prepare_run(variant(), resume=tmp_path / "cut", cpu=True) as session:
        assert session.extend is None
        session.train()
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_what_cannot_be_read_is_passed_over_and_put_aside(stopped):
    folder = stopped / "checkpoints"
    loop = folder / "step-00000012-0123456789abcdef.pt"
    loop.symlink_to(loop.name)
    inside = folder / "step-00000011-0123456789abcdef.pt"
    inside.mkdir()
    result = again(stopped)
    assert result.steps == 14
    noted = json.loads((stopped / "run.json").read_text())["resumed"][0]
    assert noted["passed_over"] == [loop.name, inside.name]
    assert noted["step"] == 9
    left = sorted(path.name for path in folder.iterdir() if path.name.endswith(".damaged"))
    assert left == [f"{inside.name}.damaged", f"{loop.name}.damaged"]
