"""A recorder on two processes: the norms are those of the whole model, and one process writes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lamina as lm
from models import encoder
from processes import join_group, leave_group, run_processes
from test_fsdp import batch, shard, wrap

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]
STEPS = 4
LAYERS = (0, 1)
PLAN = lm.Plan(
    lm.AdamW,
    lr=0.05,
    clip_norm=0.1,
    rules=[lm.Rule("encoder.layer.0.*", thaw=2), lm.Rule("classifier", lr=0.1)],
)


def recorded(model: nn.Module, part: slice, folder: Path | None, updates: bool = True):
    """Train and return the curves of the record."""
    optimizer = PLAN.build(model, steps=STEPS)
    writers = [] if folder is None else [folder / "metrics.jsonl"]
    with optimizer.recorder(*writers, every=1, updates=updates) as recorder:
        for step in range(STEPS):
            optimizer.zero_grad()
            model(batch(step)[part]).square().mean().backward()
            optimizer.step()
        record = recorder.record
    found = {
        f"{group}/{name}": [steps.tolist(), values.tolist()]
        for group, name, steps, values in record.curves()
    }
    return {"curves": found, "events": [event.kind for event in record.events]}


def work(rank: int, folder: str) -> None:
    join_group(rank, folder)
    part = slice(2 * rank, 2 * rank + 2)
    found = {
        "fsdp2": recorded(shard(encoder(LAYERS)), part, Path(folder)),
        "ddp": recorded(nn.parallel.DistributedDataParallel(encoder(LAYERS)), part, None),
        "fsdp1": recorded(wrap(encoder(LAYERS)), part, None),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    leave_group()


def test_norms_are_those_of_one_process(tmp_path):
    run_processes(work, tmp_path)
    alone = recorded(encoder(LAYERS), slice(None), None)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for kind in ("fsdp2", "ddp"):
            curves = {key.replace("module.", ""): its for key, its in found[kind]["curves"].items()}
            assert set(curves) == set(alone["curves"])
            for key, (steps, values) in alone["curves"].items():
                assert curves[key][0] == steps
                assert curves[key][1] == pytest.approx(values, rel=1e-5, nan_ok=True), (kind, key)
            assert found[kind]["events"] == ["thaw"]
        assert "not-measured" in found["fsdp1"]["events"]
        assert not any("ratio" in key for key in found["fsdp1"]["curves"])
    assert torch.distributed.is_available()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"kind": "step"' in line]
    assert steps == list(range(STEPS))  # written once, not by each
