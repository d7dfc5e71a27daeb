"""Every ```python block of the README and the docs runs alone, as pasted into an empty file.

A block that downloads or takes minutes stands below a line `<!-- network -->` or `<!-- slow -->`,
and runs in `make soak`. Every link between the pages leads somewhere.
"""

import ast
import importlib
import math
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina as lm
from accelerate_state import forget_accelerate
from lamina.toy import toy_problem
from processes import end_group

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: the optimizers that have an example as the optimizer of a plan or a rule
OWN = (lm.SGD, lm.RMSprop, lm.AdamW, lm.LBFGS, lm.Muon, lm.LARS, lm.LAMB, lm.LayerAdaptiveAdam)
TRAINERS = ("peft", "transformers", "lightning.pytorch", "lightning.fabric", "accelerate")
LONGEST = 5.0  # seconds of processor time for one block
BLOCK = re.compile(
    r"(?:^<!-- (network|slow) -->\n+)?^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\]\(([^)#:\s]+)\)")


def blocks(text):
    """The code of each block, the line of the page on which it begins, and its marker."""
    return [
        (match[2], text.count("\n", 0, match.start(2)), match[1]) for match in BLOCK.finditer(text)
    ]


def run(code, page, line):
    """Run a block as a program, and say how long it took; a traceback shows the line of the page.

    The namespace is empty: a block brings its own imports and models.
    """
    tree = ast.increment_lineno(ast.parse(code), line)
    for trainer in TRAINERS:  # the first import of one takes seconds
        if f"import {trainer}" in code or f"from {trainer}" in code or f", {trainer}" in code:
            importlib.import_module(trainer)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"lightning\.")  # about workers, and of itself
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT's own
        torch.manual_seed(0)
        try:
            exec(compile(tree, str(page), "exec"), {"__name__": "__main__"})
        finally:
            forget_accelerate()
    return time.process_time() - began


@pytest.mark.parametrize(
    ("page", "code", "line", "marker"),
    [
        pytest.param(
            page,
            code,
            line,
            marker,
            id=f"{page.relative_to(ROOT)}:{line}",
            marks=[getattr(pytest.mark, marker)] if marker else [],
        )
        for page in PAGES
        for code, line, marker in blocks(page.read_text(encoding="utf-8"))
    ],
)
def test_block_runs(page, code, line, marker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block may write files
    monkeypatch.setattr(torch.distributed, "destroy_process_group", end_group)
    longest = math.inf if marker else LONGEST
    took = run(code, page, line)
    if took >= longest:  # the first one may have compiled loops, which are on disk from then on
        took = run(code, page, line)
    assert took < longest, f"the block took {took:.1f} s to run"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_optimizer_has_a_page_and_every_page_its_picture():
    folder = ROOT / "docs" / "reference" / "optimizers"
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.md"))
    missing = [each.__name__ for each in OWN if f"lm.{each.__name__}, lr=" not in text]
    assert missing == []
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == set(re.findall(r"\]\(([\w-]+\.png)\)", text))
    assert all((folder / name).stat().st_size < 60_000 for name in pictures)


def test_canary_a_block_with_an_error_is_reported():
    page = "# A page\n\n```python\nplan = {}\nplan.biuld(1)\n```\n"
    [(code, line, _)] = blocks(page)
    with pytest.raises(AttributeError, match="biuld") as report:
        run(code, "page.md", line)
    last = report.traceback[-1]
    assert (str(last.path), last.lineno + 1) == ("page.md", 5)


def test_canary_a_warning_is_an_error():
    with pytest.raises(UserWarning, match="careful"):
        run("import warnings\nwarnings.warn('careful')\n", "page.md", 0)


def test_canary_a_slow_block_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "LONGEST", 0.0)
    with pytest.raises(AssertionError, match="run"):
        test_block_runs("page.md", "sum(range(1000))", 7, None, tmp_path, monkeypatch)


def test_canary_blocks_are_found():
    assert len(blocks((ROOT / "README.md").read_text(encoding="utf-8"))) >= 1
    assert blocks("```\nnot python\n```\n") == []
    assert blocks("a\n```python\nx = 1\n```\nb\n```python\ny = 2\n```\n") == [
        ("x = 1\n", 2, None),
        ("y = 2\n", 6, None),
    ]
    assert blocks("<!-- slow -->\n\n```python\nx = 1\n```\n") == [("x = 1\n", 3, "slow")]


def test_canary_a_block_that_needs_another_one_is_reported():
    run("x = 1", "page.md", 0)
    with pytest.raises(NameError, match="'x'"):
        run("print(x)", "page.md", 0)


def test_the_toy_problem_is_the_same_each_time_and_draws_nothing_from_torch():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model, loader, loss = toy_problem(layers=2)
    assert torch.equal(torch.get_rng_state(), before)
    again = toy_problem(layers=2)
    assert loss(model, loader[0]) == loss(again.model, again.loader[0])
    assert len(model.encoder.layer) == 2


def difference(first, second):
    """The largest difference of a weight between the models of two programs."""
    models = []
    for program in (first, second):
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(program, names)
        models.append(names["model"])
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    return max((one - other).abs().max().item() for one, other in pairs)


def test_the_program_by_hand_in_the_readme_trains_the_same_weights():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (plan, _, _), (by_hand, _, _) = blocks(page)
    assert difference(plan, by_hand) < 1e-6
    assert difference(plan, by_hand.replace("4 * (4 - depth)", "4 * (3 - depth)")) > 1e-5


@pytest.mark.slow  # a process for each command
def test_the_commands_of_the_readme_work_one_after_the_other(tmp_path):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = page.partition("## At the command line")[2].split("```")[1].strip().splitlines()
    assert len(commands) >= 8
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    for command in commands:
        words = shlex.split(command, comments=True)
        assert words[0] == "lamina"
        done = subprocess.run(
            [sys.executable, "-m", "lamina", *words[1:]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": source},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
