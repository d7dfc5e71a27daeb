"""Measure how the source is built: layout, import cycles, complexity, density, prose, one step.

python -m benchmarks.house                    # the working tree
python -m benchmarks.house 9949762 HEAD       # one column for each git revision
python -m benchmarks.house --list complex     # the functions, cycles or files behind a number
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))  # the reader of imports is the one of the gates

import gates  # noqa: E402

#: first words that make a docstring's summary an imperative sentence
VERBS = frozenset(
    """
    accept add adjust adopt advance allocate announce answer append apply approximate ask assert
    assign attach average begin bind block bring broadcast build bundle cache calculate call cancel
    capture carry cast change check choose claim clamp clean clear clip clone close collect combine
    compare compile compute concatenate configure connect construct continue convert copy correct
    count cover create cut deal decay decide declare decode define delete derive describe detach
    detect determine disable discard display divide do download draw drop dump emit enable encode
    end enforce ensure enter escape estimate evaluate exchange execute exit expand explain export
    express extend extract fail feed fetch fill filter find finish fit fix flatten flush follow
    forbid forget format forward free freeze gather generate get give go group guard guess handle
    hash help hide hold hook ignore import include increment indent infer inform inherit init
    initialize insert inspect install invert issue iterate join judge keep label lay lead leave lend
    let limit link list listen load locate lock log look lower make manage map mark match
    materialize measure merge minimize mirror move multiply name normalize note notice notify number
    observe offer open order pack pad parse pass patch pause perform permit pick place plan plot
    point pop predict prepare preserve prevent print process produce project propagate propose prove
    provide prune publish pull push put quote raise reach read rebuild receive record recover
    redistribute reduce refer reformat refuse register reject release reload remember remove rename
    render repeat replace replay report represent request require reset reshape resolve respect
    restore resume retrieve return revert rewrite roll round run sample save scale scan schedule
    search select send separate serialize serve set settle share shift show shorten shrink shut sign
    simulate skip solve sort spawn spell split start state step stop store stretch strip subtract
    suggest sum summarize support suspend swap switch synchronize take tell terminate test thaw tie
    toggle trace track train transfer transform translate traverse treat trigger trim truncate try
    turn undo unfreeze unlock unpack unregister untie unwrap update upgrade use validate verify
    visit wait walk warn watch widen wrap write yield zero
    """.split()  # noqa: SIM905 - forty lines of quotes would hide the words
)
RIDDLES = frozenset({"what", "whether", "where"})

#: A question that a maintainer asks, and the definitions that one has to read for the answer: names
#: of functions and classes, each followed by the names that it had before. Who searches for a name
#: that two files define opens both, so both are counted.
QUESTIONS: Mapping[str, Sequence[str]] = {
    "Where does thawing switch requires_grad?": (
        "Freezer.follow",
        "set_requires_grad",
        "FlagKeeper.keeps",
    ),
    "Where is the lr of a step computed?": ("Values._lr", "Setting.value product"),
    "Where is a gradient clipped to a norm?": (
        "operate",
        "ClipNorm.run",
        "ScopeGradients.multiply Work.multiply",
    ),
    "What happens to a gradient that is not finite?": (
        "check_finite",
        "PlanSteps._skip Optimizer._skip",
    ),
    "Which saved state goes to which parameter?": ("match", "prepare"),
    "What must a saved state be to be read?": ("Saved", "restore_history lived_of"),
    "Which kernel updates a group?": ("choose",),
    "Where is a value that something else wrote noticed?": ("refuse_foreign_writes",),
    "How does an override change a value?": (
        "Optimizer.override Steerable.override",
        "check_override",
        "Values._override",
    ),
    "What is the update of AdamW?": ("AdamRule.update",),
    "Which values may an argument of Rule have?": ("check_settings",),
    "In which order does step() act?": (
        "Optimizer.step Engine.step",
        "Optimizer.step PlanSteps._step Optimizer._step",
    ),
}

#: the plans whose step is traced
PLANS = {
    "a plan of one line": "lm.Plan(lm.AdamW, lr=1e-3)",
    "a plan with a schedule, clipping, two rules": (
        "lm.Plan(lm.AdamW, lr=1e-3, schedule=lm.warmup(2) >> lm.cosine(to=0.1), clip_norm=1.0, "
        "rules=[lm.Rule('0.*', thaw=3), lm.Rule('4.*', lr=1e-2)])"
    ),
}
STEP = """
import json, sys
from pathlib import Path
import torch
from torch import nn
import lamina as lm

torch.manual_seed(0)
root = str(Path(lm.__file__).parent)
calls = []

def note(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(root) and code.co_name[0] != "<":
        calls.append((code.co_filename[len(root) + 1:], code.co_qualname))

def trace(plan):
    calls.clear()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = plan.build(model, steps=20)
    for step in range(9):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        if step == 8:
            sys.setprofile(note)
        optimizer.step()
        sys.setprofile(None)
    return list(calls)

print(json.dumps([trace(eval(plan)) for plan in sys.argv[1:]]))
"""


# -------------------------------------------------------------------------------- reading a tree


@dataclass
class Source:
    """The package of one revision, read once."""

    root: Path  #: of the repository
    files: dict[Path, str] = field(default_factory=dict)
    trees: dict[Path, ast.Module] = field(default_factory=dict)

    @property
    def package(self) -> Path:
        return self.root / "src" / "lamina"

    def __post_init__(self) -> None:
        for path in sorted(self.package.rglob("*.py")):
            self.files[path] = path.read_text(encoding="utf-8")
            self.trees[path] = ast.parse(self.files[path])

    def name(self, path: Path) -> str:
        return path.relative_to(self.package).as_posix()

    def functions(self) -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for path, tree in self.trees.items():
            for function in gates.functions(tree):
                yield path, function


def extract(revision: str, folder: Path) -> Path:
    """Unpack a revision of the repository into the folder."""
    done = subprocess.run(
        ["git", "archive", revision, "--", "."], cwd=ROOT, capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{revision}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def literal(root: Path, name: str, otherwise: Any) -> Any:
    """Return what the architecture test of that revision says, such as `LAYERS`."""
    path = root / "tests" / "test_architecture.py"
    body = ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else []
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    return otherwise


# --------------------------------------------------------------------------------------- numbers


def code_lines(text: str, tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that hold code: no blanks, comments or docstrings."""
    skipped = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            lines -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return lines


def comments(text: str) -> int:
    """Count the lines with a comment, those for tools left out."""
    tools = ("# noqa", "# type:", "# pragma", "# fmt", "# isort")
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(t.type == tokenize.COMMENT and not t.string.startswith(tools) for t in found)


BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.Assert)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def complexity(function: ast.AST) -> int:
    """Return the cyclomatic complexity, conditions within expressions counted (as radon does)."""
    total = 1
    for node in ast.walk(function):
        total += isinstance(node, BRANCHES)
        if isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            total += 1 + len(node.ifs)
        elif isinstance(node, ast.Match):
            total += len(node.cases)
        elif isinstance(node, ast.For | ast.While | ast.Try):
            total += bool(node.orelse)
    return total


def statement_complexity(function: ast.AST) -> int:
    """Return the cyclomatic complexity of the statements alone, as ruff's C901 counts it."""
    total = 1
    for node in ast.walk(function):
        total += isinstance(node, ast.If | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node is not function:
            total += 1
        elif isinstance(node, ast.Match):
            last = node.cases[-1]
            total += len(node.cases) - (isinstance(last.pattern, ast.MatchAs) and not last.guard)
        elif isinstance(node, ast.Try):
            total += bool(node.orelse)
    return total


def warm_steps(root: Path) -> dict[str, list[tuple[str, str]]]:
    """Return (file, function) of each call into the package in one warm step, for each plan."""
    done = subprocess.run(
        [sys.executable, "-c", STEP, *PLANS.values()],
        env={**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"The step of {root} could not be traced.\n{done.stderr}")
    traced = json.loads(done.stdout.splitlines()[-1])
    return {
        plan: [tuple(call) for call in calls] for plan, calls in zip(PLANS, traced, strict=True)
    }


def definitions(source: Source) -> dict[str, set[str]]:
    """Return the files that define each name: `function`, `Class`, `Class.method`."""
    found: dict[str, set[str]] = {}

    def note(name: str, path: Path) -> None:
        found.setdefault(name, set()).add(source.name(path))

    for path, tree in source.trees.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                note(node.name, path)
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        note(f"{node.name}.{method.name}", path)
    return found


def answers(
    source: Source, questions: Mapping[str, Sequence[str]]
) -> tuple[dict[str, set[str]], list[str]]:
    """Return the files that answer each question, and the names that are defined nowhere."""
    known = definitions(source)
    files: dict[str, set[str]] = {}
    missing: list[str] = []
    for question, names in questions.items():
        files[question] = set()
        for spelled in names:
            now = next((name for name in spelled.split() if name in known), None)
            if now is None:
                missing.append(f"{question}: {spelled}")
            else:
                files[question] |= known[now]
    return files, missing


# ----------------------------------------------------------------------------------------- table


@dataclass
class Measured:
    """The rows of the table for one tree, and what lies behind some of them."""

    rows: dict[str, str] = field(default_factory=dict)
    behind: dict[str, list[str]] = field(default_factory=dict)


def measure(root: Path, trace: bool = True) -> Measured:
    """Measure the package below `root/src/lamina`."""
    source = Source(root)
    found = Measured()
    _layout(source, found)
    _functions(source, found)
    _density(source, found)
    _prose(source, found)
    files, missing = answers(source, QUESTIONS)
    average = statistics.mean(map(len, files.values()))
    found.rows["files opened for an answer, average / most"] = (
        f"{average:.2f} / {max(map(len, files.values()))}"
    )
    found.behind["questions"] = [f"{q} {', '.join(sorted(its))}" for q, its in files.items()]
    found.behind["missing"] = missing
    if trace:
        for plan, calls in warm_steps(root).items():
            changes = sum(a != b for (a, _), (b, _) in pairwise(calls))
            names = {name for name, _ in calls}
            found.rows[f"one warm step(), {plan}: functions / files / changes of file"] = (
                f"{len(set(calls))} / {len(names)} / {changes}"
            )
            found.behind[f"step, {plan}"] = [f"{name}: {function}" for name, function in calls]
    return found


def _layout(source: Source, found: Measured) -> None:
    flat = [path for path in source.files if path.parent == source.package]
    own = [path.name for path in flat if not path.name.startswith("__")]
    found.rows["modules flat in the root folder"] = str(len(own))
    tree = gates.read_tree(source.package)
    allowed = literal(source.root, "IN_CYCLES", {})
    cycles = gates.import_groups(tree, {})
    found.rows["import cycles, lazy imports counted (files in each)"] = _sizes(cycles)
    left = gates.import_groups(tree, allowed)
    found.rows["the same without the imports that the architecture test allows"] = _sizes(left)
    found.behind["cycles"] = [" ".join(group) for group in cycles]
    upward = gates.upward_imports(tree, literal(source.root, "LAYERS", []), {})
    edges = {(text.split(":")[0], text.split(" imports ")[1]) for text in upward}
    found.rows["imports against the direction of the layers (module to module)"] = str(len(edges))
    found.behind["upward"] = upward


def _sizes(groups: Sequence[Sequence[str]]) -> str:
    sizes = ", ".join(str(len(group)) for group in groups)
    return f"{len(groups)} ({sizes})" if groups else "0"


def _functions(source: Source, found: Measured) -> None:
    functions = list(source.functions())
    sizes = sorted((f.end_lineno or 0) - f.lineno + 1 for _, f in functions)
    ninetieth = sizes[int(0.9 * len(sizes))]
    found.rows["function length, median / 90 %"] = f"{statistics.median(sizes):.0f} / {ninetieth}"
    for label, count in (("statements", statement_complexity), ("expressions too", complexity)):
        rows = [(count(f), f"{source.name(path)}:{f.lineno} {f.name}") for path, f in functions]
        found.rows[f"functions of cyclomatic complexity > 10 / > 12, {label}"] = (
            f"{sum(n > 10 for n, _ in rows)} / {sum(n > 12 for n, _ in rows)}"
        )
        rows = sorted(((n, name) for n, name in rows if n > 10), reverse=True)
        found.behind[f"complex, {label}"] = [f"{n} {name}" for n, name in rows]


def _density(source: Source, found: Measured) -> None:
    code = {path: len(code_lines(text, source.trees[path])) for path, text in source.files.items()}
    lines = {path: len(text.splitlines()) for path, text in source.files.items()}
    total = sum(code.values())
    nodes = [node for tree in source.trees.values() for node in ast.walk(tree)]
    syntax = sum(isinstance(node, ast.stmt | ast.expr) for node in nodes)
    ternaries = sum(isinstance(node, ast.IfExp) for node in nodes)
    comprehensions = sum(isinstance(node, COMPREHENSIONS) for node in nodes)
    found.rows["syntax nodes per code line"] = f"{syntax / total:.1f}"
    found.rows["ternaries / comprehensions per 1,000 code lines"] = (
        f"{1000 * ternaries / total:.0f} / {1000 * comprehensions / total:.0f}"
    )
    found.rows["comments per code line"] = (
        f"{sum(map(comments, source.files.values())) / total:.3f}"
    )
    own = [path for path in source.files if "tasks" not in path.relative_to(source.package).parts]
    found.rows["code lines, with / without tasks/"] = f"{total:,} / {sum(code[p] for p in own):,}"
    found.rows["all lines, with / without tasks/"] = (
        f"{sum(lines.values()):,} / {sum(lines[p] for p in own):,}"
    )


def _prose(source: Source, found: Measured) -> None:
    texts = [ast.get_docstring(function) for _, function in source.functions()]
    first = [text.split()[0].strip(".,:;`*'\"").lower() for text in texts if text]
    verbs, riddles = (sum(word in words for word in first) for words in (VERBS, RIDDLES))
    found.rows["function docstrings that begin with a verb / with What, Whether, Where"] = (
        f"{100 * verbs / len(first):.0f} % / {100 * riddles / len(first):.1f} %"
    )
    other = Counter(word for word in first if word not in VERBS)
    found.behind["words"] = [f"{count} {word}" for word, count in other.most_common()]


def main() -> None:
    """Print the table."""
    arguments = parse()
    columns: dict[str, Measured] = {}
    for revision in arguments.revisions or ["."]:
        with tempfile.TemporaryDirectory() as folder:
            root = ROOT if revision == "." else extract(revision, Path(folder))
            columns[revision] = measure(root, trace=not arguments.no_trace)
    if arguments.list:
        for revision, found in columns.items():
            for name in [name for name in found.behind if name.startswith(arguments.list)]:
                print(f"{revision}, {name}:", *found.behind[name], sep="\n  ")
        return
    print("| |", " | ".join("working tree" if r == "." else r for r in columns), "|")
    print("|" + "---|" * (1 + len(columns)))
    for row in next(iter(columns.values())).rows:
        print(f"| {row} |", " | ".join(found.rows[row] for found in columns.values()), "|")
    for revision, found in columns.items():
        for name in found.behind["missing"]:
            print(
                f"{revision}: no such definition, so that the answer counts too few files: {name}"
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.house",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("revisions", nargs="*", help="git revisions; . is the working tree")
    parser.add_argument("--no-trace", action="store_true", help="import and run nothing")
    parser.add_argument(
        "--list",
        metavar="WHAT",
        help="what lies behind a number: cycles, upward, complex, words, questions, missing, step",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
