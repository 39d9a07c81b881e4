"""Ctrl-C, SIGTERM and a closed terminal, when the current step has to be finished first."""

import signal
import threading
import time
from types import FrameType
from typing import Any


class StopSignals:
    """A context that records the first Ctrl-C, SIGTERM or SIGHUP in `caught`; a second one acts as usual.

    SIGHUP comes when a terminal is closed; where it is ignored, as under nohup, it stays ignored. A
    repetition within DUPLICATE_WINDOW_S seconds counts as the first one: torchrun forwards signals that the
    terminal has already sent.
    """

    DUPLICATE_WINDOW_S = 3

    def __enter__(self) -> "StopSignals":
        self.caught: int | None = None
        self.old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.old = {s: signal.signal(s, self.catch) for s in stop_signals()}
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


def stop_signals() -> list[signal.Signals]:
    """Return the signals that end a run on this platform."""
    stops = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not on Windows
        stops.append(signal.SIGHUP)
    return stops
