"""Signals that ask a process to end."""

import signal
import threading
from types import MappingProxyType
from typing import Final

# Signals, and the status with which a process ends that got one.
STATUS: Final = MappingProxyType({signal.SIGTERM: 143, signal.SIGINT: 130})


class Interrupts:
    """Notes the first signal in its context; a second one ends the process at once.

    Where several processes train together, or in another than the main thread, signals
    keep their usual effect: the processes would stop at different updates.
    """

    def __init__(self, *, is_alone: bool):
        self.status: int | None = None  # That of the first signal.
        is_main = threading.current_thread() is threading.main_thread()
        self._signals = tuple(STATUS) if is_alone and is_main else ()

    def __enter__(self) -> "Interrupts":
        self._before = {s: signal.signal(s, self._note) for s in self._signals}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number, frame):
        del frame
        self.status = STATUS[number]
        self._restore()

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
