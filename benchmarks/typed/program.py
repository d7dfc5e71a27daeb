"""A program that a type checker reads against the installed package: `make dist`.

`reveal_type` is answered by the checker; the expected answers stand in the comments, and
`python -m benchmarks.typed` compares the two. It runs, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

import lamina as lm
from lamina import checkpoint, optim

if not TYPE_CHECKING:

    def reveal_type(value):
        """Do nothing: only a type checker answers."""


#: both checkers must find the mistake in each of these lines; none of them runs
if TYPE_CHECKING:
    lm.Plan("SGD", lr=0.1).build()  # wrong: no model
    lm.cosine(until=0.1)  # wrong: no such argument
    lm.Plan("SGD", lr=0.1).preview(nn.Linear(2, 2), steps="10")  # wrong: a text
    print(lm.adamw)  # wrong: no such name

model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
inputs, targets = torch.randn(32, 4), torch.randint(0, 2, (32,))

# --- a plan
schedule = lm.warmup("10%") >> lm.cosine(to=0.01)
reveal_type(schedule)  # Schedule
scaled = lm.linear() * lm.cosine()
reveal_type(scaled)  # Schedule
plan = lm.Plan(
    lm.AdamW,
    lr=1e-3,
    schedule=schedule,
    clip_norm=1.0,
    stop=lm.early_stop("val_loss", patience=3),
    rules=[
        lm.Rule("0.*", lr=lm.times(0.1), thaw="25%"),
        lm.Rule("*.bias", weight_decay=0.0),
    ],
)
reveal_type(plan)  # Plan
text: str = plan.to_toml()
assert lm.Plan.from_toml(text) == plan

# --- before the run
preview = plan.preview(model, epochs=2, steps_per_epoch=4)
reveal_type(preview)  # Preview
peaks: list[float | None] = [row.lr_peak for row in preview.rows]
codes: list[str] = [finding.code for finding in preview.findings]
lr: float = preview.at(3)["0.* + *.bias"]["lr"]
difference = preview.diff(plan.preview(model, epochs=3, steps_per_epoch=4))
reveal_type(difference)  # PlanDiff
reveal_type(preview.explain("2.weight", 3))  # Explanation

# --- the run
optimizer = plan.build(model, epochs=2, steps_per_epoch=4)
reveal_type(optimizer)  # Optimizer
as_torch: torch.optim.Optimizer = optimizer
losses: list[float] = []
with optimizer.recorder() as recorder:
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
reveal_type(recorder)  # Recorder
optimizer.report(val_loss=losses[-1])
reveal_type(optimizer.should_stop)  # bool
optimizer.override(lr=1e-4)
clock: int = optimizer.clock
state = optimizer.state_dict()
optimizer.load_state_dict(state)

# --- drop-ins
adam = optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
reveal_type(adam)  # AdamW
warm = optim.lr_scheduler.CosineAnnealingLR(adam, T_max=10)
reveal_type(warm)  # CosineAnnealingLR
found: tuple[lm.Finding, ...] = lm.check(model, adam, warm)
norm: torch.Tensor = lm.clip_grad_norm_(model.parameters(), 1.0)

# --- models and files
with_ties = lm.ties(model)
lm.freeze(model, "0.*")
lm.thaw(model, "0.*")
tree = checkpoint.candidates("checkpoints")
try:
    lm.Plan("AdamW", lr=-1.0)
except lm.HyperparameterError as error:
    problem: lm.LaminaError = error
