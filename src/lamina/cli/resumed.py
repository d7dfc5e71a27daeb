"""What a resumed run announces: only what differs from the run as it was saved."""

from __future__ import annotations

from rich.console import Console

from ..errors import LaminaError, printable
from ..plan.plan import Plan
from ..preview import Preview, preview_of
from ..preview.compare import compare
from ..preview.header import header, resumed_line
from ..preview.sparkline import can_show
from ..preview.table import in_ascii
from ..training.run_folder import plan_text
from ..training.session import Session
from .common import announce


def announce_run(console: Console, session: Session, full: bool) -> None:
    """Print the preview of a run; of a resumed one, what changes from here on.

    Args:
        console: where to.
        session: the run.
        full: every group of the whole run.
    """
    earlier = None if full or session.start is None else _earlier(session)
    if earlier is None:
        announce(console, session.preview, full)
        return
    text = printable(changes_text(earlier, session.preview))
    print(text if can_show() else in_ascii(text))
    print(flush=True)


def _earlier(session: Session) -> Preview | None:
    """Return the preview of the run as it would have gone on; None if that cannot be told."""
    start, resumed = session.start, session.preview.resumed
    if start is None or resumed is None or resumed.saved_run is None:
        return None
    snapshot, plan = start.snapshot, session.plan
    try:
        if plan_text(plan)[0] != snapshot.plan:
            plan = Plan.from_toml(snapshot.plan)
        return preview_of(plan, session.model, resumed.saved_run, snapshot.optimizer)
    except LaminaError:  # a plan that is no TOML, or that names what is gone
        return None


def changes_text(before: Preview, after: Preview) -> str:
    """Return what a resumed run will do otherwise than the run as it was saved.

    Args:
        before: the preview of the saved run, as it would have gone on.
        after: the preview of the run as it goes on.
    """
    assert after.resumed is not None
    clock = after.resumed.clock
    found = compare(before, after, since=clock)
    lines = [header(after)[0], resumed_line(after, after.resumed)]
    if found:
        lines += ["", f"Changes from step {clock:,} on:", str(found)]
    else:
        groups = f"{len(after.rows)} group{'s' * (len(after.rows) != 1)}"
        lines.append(f"No value of its {groups} changes. To see the whole plan: --full.")
    old = {str(finding) for finding in before.findings}
    lines += [f"! {finding}" for finding in after.findings if str(finding) not in old]
    return "\n".join(lines)
