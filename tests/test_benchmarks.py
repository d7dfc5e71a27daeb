"""`python -m benchmarks`: what it compares computes the same, and the page shows what it wrote."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import bound, compare, page, probe, tables, training  # noqa: E402
from benchmarks.candidates import (  # noqa: E402
    SETTINGS,
    Absent,
    Built,
    Candidate,
    candidates,
    plain,
)
from benchmarks.cases import CASES, CLIP_STEP, STEP, Case  # noqa: E402
from benchmarks.measure import Contestant, race  # noqa: E402
from benchmarks.memory import profile_step  # noqa: E402
from benchmarks.shapes import SHAPES, minilm, minilm_in_1000, numbers, split  # noqa: E402
from benchmarks.targets import PLAN, TARGETS, Target, target_rows  # noqa: E402
from benchmarks.tensors import Tensors, grouped  # noqa: E402

QUICK = compare.Options(rounds=2, compiled=False)
SMALL = {"a": (7, 5), "b": (5,), "c": (3, 4)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", lambda: dict(SMALL))
    monkeypatch.setitem(sys.modules, "transformers", None)  # takes seconds to import


# --- what is compared -----------------------------------------------------------------------------


def test_a_split_keeps_the_numbers_and_makes_as_many_tensors():
    assert numbers(minilm_in_1000()) == numbers(minilm())
    assert len(minilm_in_1000()) == 1000
    assert split({"x": (3, 2)}, 2) == {"x.0": (1, 2), "x.1": (2, 2)}
    with pytest.raises(ValueError, match="1 row"):
        split({"x": (1, 2)}, 2)


@pytest.mark.parametrize("what", [STEP, CLIP_STEP])
@pytest.mark.parametrize("algorithm", sorted(set(SETTINGS) - {"Muon"}))
def test_candidates_of_one_rule_end_at_the_same_weights(algorithm, what):
    done = compare.compare(Case("small", algorithm, what, groups=2), QUICK)
    assert done["differs"] == {}
    assert {"lamina plan", "lamina drop-in"} <= done["rows"].keys()
    assert all(len(row["rounds_ms"]) == 2 for row in done["rows"].values())


def test_a_candidate_that_computes_something_else_is_told(monkeypatch):
    wrong = Candidate(partial(plain, torch.optim.AdamW, eps=1.0))
    real = candidates("AdamW")
    monkeypatch.setattr(compare, "candidates", lambda algorithm: {**real, "wrong": wrong})
    done = compare.compare(Case("small", "AdamW"), QUICK)
    assert list(done["differs"]) == ["wrong"]
    assert "DIFFERS" in tables.case_text(done)


@pytest.mark.parametrize("kept", [False, True])
def test_every_step_gets_unclipped_gradients_new_or_kept(kept):
    tensors = Tensors(SMALL, kept=kept)
    params = tensors.params()
    tensors.give(params)
    first, before = params[0].grad, params[0].grad.clone()
    torch.nn.utils.clip_grad_norm_(params, 1e-3)
    tensors.take(params)
    tensors.give(params)
    assert torch.equal(params[0].grad, before)
    assert (params[0].grad is first) is kept


def test_groups_are_in_order_and_none_is_empty():
    params = [nn.Parameter(torch.zeros(1)) for _ in range(101)]
    groups = grouped(params, 26)
    assert len(groups) == 26 == len({group["lr"] for group in groups})
    assert all(group["params"] for group in groups)
    together = [param for group in groups for param in group["params"]]
    assert all(one is other for one, other in zip(together, params, strict=True))


def test_what_is_absent_is_named_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimi", None)
    done = compare.compare(Case("small", "SGD"), QUICK)
    assert done["absent"]["torch-optimi"] == "torch-optimi is not installed"
    assert "absent: torch-optimi is not installed" in tables.case_text(done)


def test_a_fault_of_lamina_is_not_passed_over(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr(compare, "candidates", lambda algorithm: {"lamina plan": Candidate(fail)})
    with pytest.raises(RuntimeError, match="broken"):
        compare.compare(Case("small", "SGD"), QUICK)
    monkeypatch.setattr(compare, "candidates", lambda algorithm: {"torch fused": Candidate(fail)})
    assert compare.compare(Case("small", "SGD"), QUICK)["absent"] == {
        "torch fused": "RuntimeError: broken"
    }


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(Absent, match="compiler"):
        candidates("AdamW")["torch compiled"].build(Tensors(SMALL), 1, False)


def test_a_case_of_many_groups_has_one_group_beside_it():
    done = compare.compare(Case("small", "AdamW", CLIP_STEP, groups=3, beside=1), QUICK)
    assert {"torch fused, 1 group", "lamina plan, 1 group"} <= done["rows"].keys()
    assert not tables.fastest_other(done["rows"]).startswith("lamina")


def test_the_kernels_that_an_optimizer_tells_are_in_the_row():
    class Telling:
        def kernels(self):
            return {"a": "native: fast", "b": "native: fast", "c": "foreach: sparse"}

    assert Built([], lambda: None, Telling()).kernels() == "native: fast | foreach: sparse"
    assert Built([], lambda: None, object()).kernels() is None


# --- how it is measured ---------------------------------------------------------------------------


def test_every_contestant_takes_one_turn_in_each_round_with_its_preparation():
    turns = []
    contestants = {
        name: Contestant(
            partial(turns.append, name),
            before=partial(turns.append, f"before {name}"),
            after=partial(turns.append, f"after {name}"),
        )
        for name in "ab"
    }
    times = race(contestants, rounds=4, warmup=1)
    assert [len(timing.rounds) for timing in times.values()] == [4, 4]
    for start in range(0, len(turns), 6):
        name, other = turns[start + 1], turns[start + 4]
        assert {name, other} == {"a", "b"}
        assert turns[start : start + 3] == [f"before {name}", name, f"after {name}"]
    assert len(turns) == 2 * 3 * (4 + 1)


def test_the_bandwidth_bound_reads_the_gradient_and_writes_weight_and_states():
    pytest.importorskip("numba")
    run = bound.Streams({"a": (10,), "b": (3, 7)}, states=2, chunk=4)
    run.fill()
    grads, before = (
        [each.clone() for each in run.grads],
        [[each.clone() for each in tensors] for tensors in run.kept],
    )
    run()
    assert all(map(torch.equal, run.grads, grads))
    for tensors, old in zip(run.kept, before, strict=True):
        for tensor, start, grad in zip(tensors, old, grads, strict=True):
            assert torch.equal(tensor, start + grad)
    assert len(run.kept) == 3  # the weights and two states


def test_the_bandwidth_bound_of_clipping_reads_the_gradients_once_more():
    pytest.importorskip("numba")
    run = bound.Streams({"a": (10,), "b": (3, 7)}, states=1, chunk=4, clip=True)
    run.fill()
    run()
    parts = [part for grad in run.grads for part in grad.flatten().split(4)]
    assert run.sums.tolist() == pytest.approx([float(part.sum()) for part in parts], abs=1e-5)
    assert all(map(torch.equal, run.grads, run.kept[0]))
    done = compare.compare(Case("small", "SGD", CLIP_STEP, bound=True), QUICK)
    assert tables.cases([done]).splitlines()[0].count("bound, ms") == 1
    assert bound.NAME in done["rows"]


def test_the_memory_of_a_step_is_counted():
    kept = []
    counted = profile_step(lambda: kept.append(torch.zeros(1000) + torch.ones(1000)))
    assert counted["operators"] == 3
    assert counted["tensors"] == 3
    assert counted["allocated_bytes"] == 12_000
    assert counted["peak_bytes"] == 12_000
    assert profile_step(lambda: bytearray(50_000))["python_peak_bytes"] >= 50_000


def test_a_fused_step_allocates_less_than_a_foreach_step():
    steps = {}
    for form in ("fused", "foreach"):
        tensors = Tensors(SMALL)
        built = plain(torch.optim.AdamW, tensors, 1, False, **{form: True})
        tensors.give(built.params)
        built.step()
        steps[form] = profile_step(built.step)
    assert steps["fused"]["operators"] < steps["foreach"]["operators"]
    assert steps["fused"]["peak_bytes"] < steps["foreach"]["peak_bytes"]


def test_the_first_step_is_measured_with_its_memory():
    found = probe.probe("small", "AdamW", CLIP_STEP, "lamina plan")
    assert found["first_ms"] > 0
    assert found["step"]["operators"] > 0


@pytest.mark.skipif(sys.platform == "win32", reason="the peak is not known there")
def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    code = "from benchmarks.probe import _peak_resident as peak; print(peak())"
    large = torch.ones(100_000_000)  # all of it is written, and counts in the peak of this process
    its = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).stdout)
    assert 0 < its < probe._peak_resident() - large.nbytes / 2


def test_a_process_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(probe, "_in_process", lambda *given: {"failed": "ValueError: no"})
    found = probe.probe_all(["torch fused"])
    assert found["rows"]["torch fused"]["failed"] == "ValueError: no"
    assert "ValueError: no" in tables.first_step(found)


class LinearTask:
    """What training asks of a task, with a model of two layers and a head."""

    def model(self):
        return nn.ModuleDict(
            {"layers": nn.ModuleList([nn.Linear(2, 2)] * 1), "head": nn.Linear(2, 1)}
        )

    def loss(self, model, batch):
        return model["head"](model["layers"][0](batch)).square().mean()


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setattr(training, "_task", lambda name: (LinearTask(), torch.ones(3, 2)))
    thaw = training.Thaw("layers.{depth}.*", "layers.0.bias", 1, (0, 1))
    monkeypatch.setattr(training, "THAWS", {"small": thaw})


def test_a_training_step_tells_the_share_of_the_optimizer(task):
    found = training.training_rows("small", rounds=2)
    assert list(found["rows"])[-1] == "lamina plan"
    assert all(0 < row["optimizer_share"] < 1 for row in found["rows"].values())
    assert "lamina plan" in tables.training(found)


def test_each_stage_of_a_thaw_trains_more_than_the_one_before(task):
    rows = training.thaw_rows("small", rounds=1)["rows"]
    assert [row["trainable"] for row in rows.values()] == [9, 9, 3, 7, 9]
    assert rows["head"]["state_bytes"] < rows["top 1"]["state_bytes"]
    assert rows["head"]["state_bytes"] < rows["all thawed"]["state_bytes"]


# --- targets --------------------------------------------------------------------------------------


def results(**medians):
    rows = {name: {"median_ms": value} for name, value in medians.items()}
    return [{"title": Case("small", "AdamW").title, "rows": rows}]


@pytest.mark.parametrize(
    ("mine", "verdict", "ratio"), [(2.0, "met", 0.5), (2.1, "missed", 0.525), (None, None, None)]
)
def test_a_target_is_held_against_the_fastest(mine, verdict, ratio):
    target = Target(Case("small", "AdamW"), "mine", ("slow", "quick"), 0.5)
    measured = {"slow": 9.0, "quick": 4.0, **({} if mine is None else {"mine": mine})}
    row = target.row({case["title"]: case for case in results(**measured)})
    assert row["verdict"] == (verdict or "not measured")
    assert (row["ratio"], row["fastest"]) == (ratio, "quick" if ratio else None)


def test_a_target_says_what_it_was_not_held_against():
    target = Target(Case("small", "AdamW"), "mine", ("quick", "compiled"), 0.5)
    row = target.row({case["title"]: case for case in results(quick=4.0, mine=1.0)})
    assert row["verdict"] == "met (without compiled)"


def test_every_target_is_about_a_case_that_is_run_with_these_candidates():
    by_title = {case.title: case for case in CASES}
    for target in TARGETS:
        case = by_title[target.case.title]
        assert case.quick, target
        names = {name for name, _, _ in compare._entrants(case, compare.Options())}
        names |= {bound.NAME} if case.bound else set()
        assert {target.candidate, *target.against} <= names


def test_cases_are_distinct_and_of_known_shapes():
    titles = [case.title for case in CASES]
    assert len(set(titles)) == len(titles)
    assert {case.shapes for case in CASES} <= SHAPES.keys()
    assert {case.groups for case in CASES if "MiniLM" in case.shapes} == {1, 26, 101, 1000}
    assert {case.algorithm for case in CASES} == set(SETTINGS)


# --- command and page -----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Results of the command, for one case."""
    monkeypatch.setattr(command, "CASES", (Case("small", "AdamW", CLIP_STEP, quick=True),))
    path = tmp_path / "found.json"
    given = ["benchmarks", "--quick", "--parts", "cases", "--rounds", "2", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", given)
    command.main()
    return path


def test_the_command_writes_json_and_prints_all_targets(run, capsys):
    found = json.loads(run.read_text())
    assert found["about"]["rounds"] == 2
    assert [case["title"] for case in found["cases"]] == ["small, AdamW, clip+step, groups: 1"]
    assert len(found["targets"]) == len(TARGETS) == len(target_rows(found["cases"]))


def test_the_page_shows_the_results_and_keeps_its_text(run, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    before = f"# Title\n\n{page.BEGIN}\nold\n{page.END}\n\nThe end.\n"
    (docs / "benchmarks.md").write_text(before)
    for _ in range(2):  # again: nothing piles up
        page.write(page.read(run), docs)
    text = (docs / "benchmarks.md").read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\n\nThe end.\n")
    assert "old" not in text
    assert text.count("small, AdamW, clip+step, groups: 1") == 1
    assert (docs / "benchmarks" / "steps.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((docs / "benchmarks" / "results.json").read_text()) == page.read(run)


@pytest.mark.parametrize("text", ["{", "[]", '{"about": {}}'])
def test_what_are_no_results_changes_nothing(text, tmp_path):
    path = tmp_path / "found.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"found\.json"):
        page.read(path)


def test_a_page_without_markers_is_refused():
    with pytest.raises(SystemExit, match="figures: begin"):
        page.replaced("# Title\n", "text")


def shows(text, results_file):
    """Whether a page has the tables of a file of results, or says that there is none."""
    found = page.read(results_file) if results_file.is_file() else None
    return page.replaced(text, page.figures(found)) == text


def test_the_tables_of_the_page_are_those_of_the_committed_results(run, tmp_path):
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert shows(text, ROOT / "docs" / "benchmarks" / "results.json")
    # the canary: a figure that was changed by hand
    filled = page.replaced(text, page.figures(page.read(run)))
    assert shows(filled, run)
    assert not shows(filled.replace("| 0.68 ", "| 0.67 ", 1), run)
    assert not shows(filled, tmp_path / "absent.json")


@pytest.mark.slow
def test_adafactor_and_compiled_candidates_step(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers")
    case = Case("small", "RMSprop", CLIP_STEP, compiled=True)
    done = compare.compare(case, compare.Options(rounds=2))
    assert done["differs"] == {}
    assert "torch compiled" in {**done["rows"], **done["absent"]}
    assert "Adafactor of Transformers" in compare.compare(Case("small", "AdamW"), QUICK)["rows"]


@pytest.mark.slow
def test_the_candidates_of_a_real_case_run_in_new_processes():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.probe", "10 tiny tensors", "SGD", "step", PLAN],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(done.stdout)["first_ms"] > 0


README_ROWS = [
    ("a plan that clips, AdamW, 1 group", "MiniLM, AdamW, clip+step, groups: 1"),
    ("the same, 101 groups", "MiniLM, AdamW, clip+step, groups: 101"),
    ("the same, 1,000 groups", "MiniLM in 1,000 tensors, AdamW, clip+step, groups: 1,000"),
    ("`lamina.optim.AdamW`", "MiniLM, AdamW, step, groups: 1"),
    ("a plan that does not clip, AdamW", "MiniLM, AdamW, step, groups: 1"),
    ("`lamina.optim.RMSprop`", "MiniLM, RMSprop, step, groups: 1"),
    ("`lamina.optim.LAMB`", "MiniLM, LAMB, step, groups: 1"),
]


@pytest.mark.parametrize(("called", "title"), README_ROWS)
def test_the_figures_of_the_readme_are_those_of_the_results(called, title):
    results = json.loads((ROOT / "docs/benchmarks/results.json").read_text(encoding="utf-8"))
    rows = next(case["rows"] for case in results["cases"] if case["title"] == title)
    mine = "lamina drop-in" if called.startswith("`lamina.optim") else "lamina plan"
    theirs = "torch fused"
    if "RMSprop" in title:
        theirs = "torch default"
    if "LAMB" in title:
        theirs = "pytorch_optimizer loop"
    ratio = rows[mine]["median_ms"] / rows[theirs]["median_ms"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| {re.escape(called)} \|.*\| ([\d.]+)[^|]*\|$", readme, re.MULTILINE)
    assert found is not None
    assert found[1] == f"{ratio:.2f}"
