"""A status of the C library becomes an exception that carries the library's sentence."""
from __future__ import annotations

from . import _c


class CoveyError(Exception):
    """A call of covey failed. `status` is the number, `name` the C name, str() the sentence."""

    status: int = 0

    def __init__(self, sentence: str, status: int | None = None):
        super().__init__(sentence)
        if status is not None:
            self.status = status

    @property
    def name(self) -> str:
        return _c.lib.covey_status_name(self.status).decode()


class Redo(CoveyError):
    """The world changed before the step was committed, nothing of it was applied: begin the step again."""

    status = _c.REDO


class Refused(CoveyError):
    """Some rank refused the step and nothing of it was applied on any; the sentence says why."""

    status = _c.REFUSED


class Invalid(CoveyError, ValueError):
    """An argument or the batch is wrong. Nothing happened."""

    status = _c.ERR_INVALID


class NoMemory(CoveyError):
    """Refused before memory ran out."""

    status = _c.ERR_NO_MEMORY


class Unsupported(CoveyError):
    """This build or machine cannot do it."""

    status = _c.ERR_UNSUPPORTED


class TimedOut(CoveyError):
    """A peer did not come in time; the sentence names it. The context is of no further use."""

    status = _c.ERR_TIMED_OUT


class SystemFailed(CoveyError):
    """The system refused a file, socket or memory call (COVEY_ERR_IO)."""

    status = _c.ERR_IO


class Mismatch(CoveyError):
    """Ranks called different things, or the same thing differently. The context is of no further use."""

    status = _c.ERR_MISMATCH


class PeerFailed(CoveyError):
    """A peer is gone. The context is of no further use."""

    status = _c.ERR_PEER_FAILED


class BackendFailed(CoveyError):
    """The wire's library (MPI) failed. The context is of no further use."""

    status = _c.ERR_BACKEND


class WrongState(CoveyError):
    """Calls in the wrong order. Nothing happened."""

    status = _c.ERR_STATE


_BY_STATUS = {error.status: error for error in CoveyError.__subclasses__()}


def check(status: int) -> None:
    """Raises what `status` stands for; the sentence is that of the calling thread's last failure."""
    if status != _c.OK:
        sentence = _c.lib.covey_last_error().decode(errors="replace")
        raise _BY_STATUS.get(status, CoveyError)(sentence, status)
