"""The shape of the source: each gate is applied to the repository and proven by a canary."""

import ast
import importlib
import types
from pathlib import Path

import pytest

import gates

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lamina"
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SOURCES = sorted(p for p in PACKAGE.rglob("*") if p.suffix in {".py", ".c", ".cpp", ".cu", ".h"})
MAX_FUNCTION = 60

# In the order data visits them: a module may import what stands before it, never what comes after.
LAYERS = [
    "errors",
    "toy",
    "_util",
    "files",
    "schedules",
    "model",
    "algorithms",
    "compiled",
    "gradients",
    "kernels",
    "optim",
    "plan",
    "resolve",
    "guests",
    "runtime",
    "state",
    "record",
    "optimizer",
    "checkpoint",
    "preview",
    "reuse",
    "range_test",
    "report_page",
    "recipes",
    "starter",
    "integrations",
    "watch",
    "training",
    "cli",
    "__init__",
    "__main__",
]

# (module, layer above it): the reason. Holds inside functions and for the type checker only.
LAZY_UPWARD = {
    ("lamina.plan.plan", "preview"): "Plan.preview",
    ("lamina.plan.plan", "optimizer"): "Plan.build",
    ("lamina.preview.preview", "report_page"): "Preview.html",
}


def tree_of(**files: str) -> dict[str, ast.Module]:
    """A small package: `optim__sgd="..."` is the file `lamina/optim/sgd.py`."""
    names = {name: name if name == "__init__" else name.replace("__", ".") for name in files}
    names |= {n: f"{n.removesuffix('____init')}.__init__" for n in files if n.endswith("____init")}
    return {f"lamina.{names[name]}": ast.parse(text) for name, text in files.items()}


# ------------------------------------------------------------------------------ import direction


def test_every_module_has_a_layer():
    assert gates.unlisted_modules(gates.read_tree(PACKAGE), LAYERS) == []


def undescribed(page: str) -> list[str]:
    """The modules that the table of the architecture page does not name."""
    listed = (name for name in LAYERS if not name.startswith("__"))
    return [name for name in listed if f"`{name}.py`" not in page and f"`{name}/`" not in page]


def test_the_architecture_page_names_every_module():
    page = (PACKAGE.parents[1] / "docs" / "explanation" / "architecture.md").read_text()
    assert undescribed(page) == []
    assert undescribed(page.replace("`state/`", "")) == ["state"]


def test_imports_go_down():
    assert gates.upward_imports(gates.read_tree(PACKAGE), LAYERS, LAZY_UPWARD) == []


def test_no_allowance_is_left_over():
    assert gates.unused_allowances(gates.read_tree(PACKAGE), LAZY_UPWARD) == []


def test_canary_unlisted_module():
    assert gates.unlisted_modules(tree_of(errors="", helpers__text=""), LAYERS) == ["helpers"]


@pytest.mark.parametrize(
    "line",
    [
        "from lamina.plan import Plan",
        "from lamina import plan",
        "from lamina import Plan",
        "import lamina",
        "import lamina.plan as p",
        "from .. import plan",
        "from ..plan import Plan",
        "if True:\n    from lamina.plan import Plan",
        "class A:\n    from lamina.plan import Plan",
        "def f():\n    from lamina.plan import Plan",
        "if TYPE_CHECKING:\n    from lamina.plan import Plan",
    ],
)
def test_canary_upward_import(line):
    source = tree_of(__init__="", plan="", schedules____init="", schedules__phases=line)
    assert len(gates.upward_imports(source, LAYERS, {})) == 1


@pytest.mark.parametrize("line", ["from ..time import Time", "from . import warm", "import torch"])
def test_downward_and_sideways_imports_pass(line):
    source = tree_of(time="", schedules____init="", schedules__warm="", schedules__phases=line)
    assert gates.upward_imports(source, LAYERS, {}) == []


def test_canary_allowance_covers_lazy_imports_only():
    allowed = {("lamina.errors", "plan"): "a reason"}
    eager = tree_of(plan="", errors="from lamina import plan")
    for head in ("def f():", "if TYPE_CHECKING:"):
        lazy = tree_of(plan="", errors=f"{head}\n    from lamina import plan")
        assert gates.upward_imports(lazy, LAYERS, allowed) == []
        assert gates.unused_allowances(lazy, allowed) == []
    assert len(gates.upward_imports(eager, LAYERS, allowed)) == 1
    assert gates.unused_allowances(eager, allowed) == ["lamina.errors -> plan"]


def test_no_import_cycles():
    assert gates.import_cycles(gates.read_tree(PACKAGE)) == []


# (module, module imported): the reason. A plan offers what is made of it further down.
IN_CYCLES = {
    ("lamina.plan.plan", "lamina.optimizer.optimizer"): "Plan.build",
    ("lamina.plan.plan", "lamina.preview.__init__"): "Plan.preview",
}


def test_no_cycles_of_imports_in_functions_and_for_types():
    source = gates.read_tree(PACKAGE)
    assert gates.import_groups(source, IN_CYCLES) == []
    assert gates.unused_exceptions(source, IN_CYCLES) == []
    assert len(IN_CYCLES) <= 2


def test_canary_cycles_of_lazy_imports():
    lazy = tree_of(errors="def f():\n    from lamina.plan import Plan", plan="import lamina.errors")
    assert gates.import_groups(lazy, {}) == [["lamina.errors", "lamina.plan"]]
    allowed = {("lamina.errors", "lamina.plan"): "a reason"}
    assert gates.import_groups(lazy, allowed) == []
    assert gates.unused_exceptions(lazy, allowed) == []
    assert gates.unused_exceptions(tree_of(errors="", plan=""), allowed) != []


def test_canary_import_cycle():
    source = tree_of(
        schedules____init="from .phases import Phase",
        schedules__phases="from .warm import Warm",
        schedules__warm="from lamina.schedules import Phase",
    )
    (cycle,) = gates.import_cycles(source)
    assert cycle.split(" -> ")[0] == cycle.split(" -> ")[-1]
    assert "lamina.schedules.warm" in cycle


# ------------------------------------------------------------------------------------- the door


def test_door_is_sorted_and_complete():
    assert gates.door_violations(ast.parse((PACKAGE / "__init__.py").read_text())) == []


def test_door_resolves():
    assert gates.unresolved_names(importlib.import_module("lamina")) == []


def test_door_is_documented():
    assert gates.undocumented_names(importlib.import_module("lamina")) == []


@pytest.mark.parametrize(
    ("text", "violation"),
    [
        ("a = 1", "no __all__"),
        ("from x import a, b\n__all__ = ['a']", "b is bound but not in __all__"),
        ("def f(): ...\n__all__ = []", "f is bound but not in __all__"),
        ("import os.path\n__all__ = []", "os is bound but not in __all__"),
        ("a, b = 1, 2\n__all__ = ['b', 'a']", "__all__ is not sorted, or holds a name twice"),
        ("a = 1\n__all__ = ['a', 'a']", "__all__ is not sorted, or holds a name twice"),
        ("from x import *\n__all__ = []", "import * hides what the door shows"),
    ],
)
def test_canary_door(text, violation):
    assert violation in gates.door_violations(ast.parse(text))


def test_a_good_door_passes():
    text = "from __future__ import annotations\nfrom x import _c, a\nB = 1\n__all__ = ['B', 'a']"
    assert gates.door_violations(ast.parse(text)) == []


def test_canary_unresolved_name():
    module = types.ModuleType("door")
    module.__all__ = ["missing"]  # type: ignore[attr-defined]
    assert gates.unresolved_names(module) == ["missing"]


def test_canary_undocumented_name():
    class Base:
        """A base."""

        def told(self):
            """Told here, for all that derive."""

    class Derived(Base):
        """Says what it is."""

        def told(self): ...

        def untold(self): ...

        @property
        def silent(self): ...

    class Mute: ...

    module = types.ModuleType("door")
    vars(module).update(__all__=["Base", "Derived", "Mute", "f"], f=lambda: 0)
    vars(module).update(Base=Base, Derived=Derived, Mute=Mute)
    found = gates.undocumented_names(module)
    assert found == ["Derived.untold", "Derived.silent", "Mute", "f"]


# ---------------------------------------------------------------------------------------- sizes


def test_functions_are_short():
    python = [path for path in SOURCES if path.suffix == ".py"]
    gate = lambda text: gates.long_functions(ast.parse(text), MAX_FUNCTION)  # noqa: E731
    assert gates.each_file(python, gate) == []


def test_no_conditional_expression_is_inside_another():
    python = [path for path in SOURCES if path.suffix == ".py"]
    assert gates.each_file(python, lambda text: gates.nested_ternaries(ast.parse(text))) == []


def test_canary_nested_ternaries():
    assert len(gates.nested_ternaries(ast.parse("x = 1 if a else 2 if b else 3"))) == 1
    assert gates.nested_ternaries(ast.parse("x = 1 if a else 2\ny = 3 if b else 4")) == []


def test_canary_sizes():
    body = "    x = 1\n"
    short, long = (f"class A:\n  def f():\n{body * n}" for n in (MAX_FUNCTION - 1, MAX_FUNCTION))
    assert gates.long_functions(ast.parse(short), MAX_FUNCTION) == []
    assert len(gates.long_functions(ast.parse(long), MAX_FUNCTION)) == 1


# --------------------------------------------------------------------------------------- safety


def test_nothing_runs_text_or_unpickles():
    python = [path for path in SOURCES if path.suffix == ".py"]
    assert gates.each_file(python, lambda text: gates.unsafe_calls(ast.parse(text))) == []


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "def f():\n    exec('x = 1')",
        "import builtins\nbuiltins.eval('1')",
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import loads\nloads(b)",
        "import torch\ntorch.load(f)",
        "import torch as t\nt.load(f, weights_only=False)",
        "from torch import load\nload(f)",
    ],
)
def test_canary_unsafe_call(text):
    assert len(gates.unsafe_calls(ast.parse(text))) == 1


@pytest.mark.parametrize(
    "text",
    ["model.eval()", "torch.load(f, weights_only=True)", "tomllib.load(f)", "import pickle"],
)
def test_safe_calls_pass(text):
    assert gates.unsafe_calls(ast.parse(text)) == []


# ---------------------------------------------------------------------------------------- tests


def test_every_test_asserts():
    gate = lambda text: gates.tests_without_assertion(ast.parse(text))  # noqa: E731
    assert gates.each_file(TESTS, gate) == []


@pytest.mark.parametrize(
    "body", ["a == b", "check(a)", "print('assert')", "np.allclose(a, b)", "checks.run(a)"]
)
def test_canary_test_without_assertion(body):
    text = f"class TestA:\n    def test_a(self):\n        {body}"
    assert gates.tests_without_assertion(ast.parse(text)) == ["test_a:2"]


@pytest.mark.parametrize(
    "body",
    [
        "assert a == b",
        "with pytest.raises(ValueError): f()",
        "torch.testing.assert_close(a, b)",
        "check_matches(a, b)",
    ],
)
def test_asserting_tests_pass(body):
    assert gates.tests_without_assertion(ast.parse(f"def test_a():\n    {body}")) == []
