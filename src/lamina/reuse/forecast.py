"""What reuse will store and save at each stage of a plan, before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .lineage import ROOT_KEY
from .profile import Profile


@dataclass(frozen=True)
class StageForecast:
    """One stage: the steps [first, last), what is replayed in it, and what that saves.

    `saved` is the share of the time of a step that is not needed once everything is stored; that
    of a step is estimated as the forward pass and, for each part that trains, twice its forward
    pass for the backward pass.
    """

    first: int
    last: int | None
    replayed: tuple[str, ...]
    bytes_per_example: int
    saved: float


@dataclass(frozen=True)
class Forecast:
    """The stages of a plan, and the space that they need together, in bytes."""

    stages: tuple[StageForecast, ...]
    examples: int
    space: int
    budget: int
    refused: tuple[tuple[str, str], ...]
    #: what the figures do not tell
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Return a table."""
        lines = ["steps            saved   space       replayed"]
        for stage in self.stages:
            until = "end" if stage.last is None else str(stage.last - 1)
            size = stage.bytes_per_example * self.examples / 2**20
            lines.append(
                f"{f'{stage.first} to {until}':<16} {stage.saved:>5.0%} {size:>8.1f} MiB  "
                f"{', '.join(stage.replayed) or 'nothing'}"
            )
        budget = f"of {self.budget / 2**20:.0f} MiB"
        lines.append(f"all together: {self.space / 2**20:.1f} MiB {budget}")
        if self.space > self.budget:
            lines.append("More than fits: what a later stage needs is left out first.")
        lines += [f"{path or 'the model'} is not reused: it {why}." for path, why in self.refused]
        lines += self.notes
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def forecast(
    profile: Profile,
    widths: Mapping[str, int],
    moments: Sequence[tuple[int, int]],
    end: int | None,
    examples: int,
    budget: int,
) -> Forecast:
    """Return what each stage will store and save.

    Args:
        profile: of the model, with its boundaries checked.
        widths: the bytes that an example takes in the outputs of each call that can be stored.
        moments: the first step of each stage, and the bits of what trains in it.
        end: the length of the run in steps, if it is known.
        examples: how many there are.
        budget: how many bytes may be stored.
    """
    stages = []
    keys: set[str] = set()
    for place, (first, trained) in enumerate(moments):
        last = moments[place + 1][0] if place + 1 < len(moments) else end
        stage = profile.stage(trained)
        needed = [key for key in stage.needed if key in widths]
        keys.update(needed)
        stages.append(
            StageForecast(
                first,
                last,
                tuple(sorted(profile.call(key).path for key in needed)),
                sum(widths[key] for key in needed),
                _saved(profile, list(stage.skipped), trained),
            )
        )
    space = examples * sum(widths[key] for key in keys)
    refused = tuple(sorted(profile.refused.items()))
    return Forecast(tuple(stages), examples, space, budget, refused)


def _saved(profile: Profile, skipped: Sequence[str], trained: int) -> float:
    """Return the share of a step that the skipped calls take."""
    seconds = profile.seconds
    forward = seconds.get(ROOT_KEY, 0.0)
    spared = sum(seconds.get(key, 0.0) for key in skipped)
    if not forward:
        return 0.0
    # What the backward pass goes through are the calls that are not skipped, if they train.
    step = forward + 2 * (forward - spared if trained else 0.0)
    return spared / step
