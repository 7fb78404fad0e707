"""A status of the C library becomes an exception that carries the library's sentence.

CoveyError is what failed. WorldChanged, of elastic jobs, is nothing that failed and not a CoveyError: Redo sends the
loop back to step_begin, Left ends it. """
from __future__ import annotations

from . import _c


class CoveyStatus(Exception):
    """A call of covey answered something but OK. `status` is the number, `name` the C name, str() the sentence."""

    status: int = 0

    def __init__(self, sentence: str, status: int | None = None):
        super().__init__(sentence)
        if status is not None:
            self.status = status

    @property
    def name(self) -> str:
        return _c.lib.covey_status_name(self.status).decode()


class CoveyError(CoveyStatus):
    """A call of covey failed."""


class WorldChanged(CoveyStatus):
    """A rank died, left or entered; no call failed. Never in a fixed world."""


class Redo(WorldChanged):
    """The world changed and the call had no effect. Inside a step: go back to step_begin, nothing of the step was
    applied. Between steps: make the call again."""

    status = _c.REDO


class Left(WorldChanged):
    """This rank has left the job as it was told: close the context and end the program with code 0."""

    status = _c.LEFT


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


class Expelled(CoveyError):
    """The others go on without this rank: end, or join again as a new process."""

    status = _c.ERR_EXPELLED


class Stopped(CoveyError):
    """The job has ended at its last commit; the sentence says why."""

    status = _c.ERR_STOPPED


_BY_STATUS = {kind.status: kind for base in (WorldChanged, CoveyError) for kind in base.__subclasses__()}


def failure(status: int) -> CoveyStatus | None:
    """The exception that `status` stands for; the sentence is that of the calling thread's last failure."""
    if status == _c.OK:
        return None
    return _BY_STATUS.get(status, CoveyError)(_c.lib.covey_last_error().decode(errors="replace"), status)


def check(status: int) -> None:
    """Raises what `status` stands for."""
    if status != _c.OK:
        raise failure(status)
