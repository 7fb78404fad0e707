"""covey: the training runtime under recommendation models whose embedding tables do not fit one process.

The package is a thin layer over the C library (libcovey), with numpy arrays read and written in place. What the calls
mean is in include/covey.h; Context shows the loop. Start it with `mpirun -n 4 python3 train.py`, or plainly for a world
of one; or with `covey run -n 4 -- python3 train.py` as a job whose ranks may die, leave and enter (Context.steps).

The library is looked for in COVEY_LIBRARY, in the build folder of the checkout, then where the system keeps libraries.
"""
from __future__ import annotations

from typing import Callable

from . import _c
from ._context import (Attempt, Context, Counters, Event, Feature, Group, Optimizer, Phase, Request, Route, Step, Table,
                       TableStats, World)
from ._errors import (BackendFailed, CoveyError, CoveyStatus, Expelled, Invalid, Left, Mismatch, NoMemory, PeerFailed,
                      Redo, Refused, Stopped, SystemFailed, TimedOut, Unsupported, WorldChanged, WrongState)

__all__ = ["Attempt", "BackendFailed", "Context", "Counters", "CoveyError", "CoveyStatus", "Event", "Expelled",
           "Feature", "Group", "Invalid", "Left", "Mismatch", "NoMemory", "Optimizer", "PeerFailed", "Phase", "Redo",
           "Refused", "Request", "Route", "Step", "Stopped", "SystemFailed", "Table", "TableStats", "TimedOut",
           "Unsupported", "World", "WorldChanged", "WrongState", "set_log"]

_version = _c.lib.covey_version()
__version__ = f"{_version // 10000}.{_version // 100 % 100}.{_version % 100}"

_log_functions: list = []  # every one ever set: a thread of the library may be about to call an older one


def set_log(function: Callable[[int, str, str], None] | None) -> None:
    """Where log lines go: function(level, topic, line), called on the thread that logs; level 0 error, 1 warning,
    2 info, 3 debug. None: stderr. COVEY_LOG in the environment sets the least important level that is shown."""
    if function is None:
        _c.lib.covey_set_log(_c.LogFunction(), None)
        return
    _log_functions.append(_c.LogFunction(lambda _, level, topic, line: function(
        level, topic.decode(errors="replace"), line.decode(errors="replace"))))
    _c.lib.covey_set_log(_log_functions[-1], None)
