"""The matrix of wrappers: some cells here, all of them in `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

import wrapper_matrix
from wrapper_matrix import CLIPS, SCENARIOS, WRAPPERS, Cell, every_cell, markdown, run_cells

PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "wrappers.md"
REFUSED = r"requires_grad was off when DistributedDataParallel wrapped"
#: one cell of each scenario and of each way to clip, over the wrappers that need only torch
SOME = {
    Cell("DDP", "before", "on_plateau", "trainer"): "equal",
    Cell("DDP", "before", "two phases", "no clip"): REFUSED,
    Cell("DDP", "inner", "by hand, thawed", "plan"): REFUSED,
    Cell("DDP", "wrapper", "frozen", "trainer"): "equal",
    Cell("DDP, static_graph", "inner", "top_down", "trainer"): "equal",
    Cell("DDP, static_graph", "before", "by hand, thawed", "trainer"): "equal",
    Cell("DDP, find_unused_parameters", "wrapper", "freeze", "trainer"): "equal",
    Cell("DDP, find_unused_parameters", "inner", "two phases", "plan"): "equal",
    Cell("DDP", "wrapper", "thaw", "plan"): "equal",
    Cell("FSDP2", "before", "top_down", "trainer"): "equal",
    Cell("FSDP1", "before", "thaw", "trainer"): "equal",
    Cell("FSDP1, one wrapper", "before", "freeze", "plan"): "equal",
    Cell("FSDP1, one wrapper", "inner", "thaw", "trainer"): "equal",
}


def test_some_cells_are_equal_to_one_process_or_refused(tmp_path):
    outcomes = run_cells(list(SOME), tmp_path, limit=120)
    wrong = {
        cell: outcome
        for cell, outcome in outcomes.items()
        if not (outcome == SOME[cell] or (SOME[cell] in outcome and "Error: " in outcome))
    }
    assert wrong == {}
    assert len(outcomes) == len(SOME)


def test_a_wrong_weight_and_a_foreign_error_are_faults(monkeypatch):
    right = {("thaw", "no clip"): wrapper_matrix.train(wrapper_matrix.Loop, task())}
    cell = Cell("one", "before", "thaw", "no clip")

    def outcome(train):
        monkeypatch.setitem(WRAPPERS, "one", wrapper_matrix.Wrapper(train))
        monkeypatch.setattr(wrapper_matrix, "PROCESSES", 1)
        return wrapper_matrix.outcome_of(cell, 0, right)

    def broken(_):
        raise RuntimeError("torn")

    assert outcome(lambda task: right["thaw", "no clip"]) == "equal"
    moved = {name: weight + 1e-4 for name, weight in right["thaw", "no clip"].items()}
    assert outcome(lambda task: moved) == "FAULT: differs by 1.0e-04"
    assert outcome(lambda task: {}).startswith("FAULT: the weights are")
    assert outcome(broken) == "FAULT: raised RuntimeError: ['torn']"


def task():
    return wrapper_matrix.Task("before", "thaw", "no clip")


@pytest.mark.filterwarnings("ignore::lamina.LaminaWarning")  # some cells are odd on purpose
def test_every_combination_is_a_cell():
    cells = every_cell()
    rows = sum(len(wrapper.built) for wrapper in WRAPPERS.values())
    assert len(set(cells)) == len(cells) == rows * len(SCENARIOS) * len(CLIPS)
    for scenario, clip in {(cell.scenario, cell.clip) for cell in cells}:
        wrapper_matrix.train(wrapper_matrix.Loop, wrapper_matrix.Task("before", scenario, clip))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:frozen-by-model")  # the expected run is in this process
def test_no_cell_is_at_fault_and_the_table_stands_in_the_docs(tmp_path):
    outcomes = run_cells(every_cell(), tmp_path)
    assert {cell: said for cell, said in outcomes.items() if said.startswith("FAULT")} == {}
    page = PAGE.read_text()
    assert [line for line in markdown(outcomes, {}) if line not in page] == []
