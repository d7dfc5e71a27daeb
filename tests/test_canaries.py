"""Each outer tool is shown an error with the project's own settings, and must refuse it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLEAN = (
    '"""A module."""\n\n\ndef double(x: float) -> float:\n    """Twice x."""\n    return 2 * x\n'
)


def run(*command: str, stdin: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # An outer make or pytest must not pass its own options on.
    inherited = ("MAKE", "MFLAGS", "PYTEST_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(inherited)}
    return subprocess.run(
        command, input=stdin, cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def ruff(*arguments: str, text: str) -> subprocess.CompletedProcess[str]:
    name = "--stdin-filename=src/lamina/canary.py"  # so that the settings for the source apply
    return run(sys.executable, "-m", "ruff", *arguments, name, "-", stdin=text)


def test_ruff_accepts_clean_code():
    assert ruff("check", text=CLEAN).returncode == 0
    assert ruff("format", "--check", text=CLEAN).returncode == 0


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("F401", CLEAN.replace('"""A module."""', '"""A module."""\n\nimport os')),
        ("D103", CLEAN.replace('    """Twice x."""\n', "")),
        ("B006", CLEAN.replace("x: float", "x: float, y: list[int] = []")),
        ("E501", CLEAN.replace("Twice x", "Twice x" * 20)),
        ("UP006", CLEAN + "\n\nfrom typing import List\n\na: List[int] = []\n"),
        (
            "RET505",
            CLEAN.replace("return 2 * x", "if x:\n        return 1\n    else:\n        return 2"),
        ),
        ("RUF100", CLEAN.replace("2 * x", "2 * x  # noqa: F401")),
    ],
)
def test_ruff_refuses(code, text):
    result = ruff("check", text=text)
    assert result.returncode != 0
    assert code in result.stdout


def test_ruff_refuses_format():
    assert ruff("format", "--check", text=CLEAN.replace("2 * x", "2*x")).returncode != 0


def mypy(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "canary.py"
    path.write_text(text, encoding="utf-8")
    settings = ("--config-file=pyproject.toml", f"--cache-dir={folder / 'cache'}")
    return run(sys.executable, "-m", "mypy", *settings, str(path))


def test_mypy_accepts_clean_code(tmp_path):
    result = mypy(CLEAN, tmp_path)
    assert result.returncode == 0, result.stdout


def test_mypy_refuses(tmp_path):
    untyped = "\n\ndef half(x):\n    return x / 2\n"
    wrong = "\n\nhalves: int = double(1.0)\n"
    missing = "\n\nimport nowhere\n"
    result = mypy(CLEAN + untyped + wrong + missing, tmp_path)
    assert result.returncode != 0
    for code in ("no-untyped-def", "assignment", "import-not-found"):
        assert f"[{code}]" in result.stdout


def run_pytest(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "test_canary.py").write_text(text, encoding="utf-8")
    settings = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder))
    command = (sys.executable, "-m", "pytest", *settings, "-p", "no:cacheprovider", str(folder))
    return run(*command, cwd=folder)


@pytest.mark.parametrize(
    ("body", "failed"),
    [
        ("assert True", False),
        ("assert False", True),
        ("import warnings; warnings.warn('planted')", True),
        ("import warnings; warnings.warn('planted', DeprecationWarning)", True),
        ("import warnings; warnings.warn('planted', FutureWarning)", True),
    ],
)
def test_pytest_turns_warnings_into_errors(body, failed, tmp_path):
    result = run_pytest(f"def test_a():\n    {body}\n", tmp_path)
    assert result.returncode == int(failed), result.stdout
    if "planted" in body:
        assert "planted" in result.stdout


def test_pytest_refuses_unknown_marks_and_stale_xfails(tmp_path):
    marks = "import pytest\n\n@pytest.mark.{}\ndef test_a():\n    assert True\n"
    assert run_pytest(marks.format("sloow"), tmp_path).returncode != 0
    assert run_pytest(marks.format("xfail"), tmp_path).returncode == 1
    assert run_pytest(marks.format("slow"), tmp_path).returncode == 5  # left out: nothing to run


def test_ci_runs_every_gate():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "\nmake test-oldest\nexec make test\n" in text
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    lines = run("make", "-n", "test").stdout.splitlines()
    for gate in ("ruff check", "ruff format --check", "bin/mypy", "-m pytest"):
        assert any(gate in line for line in lines), gate
    assert "-m pytest" in lines[-1]  # so that pytest's closing line is the last one printed
    oldest = run("make", "-n", "test-oldest").stdout.splitlines()
    assert ".venv-oldest/bin/python -m pytest" in oldest[-1]
