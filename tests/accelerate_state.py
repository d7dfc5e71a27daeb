"""What Accelerate shares in a process, which a test must not find as another one left it."""

import sys


def forget_accelerate():
    """Reset what Accelerate shares in a process, as if what follows ran in one of its own."""
    states = sys.modules.get("accelerate.state")
    if states is not None:
        states.AcceleratorState._reset_state(reset_partial_state=True)
        states.GradientState._reset_state()
