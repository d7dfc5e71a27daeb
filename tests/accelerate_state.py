"""What Accelerate shares in a process, which a test must not find as another one left it."""

import gc
import sys


def forget_accelerate():
    """Reset what Accelerate shares in a process, as if what follows ran in one of its own.

    A loader that nobody iterates over any more writes to it once more when it is collected, after
    which Accelerate seems to be in use; hence the collection before.
    """
    states = sys.modules.get("accelerate.state")
    if states is not None and (
        states.GradientState._shared_state or states.PartialState._shared_state
    ):
        gc.collect()
        states.AcceleratorState._reset_state(reset_partial_state=True)
        states.GradientState._reset_state()
