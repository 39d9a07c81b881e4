"""Ctrl-C and SIGTERM, when something has to be finished first."""

import signal
import threading
import time


class StopSignals:
    """While open, the first Ctrl-C or SIGTERM only asks the step at work to finish; a second one ends all.

    What follows within ECHO seconds is the same one: torchrun passes on what the terminal has sent already.
    """

    ECHO = 3

    def __enter__(self):
        self.caught, self.old = None, {}
        if threading.current_thread() is threading.main_thread():
            self.old = {s: signal.signal(s, self.catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def catch(self, number, frame):
        if self.caught is None:
            self.caught, self.when = number, time.monotonic()
        elif time.monotonic() - self.when > self.ECHO:
            self.__exit__()
            signal.raise_signal(number)

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)
