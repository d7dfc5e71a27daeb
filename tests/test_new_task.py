"""`lamina new-task`, and `lamina run` where no example tasks are."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamina.cli import arguments, new_task
from lamina.cli.app import app
from lamina.training.example_tasks import example_tasks
from lamina.training.load import load_task


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lamina.training.run_folder.RunFolder.picture", lambda *_: None)
    return tmp_path


def test_a_new_task_trains_as_it_is(home):
    told = call("new-task", "my_task.py")
    assert told.exit_code == 0
    assert "lamina run my_task.py" in told.output
    result = call("run", "my_task.py", "--cpu", "--epochs", 2, "--out", "run")
    assert result.exit_code == 0, result.output
    assert "accuracy" in result.output
    assert "applied as planned" in result.output
    plan = load_task("my_task.py").plan()
    assert len(plan.rules) == 2


def test_an_existing_file_is_left_as_it_is(home):
    Path("mine.py").write_text("x = 1\n")
    told = call("new-task", "mine.py")
    assert told.exit_code == 2
    assert "mine.py" in told.output
    assert "exists" in told.output
    assert Path("mine.py").read_text() == "x = 1\n"


@pytest.mark.parametrize(
    "name", ["task.txt", "1st.py", "my-task.py", "class.py", "", "no/such/folder/task.py"]
)
def test_a_name_that_no_task_can_have_is_one_line(home, name):
    told = call("new-task", name)
    assert told.exit_code == 2
    assert "Traceback" not in told.output
    assert list(home.iterdir()) == []


def test_an_installed_lamina_explains_what_a_task_is(home, monkeypatch):
    monkeypatch.setattr(arguments, "example_tasks", dict)
    told = call("run")
    assert told.exit_code == 2
    for words in ("model(), data() and loss(model, batch)", "lamina new-task my_task.py"):
        assert words in " ".join(told.output.split())


def test_example_tasks_are_found_in_a_clone_of_lamina_alone(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "examples" / "tasks").mkdir(parents=True)
    (tmp_path / "examples" / "tasks" / "digits.py").touch()
    project = tmp_path / "pyproject.toml"
    for text in ('[project]\nname = "lamina"\n', '[project]\nname = "mine"\n', "[project", "x = 1"):
        project.write_text(text)
        expected = ["digits"] if "lamina" in text else []
        assert list(example_tasks(tmp_path / "src")) == expected
    project.unlink()
    assert example_tasks(tmp_path / "src") == {}
    assert list(example_tasks()) == ["reviews", "digits"]


def test_the_template_is_a_page_to_read():
    assert max(map(len, new_task.TEMPLATE.splitlines())) <= 100
