"""Ctrl-C and SIGTERM, when the current step has to be finished first."""

import signal
import threading
import time
from types import FrameType
from typing import Any


class StopSignals:
    """A context that records the first Ctrl-C or SIGTERM in `caught`; a second one acts as usual.

    A repetition within DUPLICATE_WINDOW_S seconds counts as the first one: torchrun forwards signals that the
    terminal has already sent.
    """

    DUPLICATE_WINDOW_S = 3

    def __enter__(self) -> "StopSignals":
        self.caught: int | None = None
        self.old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.old = {s: signal.signal(s, self.catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def catch(self, number: int, frame: FrameType | None) -> None:
        """Record the signal; if it is a second one, restore the old handlers and raise it again."""
        if self.caught is None:
            self.caught, self.when = number, time.monotonic()
        elif time.monotonic() - self.when > self.DUPLICATE_WINDOW_S:
            self.__exit__()
            signal.raise_signal(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
