"""What a plan costs at scale: counts of collectives and of calls, and the page that tells them."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from lamina.gradients.norms import bad_counts, each_norm
from lamina.model.parameters import needs, walk
from lamina.preview.table import text
from processes import join_group, leave_group, run_processes

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks.scaling import __main__ as command  # noqa: E402
from benchmarks.scaling import collectives, local, tables  # noqa: E402

#: torch says so of what is meant here
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

QUICK = {
    2: [
        ("DDP", "7 scopes"),
        ("FSDP2", "4 scopes, rest free"),
        ("FSDP2", "LAMB"),
        ("FSDP2", "LayerAdaptiveAdam, 2 groups"),
        ("FSDP2", "Muon on 6 matrices"),
    ],
    4: [("DDP", "7 scopes"), ("FSDP2", "7 scopes"), ("FSDP2", "LARS")],
}
ALL = [(wrapper, case) for wrapper in command.WRAPPERS for case in collectives.CASES]

# ----------------------------------------------------------------------------------- collectives


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        *((ranks, cases) for ranks, cases in QUICK.items()),
        *(pytest.param(ranks, ALL, marks=pytest.mark.slow) for ranks in (2, 3, 4)),
    ],
)
def test_collectives_are_those_of_the_formulas(ranks, cases, tmp_path):
    counted = collectives.count(tmp_path, ranks, cases)
    for place, (wrapper, case) in enumerate(cases):
        formula = collectives.computed(wrapper, case, ranks)
        if ranks == 3:  # the shards of 8 rows are padded, in ways of its own by FSDP2
            formula = collectives.replace(formula, backward=None)
        for each in counted:
            assert collectives.agrees(each[place], formula)


def test_canary_a_collective_more_is_no_agreement():
    formula = collectives.computed("FSDP2", "1 scope", 2)
    calls, size = formula.step
    assert collectives.agrees(formula, formula)
    assert not collectives.agrees(collectives.replace(formula, step=(calls + 1, size)), formula)
    assert not collectives.agrees(collectives.replace(formula, step=(calls, size + 4)), formula)


#: of the last two, a process has nothing
SHAPES = ((5, 3), (4,), (2, 2), (1, 6), (0, 3))


def measure_shards(rank: int, folder: str) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    join_group(rank, folder)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    plain = [torch.randn(shape) for shape in SHAPES]
    plain[2][1, 1] = float("nan")
    shards = [distribute_tensor(each, mesh, [Shard(0)]) for each in plain]
    found = {}
    for p in (1.0, 2.0, float("inf")):
        with collectives.Collectives() as seen:
            norms = each_norm(shards, p)
        found[p] = (torch.stack(norms), seen.traffic[0])
    with collectives.Collectives() as seen:
        bad = bad_counts(shards)
    torch.save([plain, found, bad, seen.traffic[0]], Path(folder, f"{rank}.pt"))
    leave_group()


def test_norms_of_shards_are_those_of_the_whole_and_come_together(tmp_path):
    run_processes(measure_shards, tmp_path)
    for rank in range(2):
        plain, found, bad, sent = torch.load(tmp_path / f"{rank}.pt")
        for p, (norms, collectives_sent) in found.items():
            expected = torch.stack([*each_norm(plain, p)])
            torch.testing.assert_close(norms, expected, equal_nan=True)
            assert collectives_sent == 1
        assert (bad, sent) == ([0, 0, 1, 0, 0], 1)


# ------------------------------------------------------------------------------ linear in tensors


def calls_of(work):
    """How many Python functions are called."""
    count = 0

    def see(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


WORK = {
    "preview": lambda plan, model: text(plan.preview(model, steps=local.STEPS), 110),
    "build and step": lambda plan, model: step_of(plan, model),
}


def step_of(plan, model):
    optimizer = plan.build(model, steps=local.STEPS)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.release()


@pytest.mark.filterwarnings("ignore::lamina.LaminaWarning")
@pytest.mark.parametrize("work", WORK)
def test_calls_grow_as_the_tensors(work):
    sizes = (60, 120, 240)
    plan = local.PLANS["1 per tensor"]()
    WORK[work](plan, local.make_model(60))  # compiles patterns
    counts = [calls_of(partial(WORK[work], plan, local.make_model(size))) for size in sizes]
    assert local.exponent(sizes, counts) < 1.05


def test_canary_quadratic_calls_are_seen():
    def quadratic(size):
        for _ in range(size * size):
            (lambda: None)()

    sizes = (20, 40, 80)
    counts = [calls_of(partial(quadratic, size)) for size in sizes]
    assert local.exponent(sizes, counts) > 1.9


def test_modules_without_parameters_share_one_set():
    layers = [nn.Linear(2, 2) if place % 2 else nn.ReLU() for place in range(40)]
    model = nn.Sequential(*layers)
    found = needs(model, walk(model))
    assert len(found) == 41
    assert len({id(below) for _, below in found}) == 21
    shared = nn.ReLU()
    twice = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), shared), nn.Sequential(shared, nn.Linear(2, 2))
    )
    below = {id(module): names for module, names in needs(twice, walk(twice))}
    assert below[id(shared)] == {"0.0.weight", "0.0.bias", "1.1.weight", "1.1.bias"}


# --------------------------------------------------------------------------------------- the page


def tables_in(page):
    """The tables of a page, by their titles."""
    found = {}
    for part in page.split("## Tables")[1].split("\n**")[1:]:
        title, rest = part.split("**", 1)
        found[title] = [line for line in rest.splitlines() if line.startswith("|")]
    return found


def made():
    """What the command prints, with other measurements."""
    sizes = (996, 4_992)
    costs = [
        local.Cost(name, size, 2, *[1.0] * 7, memory=1, saved=1, torch_saved=1)
        for name in local.PLANS
        for size in sizes
    ]
    rows = [(collectives.computed(*case, ranks),) * 2 for ranks in (2, 4) for case in ALL]
    return {**tables.local(costs), **tables.collectives(rows), **tables.traffic()}


def unlike(page):
    """The titles of tables that are not as the command prints them."""
    there, wanted = tables_in(page), made()
    wrong = [title for title in wanted if title not in there]
    for title, lines in wanted.items():
        form = list if title.startswith("Computed") else tables.skeleton
        if title not in wrong and form(there[title]) != form(lines):
            wrong.append(title)
    return wrong + [title for title in there if title not in wanted]


def test_the_page_has_the_tables_of_the_command():
    page = (ROOT / "docs" / "explanation" / "scaling.md").read_text()
    # What the wrappers send around frozen parts is counted only.
    page = "\n".join(
        line.replace(line.split("|")[4], "  ", 1) if "half frozen" in line else line
        for line in page.splitlines()
    )
    assert unlike(page) == []
    (last,) = [title for title in tables_in(page) if title.startswith("Computed")]
    assert unlike(page.replace("808 B", "809 B")) == [last]
    assert len(unlike(page.replace("| FSDP2 |", "| FSDP |"))) == 1


def test_every_counted_number_in_the_page_is_the_computed_one():
    page = (ROOT / "docs" / "explanation" / "scaling.md").read_text()
    (title,) = [title for title in tables_in(page) if title.startswith("Counted")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables_in(page)[title][2:]]
    assert len(rows) == 2 * len(ALL)
    for row in rows:
        pairs = [(row[3], row[4]), (row[5], row[6]), (row[7], row[8])]
        assert all(counted == formula for counted, formula in pairs if formula)
