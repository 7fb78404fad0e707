"""Context.prefetch(): routes built on a thread of their own, and sent ahead on the thread that trains."""
from __future__ import annotations

import collections
import queue
import threading
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping, NamedTuple

if TYPE_CHECKING:
    from ._context import Context, Route, Step, World


class Built(NamedTuple):
    """What became of one batch. route None: there is none, the data is over or failure says why."""

    number: int
    batch: Any
    route: Route | None
    failure: BaseException | None


class Builder:
    """Builds batch `first`, `first` + 1, ... on a thread of its own, at most `room` ahead of who takes them, until
    there is none. What fails is handed over like a batch, to be raised where it is due."""

    def __init__(self, build: Callable[[int], tuple[Any, Route | None]], first: int, room: int):
        self._build, self._first, self._last, self._stopped = build, first, None, False
        self._room = threading.Semaphore(room)
        self._done: queue.SimpleQueue[Built] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="covey prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        built = Built(self._first - 1, None, None, None)
        while True:
            self._room.acquire()
            if self._stopped:
                return
            try:
                built = Built(built.number + 1, *self._build(built.number + 1), None)
            except BaseException as failure:  # handed to the thread that trains
                built = Built(built.number + 1, None, None, failure)
            self._done.put(built)
            if built.route is None:
                return

    def take(self) -> Built:
        """The next one, in order; the last one for ever."""
        if self._last is not None:
            return self._last
        built = self._done.get()
        self._room.release()
        if built.route is None:
            self._last = built
        return built

    def end(self) -> None:
        """Waits for the batch that is being built."""
        self._stopped = True
        self._room.release()
        self._thread.join()
        while not self._done.empty():
            built = self._done.get()
            if built.route is not None:
                built.route.free()


class Ahead:
    """The routes of a loop over steps: the one at hand, those on their way, and who builds the next ones."""

    def __init__(self, context: Context, batches: Any, arguments: Callable[[Any], Mapping[str, Any]] | None, depth: int,
                 count: int | None):
        self._context, self._batches, self._arguments = context, batches, arguments
        self._depth, self._count, self._epoch = depth, count, None
        self._builder: Builder | None = None
        self._now: Built | None = None
        self._sent: collections.deque[Built] = collections.deque()

    def of(self, step: Step) -> Built:
        """The batch of the step that has begun."""
        if step.epoch != self._epoch:
            self.end()
            self._epoch = step.epoch
            self._builder = Builder(self._fetch(self._context.world, step.step), step.step, self._depth + 1)
        if self._now is None or self._now.number != step.step:
            self._now = self._sent.popleft() if self._sent else self._builder.take()
        elif self._now.route is not None and (self._now.route.looked_up or not self._now.route._handle):
            # refused: the same step again
            self._now = self._now._replace(route=self._route(self._now.batch))
        if self._now.failure is not None:
            raise self._now.failure
        if self._now.route is not None:
            self._now.route._then = self._send
        return self._now

    def _fetch(self, world: World, first: int) -> Callable[[int], tuple[Any, Route | None]]:
        """How batch `number` is come by, in this world."""
        if callable(self._batches):
            def fetch(number: int) -> Any:
                return self._batches(number, world)
        else:
            iterator = iter(self._batches)

            def fetch(number: int) -> Any:
                return next(iterator, None)

        def build(number: int) -> tuple[Any, Route | None]:
            batch = fetch(number) if self._count is None or number < self._count else None
            return batch, None if batch is None else self._route(batch)

        return build

    def _route(self, batch: Any) -> Route:
        given = batch if self._arguments is None else self._arguments(batch)
        if isinstance(given, Mapping):
            return self._context.route(**given)
        if isinstance(given, tuple) and len(given) == 2:
            return self._context.route(given[0], lengths=given[1])
        raise TypeError("prefetch: a batch is a dict of route()'s arguments or a pair (values, lengths); for others "
                        f"give arguments=, a function that makes such a dict of one; got {type(given).__name__}")

    def _send(self) -> None:
        """After the lookup of the step, before what it computes."""
        while len(self._sent) < self._depth:
            built = self._builder.take()
            if built.failure is not None:
                raise built.failure
            if built.route is None:
                return
            self._sent.append(built)
            built.route.prefetch()

    def end(self) -> None:
        """All ranks come to this alike, so what was sent is given up alike."""
        if self._builder is not None:
            self._builder.end()
        for built in self._sent if self._now is None else (self._now, *self._sent):
            if built.route is not None:
                built.route.free()
        self._sent.clear()
        self._builder = self._now = self._epoch = None


def ahead(context: Context, batches: Callable[[int, World], Any] | Iterable[Any], arguments: Any, depth: int,
          most: int, count: int | None) -> Ahead:
    if isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth <= most:
        raise ValueError(f"depth: expected 0 to {most}, the prefetch_depth of the context, got {depth!r}")
    if not callable(batches) and context.world.elastic:
        raise ValueError("batches: in an elastic job a rank's share of a batch follows from the world, and a step may "
                         "come again: give a function of the step's number and the world")
    return Ahead(context, batches, arguments, depth, count)
