"""Watch what a training run really does, whatever trains; see docs/how-to/watch.md."""

from .session import Seen, watch
from .static import check

__all__ = ["Seen", "check", "watch"]
