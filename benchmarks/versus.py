"""Build and step beside another revision of lamina: `python -m benchmarks.versus REVISION`.

Both revisions take turns, each time in a new process; the ratio is the median of the ratios of
neighbours. Processor time of one thread, so that other work on the machine matters less.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: prints the milliseconds of a build and the microseconds of a step
MEASURE = """
import statistics, sys, time, warnings
import torch
from torch import nn
import lamina as lm

warnings.simplefilter("ignore")
torch.set_num_threads(1)
def block():
    return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(30))})

blocks = [block() for _ in range(30)]
model = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
plan = lm.Plan(
    "AdamW",
    lr=1e-3,
    schedule="warmup(10%) >> cosine()",
    clip_norm=1.0,
    rules=[
        lm.Rule("blocks.{depth}.*", lr=lm.by_depth(0.9)),
        lm.Rule("blocks.{depth}.*", thaw=lm.top_down(every="2%")),
        lm.Rule("*.bias", weight_decay=0.0),
        lm.Rule("blocks.0.*", frozen=True),
        lm.Rule("blocks.29.*", lr=1e-2),
        lm.Rule("*.layers.3.*", lr=lm.times(0.5)),
        lm.Rule("*.layers.4.*", schedule="cosine()"),
        lm.Rule("*.layers.5.*", betas=(0.8, 0.9)),
        lm.Rule("*.layers.6.*", clip_norm=0.5),
    ],
)
builds = []
for _ in range(3):
    start = time.process_time()
    optimizer = plan.build(model, steps=1000)
    builds.append(1e3 * (time.process_time() - start))
    optimizer.release()

net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(24)))
optimizer = lm.Plan(
    "AdamW", lr=1e-3, schedule="warmup(10%) >> cosine()", clip_norm=1.0,
    rules=[lm.Rule("*.bias", weight_decay=0.0), lm.Rule("0.*", frozen=True)],
).build(net, steps=100_000)
net(torch.randn(4, 64)).sum().backward()
grads = [param.grad for param in net.parameters()]
steps = []
for _ in range(300):
    for param, grad in zip(net.parameters(), grads):
        param.grad = grad
    start = time.process_time()
    optimizer.step()
    steps.append(1e6 * (time.process_time() - start))
print(statistics.median(builds), statistics.median(steps[50:]))
"""


def unpack(revision: str, folder: Path) -> Path:
    """Extract the source of a revision and return its path."""
    archive = subprocess.run(
        ["git", "archive", revision, "src"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "src"


def measure(source: Path) -> list[float]:
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True
    )
    return [float(number) for number in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versus", description=__doc__)
    parser.add_argument("revision")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        old = unpack(arguments.revision, Path(folder))
        rounds = [(measure(old), measure(ROOT / "src")) for _ in range(arguments.rounds)]
    for place, (what, unit) in enumerate(
        (("build, 1,800 tensors", "ms"), ("step, 48 tensors", "us"))
    ):
        before = [theirs[place] for theirs, _ in rounds]
        now = [ours[place] for _, ours in rounds]
        ratios = [mine / theirs for mine, theirs in zip(now, before, strict=True)]
        print(
            f"{what}: {statistics.median(now):.1f} {unit}, {arguments.revision} "
            f"{statistics.median(before):.1f} {unit}, x {statistics.median(ratios):.3f} "
            f"[{min(ratios):.3f}, {max(ratios):.3f}]"
        )


if __name__ == "__main__":
    main()
