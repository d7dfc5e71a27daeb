"""Third-party optimizers in a plan: which run, which go on from a save, and why others are refused.

`python -m benchmarks.guests` prints the table as markdown.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import lamina as lm

Optimizer = type[torch.optim.Optimizer]
#: steps before the save, and in all; the late part thaws after the save
HALF, STEPS = 3, 6
LATE = 4
#: the part that is frozen at first, in the check of a late thaw
PART = "2.*"


@dataclass(frozen=True)
class Case:
    """An optimizer class as it is tried: settings, and rules that it cannot do without."""

    optimizer: Optimizer
    settings: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[lm.Rule, ...] = ()
    graph: bool = False
    only_matrices: bool = False

    @property
    def name(self) -> str:
        return self.optimizer.__name__

    def plan(self, *rules: lm.Rule) -> lm.Plan:
        return lm.Plan(self.optimizer, **self.settings, rules=[*self.rules, *rules])


@dataclass(frozen=True)
class Outcome:
    """What came of one class: `refused` is why it does not run, or ""."""

    name: str
    settings: str
    refused: str = ""
    by_hand: str = ""
    resumes: str = ""
    late: str = ""

    @property
    def right(self) -> bool:
        """Whether it runs as by hand, and goes on from a save with the same bits."""
        return not self.refused and {self.by_hand, self.resumes, self.late} == {"yes"}


def network(only_matrices: bool = False) -> nn.Sequential:
    """A small network with parameters of one, two and four dimensions."""
    torch.manual_seed(0)
    if only_matrices:
        layers: list[nn.Module] = [nn.Flatten(), nn.Identity(), nn.Linear(36, 8, bias=False)]
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 36, bias=False), layers[2])
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(convolution, nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3))


def train(model: nn.Module, optimizer: Any, steps: range, graph: bool = False) -> None:
    """Take some steps, the same whenever their numbers are."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(8, 1, 6, 6, generator=generator)
        torch.manual_seed(step)  # for optimizers that draw numbers
        (model(batch) - 0.3).square().mean().backward(create_graph=graph)
        optimizer.step()
        optimizer.zero_grad()


def written(state: Any) -> Any:
    """A state as a file gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have the same weights, bit for bit."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def conform(case: Case) -> Outcome:
    """Run one class by hand and in a plan, whole and in two halves, and with a late part."""
    settings = ", ".join([*(f"{k}={v}" for k, v in case.settings.items()), *map(str, case.rules)])
    checks = (runs_as_by_hand, resumes, resumes_late)
    # Some compile their step, which takes minutes for all of a package and changes no result here.
    eager = torch.compiler.set_stance("force_eager")
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), eager:
        warnings.simplefilter("ignore")
        try:
            found = ["yes" if check(case) else "no" for check in checks]
        except lm.LaminaError as error:
            return Outcome(case.name, settings, refused=" ".join(str(error).split()))
        except Exception as error:
            return Outcome(case.name, settings, refused=_failed(case, error))
    return Outcome(case.name, settings, "", *found)


def _failed(case: Case, error: Exception) -> str:
    """Why a class failed in a step, and whether it does so without a plan too."""
    text = f"{type(error).__name__}: {error}"
    model = network(case.only_matrices)
    try:
        train(model, started(case.optimizer(model.parameters(), **case.settings)), range(STEPS))
    except Exception:
        return f"fails in its step, without a plan too ({text})"
    return f"fails in its step ({text})"


def started(optimizer: Any) -> Any:
    """An optimizer in training mode, if it has modes."""
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    return optimizer


def whole(case: Case, *rules: lm.Rule) -> nn.Module:
    """The network after all steps of a plan."""
    model = network(case.only_matrices)
    optimizer = started(case.plan(*rules).build(model, steps=STEPS))
    train(model, optimizer, range(STEPS), case.graph)
    return model


def runs_as_by_hand(case: Case) -> bool:
    """Whether a plan does what the class does alone, over the groups of the plan."""
    planned, alone = whole(case), network(case.only_matrices)
    groups = case.plan().build(network(case.only_matrices), steps=STEPS).param_groups
    named = dict(alone.named_parameters())
    known = inspect.signature(case.optimizer).parameters
    own = [key for key in case.settings if key not in known]
    if case.rules:  # groups of several kinds, each with all that the plan says of it
        own += [key for key in known if key not in (*own, "params")]
    given = [
        {
            "params": [named[name] for name in group["param_names"]],
            **{key: group[key] for key in own if key in group},
        }
        for group in groups
    ]
    common = {key: value for key, value in case.settings.items() if key in known}
    # By hand from the same random numbers: some draw masks when they are built.
    torch.manual_seed(0)
    theirs = started(case.optimizer(given, **common))
    train(alone, theirs, range(STEPS), case.graph)
    return equal(planned, alone)


def halves(case: Case, *rules: lm.Rule) -> nn.Module:
    """The network after a run that is saved half way and goes on in a fresh build."""
    plan, model = case.plan(*rules), network(case.only_matrices)
    optimizer = started(plan.build(model, steps=STEPS))
    train(model, optimizer, range(HALF), case.graph)
    saved = written({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(HALF, HALF + 1), case.graph)  # which the save must not feel
    again = network(case.only_matrices)
    again.load_state_dict(saved["model"])
    optimizer = started(plan.build(again, steps=STEPS, resume=saved["optimizer"]))
    train(again, optimizer, range(HALF, STEPS), case.graph)
    return again


def resumes(case: Case) -> bool:
    """Whether two halves are one whole."""
    return equal(whole(case), halves(case))


def resumes_late(case: Case) -> bool:
    """The same with a part that thaws after the save."""
    rule = lm.Rule(PART, thaw=LATE)
    return equal(whole(case, rule), halves(case, rule))


# ------------------------------------------------------------------------------- the packages


def pytorch_optimizer() -> Iterator[Case]:
    """All optimizer classes that `pytorch_optimizer` exports."""
    package = importlib.import_module("pytorch_optimizer")
    names = [name for name in dir(package) if inspect.isclass(getattr(package, name))]
    kinds = [getattr(package, name) for name in names]
    for kind in dict.fromkeys(k for k in kinds if issubclass(k, torch.optim.Optimizer)):
        yield case_of(kind)


def case_of(kind: Optimizer) -> Case:
    """A class with what it cannot do without."""
    muon = {"use_muon": True}, (lm.Rule("ndim<2", use_muon=False),)
    special: dict[str, dict[str, Any]] = {
        "AdaGO": {"settings": muon[0], "rules": muon[1]},
        "AdaMuon": {"settings": muon[0], "rules": muon[1]},
        "DistributedMuon": {"settings": muon[0], "rules": muon[1]},
        "Muon": {"settings": muon[0], "rules": muon[1]},
        "MuonClip": {"settings": muon[0], "rules": muon[1]},
        "NorMuon": {"settings": muon[0], "rules": muon[1]},
        "A2Grad": {"settings": {"lr": 1e-3}},  # which it takes, and does not use
        "AdaHessian": {"graph": True},
        "SophiaH": {"graph": True},
        "BSAM": {"settings": {"num_data": 8}},
        "Ranger21": {"settings": {"num_iterations": STEPS}},
        "SpectralSphere": {"only_matrices": True},
    }
    if kind.__module__.startswith("pytorch_optimizer"):
        return Case(kind, **special.get(kind.__name__, {}))
    arguments = inspect.signature(kind).parameters
    needed = {"lr": 1e-3, "momentum": 0.9}  # without a default in some, or one that fails
    given = {k: v for k, v in needed.items() if k in arguments and not arguments[k].default}
    given |= {k: v for k, v in needed.items() if k in arguments and _is_required(arguments[k])}
    return Case(kind, given)


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def members(package: str) -> Callable[[], Iterator[Case]]:
    """Cases for all optimizer classes in the namespace of a package."""

    def cases() -> Iterator[Case]:
        module = importlib.import_module(package)
        kinds = [each for _, each in sorted(vars(module).items()) if inspect.isclass(each)]
        for kind in dict.fromkeys(k for k in kinds if issubclass(k, torch.optim.Optimizer)):
            base = kind.__name__.startswith("_") or kind.__name__.endswith("Base")
            if not base and kind.__module__.partition(".")[0] == package.partition(".")[0]:
                yield case_of(kind)

    return cases


#: by the name of the distribution: the classes that are tried
PACKAGES: dict[str, Callable[[], Iterator[Case]]] = {
    "pytorch_optimizer": pytorch_optimizer,
    "heavyball": members("heavyball"),
    "torch-optimi": members("optimi"),
    "adam-mini": members("adam_mini"),
    "bitsandbytes": members("bitsandbytes.optim"),
    "torchao": members("torchao.optim"),
}


def cases_of(distribution: str) -> list[Case]:
    """The cases of a package; raises `ImportError` if it is not installed."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"{distribution} is not installed") from error
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return list(PACKAGES[distribution]())


COLUMNS = ("class", "as by hand", "resumes equal", "with a late part", "refused because")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def row(outcome: Outcome) -> str:
    """One outcome as a row of a markdown table."""
    name = outcome.name + (f" ({outcome.settings})" if outcome.settings else "")
    cells = (name, outcome.by_hand, outcome.resumes, outcome.late, outcome.refused)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    """Print the table of every package, or of those that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guests", description=__doc__)
    parser.add_argument("packages", nargs="*", default=list(PACKAGES), metavar="PACKAGE")
    parser.add_argument("--only", nargs="+", default=[], help="names of classes")
    arguments = parser.parse_args()
    for distribution in arguments.packages:
        try:
            cases = cases_of(distribution)
        except Exception as error:
            print(f"\n## {distribution}\n\nNot tried: {error}.")
            continue
        chosen = [case for case in cases if not arguments.only or case.name in arguments.only]
        print(f"\n## {distribution} {importlib.metadata.version(distribution)}\n\n{HEAD}")
        outcomes = []
        for case in chosen:
            outcomes.append(conform(case))
            print(row(outcomes[-1]), flush=True)
        right = sum(each.right for each in outcomes)
        refused = sum(bool(each.refused) for each in outcomes)
        print(f"\n{len(outcomes)} classes: {right} run and resume equal, {refused} are refused.")


if __name__ == "__main__":
    main()
