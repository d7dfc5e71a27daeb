"""Each outer tool is shown an error with the project's own settings, and must refuse it."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLEAN = (
    '"""A module."""\n\n\ndef double(x: float) -> float:\n    """Twice x."""\n    return 2 * x\n'
)


def run(
    *command: str,
    stdin: str = "",
    cwd: Path = ROOT,
    extra: Mapping[str, str] = {},
) -> subprocess.CompletedProcess[str]:
    # An outer make or pytest must not pass its own options on.
    inherited = ("MAKE", "MFLAGS", "PYTEST_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(inherited)}
    env |= extra
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


def mypy(folder: Path, **texts: str) -> subprocess.CompletedProcess[str]:
    """Check files as if they were modules of lamina, or tests where the name says so."""
    (folder / "lamina").mkdir()
    (folder / "lamina" / "__init__.py").touch()
    paths = []
    for name, text in texts.items():
        paths.append(folder / ("" if name.startswith("test") else "lamina") / f"{name}.py")
        paths[-1].write_text(text, encoding="utf-8")
    settings = ("--config-file=pyproject.toml", f"--cache-dir={folder / 'cache'}")
    search = {"MYPYPATH": str(folder)}  # found before the real package
    return run(sys.executable, "-m", "mypy", *settings, *map(str, paths), extra=search)


def test_mypy_accepts_clean_code_and_refuses_what_is_not(tmp_path):
    untyped = "\n\ndef half(x):\n    return x / 2\n"
    wrong = "\n\nhalves: int = double(1.0)\n"
    missing = "\n\nimport nowhere\n"
    gone = "import math\n\n\ndef test_a():\n    assert math.halve(2) == 1\n"
    texts = {"clean": CLEAN, "canary": CLEAN + untyped + wrong + missing}
    result = mypy(tmp_path, **texts, test_clean=untyped, test_canary=gone)
    assert result.returncode != 0
    assert "clean.py" not in result.stdout
    codes = {
        code: Path(path).name
        for path, code in re.findall(r"^(\S+?):\d+: error: .*\[([a-z-]+)\]$", result.stdout, re.M)
    }
    assert codes == {
        "no-untyped-def": "canary.py",
        "assignment": "canary.py",
        "import-not-found": "canary.py",
        "attr-defined": "test_canary.py",
    }


def run_pytest(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "test_canary.py").write_text(text, encoding="utf-8")
    settings = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder))
    plugins = ("-p", "no:cacheprovider", "-p", "pytest_timeout")
    command = (sys.executable, "-m", "pytest", *settings, *plugins, str(folder))
    # No setting is for another plugin, and to load them takes longer than all the rest.
    return run(*command, cwd=folder, extra={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})


def test_pytest_turns_warnings_into_errors_and_refuses_stale_xfails(tmp_path):
    bodies = {
        "passes": "assert True",
        "fails": "assert False",
        "warns": "warnings.warn('planted user')",
        "deprecated": "warnings.warn('planted deprecation', DeprecationWarning)",
        "future": "warnings.warn('planted future', FutureWarning)",
    }
    tests = [f"def test_{name}():\n    {body}" for name, body in bodies.items()]
    tests += [f"@pytest.mark.{m}\ndef test_{m}():\n    assert True" for m in ("xfail", "slow")]
    result = run_pytest("\n\n\n".join(["import warnings\nimport pytest", *tests]), tmp_path)
    failed = {line.split("::")[1].split()[0] for line in re.findall("FAILED .*", result.stdout)}
    assert failed == {"test_fails", "test_warns", "test_deprecated", "test_future", "test_xfail"}
    assert result.returncode == 1
    assert "5 failed, 1 passed, 1 deselected" in result.stdout  # slow tests are left out
    assert "planted user" in result.stdout


def test_pytest_refuses_unknown_marks(tmp_path):
    text = "import pytest\n\n@pytest.mark.sloow\ndef test_a():\n    assert True\n"
    assert run_pytest(text, tmp_path).returncode not in (0, 1)


def test_ci_runs_every_gate():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "\nmake test-oldest\nexec make test\n" in text
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    lines = run("make", "-n", "test").stdout.splitlines()
    for gate in ("ruff check", "ruff format --check", "bin/mypy", "-m pytest"):
        assert any(gate in line for line in lines), gate
    oldest = run("make", "-n", "test-oldest").stdout.splitlines()
    assert ".venv-oldest/bin/python -m pytest" in oldest[-1]


def make_test(folder: Path, failing: str = "") -> subprocess.CompletedProcess[str]:
    """Run `make test` with programs that only print a line, one of which fails."""
    (folder / "bin").mkdir(parents=True)
    for name in ("ruff", "mypy", "python"):
        program = folder / "bin" / name
        program.write_text(f"#!/bin/sh\necho {name} $*\nexit {int(name == failing)}\n")
        program.chmod(0o755)
    for age, stamp in enumerate((".dev", ".torch", ".venv")):
        (folder / stamp).touch()
        os.utime(folder / stamp, (2**32 - age,) * 2)  # newer than what they are made from
    return run("make", "test", f"VENV={folder}", "ARGS=-k some")


def test_pytests_closing_line_is_the_last_one_printed(tmp_path):
    result = make_test(tmp_path)
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert said[:2] == ["ruff check", "ruff format --check"]
    assert said[2:] == ["python -m pytest --numprocesses=auto --dist=worksteal -k some"]


@pytest.mark.parametrize(("gate", "said"), [("ruff", 1), ("mypy", 4), ("python", 3)])
def test_a_gate_that_fails_fails_the_whole_and_is_seen(tmp_path, gate, said):
    result = make_test(tmp_path, gate)
    assert result.returncode != 0
    lines = result.stdout.splitlines()
    assert lines[-1].startswith(gate)
    assert len(lines) == said
