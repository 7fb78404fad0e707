"""Context, Table, Route, Request and Group: the C interface with numpy arrays, exceptions and `with`."""
from __future__ import annotations

import ctypes
import os
import signal
import threading
import weakref
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence, TypeVar

import numpy as np

from . import _c
from ._ahead import Ahead, Built, ahead
from ._arrays import address, array, row_stride
from ._errors import CoveyStatus, Left, Redo, check, failure

Result = TypeVar("Result")

_MODES = {"exact": _c.EXACT, "fast": _c.FAST}
_POOLINGS = {"sum": _c.POOLING_SUM, "mean": _c.POOLING_MEAN, "mean_weighted": _c.POOLING_MEAN_WEIGHTED,
             "none": _c.POOLING_NONE}
_AVERAGES = {"samples": _c.AVERAGE_SAMPLES, "none": _c.AVERAGE_NONE}
_VECTORS = {"auto": _c.VECTOR_AUTO, "plain": _c.VECTOR_PLAIN, "avx2": _c.VECTOR_AVX2, "avx512": _c.VECTOR_AVX512}
_BINDS = {"auto": _c.BIND_AUTO, "none": _c.BIND_NONE, "cores": _c.BIND_CORES}
_ELASTIC = {"auto": _c.ELASTIC_AUTO, "off": _c.ELASTIC_OFF, "on": _c.ELASTIC_ON}
_EVENTS = {_c.EVENT_SUSPECT: "suspect", _c.EVENT_STUCK: "stuck", _c.EVENT_REVOKED: "revoked",
           _c.EVENT_CHANGED: "changed"}
_OPTIMIZERS = {"sgd": _c.SGD, "momentum": _c.MOMENTUM, "adagrad": _c.ADAGRAD, "rowwise_adagrad": _c.ROWWISE_ADAGRAD,
               "adam": _c.ADAM, "lamb": _c.LAMB, "ftrl": _c.FTRL}
_DECAYS = {"none": _c.DECAY_NONE, "coupled": _c.DECAY_COUPLED, "decoupled": _c.DECAY_DECOUPLED}
_SCHEDULES = {"constant": _c.SCHEDULE_CONSTANT, "linear": _c.SCHEDULE_LINEAR, "step": _c.SCHEDULE_STEP}
_INITS = {"uniform": _c.INIT_UNIFORM, "constant": _c.INIT_CONSTANT}
_UNKNOWN_IDS = {"insert": _c.UNKNOWN_INSERT, "initial": _c.UNKNOWN_INITIAL, "refuse": _c.UNKNOWN_REFUSE}
_PAYLOADS = {"fp32": _c.F32, "bf16": _c.BF16, "fp16": _c.F16, "int8": _c.I8}
_SHARDINGS = {"auto": _c.SHARDING_AUTO, "row_wise": _c.SHARDING_ROW_WISE, "table_wise": _c.SHARDING_TABLE_WISE,
              "column_wise": _c.SHARDING_COLUMN_WISE, "data_parallel": _c.SHARDING_DATA_PARALLEL}
_HOT_ROWS = {"auto": _c.HOT_AUTO, "off": _c.HOT_OFF, "on": _c.HOT_ON}
_OPERATIONS = {"sum": _c.SUM, "min": _c.MIN, "max": _c.MAX}
_DESCRIBE = {"topology": _c.DESCRIBE_TOPOLOGY, "tables": _c.DESCRIBE_TABLES, "settings": _c.DESCRIBE_SETTINGS,
             "state": _c.DESCRIBE_STATE, "plan": _c.DESCRIBE_PLAN}
_PHASES = ("ids", "rows", "gradients", "dense", "vote", "collective")
_DTYPES = {np.dtype(np.float32): _c.F32, np.dtype(np.float64): _c.F64, np.dtype(np.int32): _c.I32,
           np.dtype(np.int64): _c.I64}


class World(NamedTuple):
    """One agreed world, as this rank sees it. Slices slice_first ... slice_first + slice_count - 1 are this rank's.
    elastic: the world may change. joining: this process enters it in its first step_begin."""

    epoch: int
    resume_step: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    slices: int
    slice_first: int
    slice_count: int
    shards: int
    shard_count: int
    mode: str
    wire: str
    cause: str
    elastic: bool
    joining: bool


class Step(NamedTuple):
    """One step: its number (committed steps from 0) and which slices of the global batch are this rank's."""

    step: int
    epoch: int
    slices: int
    slice_first: int
    slice_count: int
    pass_count: int

    def slices_of_pass(self, pass_: int) -> range:
        """The slices that pass `pass_` computes at once: one in exact mode, all of this rank's in fast mode."""
        each = self.slice_count // self.pass_count
        return range(self.slice_first + pass_ * each, self.slice_first + (pass_ + 1) * each)


class Attempt(Step):
    """A step of Context.steps(), to be done inside `with`. A world that changes ends the block, and the loop goes on
    with the step that then is. Leaving the block by `break` or `continue` before anything of the step was done gives
    the step back. All other exceptions, Refused too, pass."""

    _context: Context

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: Any, exception: BaseException | None, trace: object) -> bool:
        self._context._free_routes()
        if exception is not None:
            return isinstance(exception, (Redo, Left))
        try:
            self._context._give_back()
        except Left:  # the loop will see for itself, if it goes on
            pass
        return False


class Event(NamedTuple):
    """What befell an elastic job. kind: "suspect" (rank is silent since ms), "stuck" (rank stands still in operation
    since ms), "revoked" (the view of epoch is over) or "changed" (the view of epoch holds from step on, with world_size
    ranks; cause as in World; detect_ms and recover_ms say how long it took)."""

    kind: str
    rank: int
    epoch: int
    step: int
    world_size: int
    ms: int
    detect_ms: int
    recover_ms: int
    cause: str
    operation: str


class Phase(NamedTuple):
    """What one phase of the exchange moved, in messages, bytes and nanoseconds."""

    messages: int
    bytes_out: int
    payload_out: int
    payload_self: int
    wait_ns: int
    work_ns: int


class Counters(NamedTuple):
    """What this rank did since it was opened; phase: ids, rows, gradients, dense, vote, collective."""

    steps_committed: int
    steps_refused: int
    samples_committed: int
    ids: int
    unique_ids: int
    apply_ns: int
    phase: dict[str, Phase]


class TableStats(NamedTuple):
    """One table on this rank: rows, bytes, and the ids it looked up in committed steps."""

    rows: int
    shards: int
    row_bytes: int
    bytes: int
    log_bytes: int
    ids: int
    unique_ids: int


class Feature(NamedTuple):
    """A column of bags in every batch. In a matrix of all features' outputs its columns are
    [column, column + dim)."""

    id: int
    name: str
    pooling: str
    dim: int
    column: int


def _choose(names: dict[str, int], value: str, argument: str) -> int:
    try:
        return names[value]
    except (KeyError, TypeError):
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, names))}, got {value!r}") from None


def _initialised(kind: int, struct: Any) -> Any:
    check(_c.lib.covey_struct_init(kind, ctypes.addressof(struct), ctypes.sizeof(struct)))
    return struct


def _fill(struct: Any, choices: dict[str, dict[str, int]], given: dict[str, Any], where: str) -> None:
    """Sets the fields of a C struct from keyword arguments; names of choices become their numbers."""
    fields = {name: kind for name, kind in struct._fields_
              if name not in ("size", "version", "reserved", "reserved_elastic")}
    for name, value in given.items():
        if name not in fields:
            raise TypeError(f"{where}: there is no option {name!r}; options are {', '.join(fields)}")
        if name in choices:
            value = _choose(choices[name], value, name)
        elif isinstance(value, (str, os.PathLike)):
            value = os.fsencode(value)
        elif isinstance(value, np.generic):
            value = value.item()
        try:
            if fields[name] is ctypes.c_char_p and isinstance(value, int):
                raise TypeError  # ctypes would take it for an address
            setattr(struct, name, value)
        except TypeError:
            raise TypeError(f"{where}: {name} cannot be {value!r}") from None
        stored = getattr(struct, name)
        if isinstance(stored, int) and stored != value:  # ctypes cuts integers to size without a word
            raise ValueError(f"{where}: {name} = {value} does not fit its C type")


def Optimizer(kind: str, **options: Any) -> _c.Optimizer:
    """The optimizer of a table. kind: sgd, momentum, adagrad, rowwise_adagrad, adam, lamb or ftrl; options: the fields
    of covey_optimizer (learning_rate, eps, weight_decay, weight_decay_mode "coupled" or "decoupled", ...), which have
    the defaults covey.h states. Example: Optimizer("adagrad", learning_rate=0.05)."""
    optimizer = _initialised(_c.STRUCT_TABLE_OPTIONS, _c.TableOptions()).optimizer
    _fill(optimizer, {"kind": _OPTIMIZERS, "weight_decay_mode": _DECAYS, "schedule": _SCHEDULES},
          {"kind": kind, **options}, "Optimizer")
    return optimizer


_children_get_signals = False


def _give_children_their_signals() -> None:
    """Processes that Python forks (multiprocessing) belong to no job: SIGTERM and SIGUSR1 mean to them what they meant
    before leave_on_signals."""
    global _children_get_signals
    if _children_get_signals:
        return
    _children_get_signals = True

    def restore() -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.getsignal(number) or signal.SIG_DFL)

    os.register_at_fork(after_in_child=restore)


class Request:
    """A collective under way. It keeps the buffers alive; they are covey's until it is done."""

    def __init__(self, context: Context, handle: ctypes.c_void_p, result: np.ndarray, buffers: tuple):
        self._context, self._handle, self._result, self._buffers = context, handle, result, buffers
        self._failure: CoveyStatus | None = None
        self._epoch = context._epoch
        context._requests.add(self)

    @property
    def done(self) -> bool:
        return not self._handle

    def wait(self, timeout_ms: int = -1) -> np.ndarray:
        """Waits (timeout_ms < 0: as long as the context's timeout_ms) and returns the filled array."""
        if not self.done:
            self._context._live()
            self._ended(_c.lib.covey_wait(ctypes.byref(self._handle), timeout_ms))
        return self._filled()

    def test(self) -> bool:
        """True when the array is filled. Never waits."""
        if not self.done:
            self._context._live()
            self._ended(_c.lib.covey_test(ctypes.byref(self._handle)))
        self._filled()
        return self.done

    def _ended(self, status: int) -> None:
        if status != _c.IN_PROGRESS:
            self._failure = failure(status)
        if self.done:
            self._context._requests.discard(self)
            self._buffers = ()

    def _filled(self) -> np.ndarray:
        if self._failure is not None:
            raise self._failure
        return self._result


class Table:
    """One embedding table, sharded over all ranks. Made by Context.table(); lives as long as its context."""

    def __init__(self, context: Context, handle: ctypes.c_void_p, name: str, dim: int):
        self._context, self._handle, self.name, self.dim = context, handle, name, dim

    def _live(self) -> ctypes.c_void_p:
        self._context._live()
        return self._handle

    def feature(self, name: str, pooling: str = "sum") -> Feature:
        """Gives the table a feature: a column of bags in every batch, in the order of these calls over all tables of
        the context. pooling: sum, mean, mean_weighted, or none (one row per id)."""
        number = ctypes.c_int32()
        check(_c.lib.covey_feature_add(self._live(), name.encode(), _choose(_POOLINGS, pooling, "pooling"),
                                       ctypes.byref(number)))
        features = self._context._features
        column = features[-1].column + features[-1].dim if features else 0
        features.append(Feature(number.value, name, pooling, self.dim, column))
        return features[-1]

    def set_learning_rate(self, learning_rate: float) -> None:
        """From the next commit on; the same on all ranks."""
        check(_c.lib.covey_table_set_learning_rate(self._live(), learning_rate))

    def freeze(self, frozen: bool = True) -> None:
        """From the next commit on; the same on all ranks. Freezing frees the optimizer state."""
        check(_c.lib.covey_table_freeze(self._live(), int(frozen)))

    def read(self, ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Collective. The rows [len(ids), dim] float32 of int64 ids, wherever they live; each rank may ask for others.
        An id without a row gives the value it would start with."""
        array(ids, "ids", np.int64, (None,))
        if out is None:
            out = np.empty((ids.size, self.dim), np.float32)
        array(out, "out", np.float32, (ids.size, self.dim), writable=True)
        check(_c.lib.covey_table_read(self._live(), address(ids), ids.size, address(out), None, None))
        return out

    def read_state(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Collective. (rows [n, dim] float32, optimizer state [n, floats per row] float32, known [n] bool)."""
        array(ids, "ids", np.int64, (None,))
        floats = (self.stats().row_bytes - 8) // 4 - self.dim
        rows = np.empty((ids.size, self.dim), np.float32)
        state = np.empty((ids.size, floats), np.float32)
        known = np.empty(ids.size, np.bool_)
        check(_c.lib.covey_table_read(self._live(), address(ids), ids.size, address(rows), address(state),
                                      address(known)))
        return rows, state, known

    def write(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Collective, between steps. Sets rows [len(ids), dim] float32 by int64 id, with fresh optimizer state."""
        array(ids, "ids", np.int64, (None,))
        array(rows, "rows", np.float32, (ids.size, self.dim))
        self._context._until_done(_c.lib.covey_table_write, self._live(), address(ids), ids.size, address(rows))

    def stats(self) -> TableStats:
        """What this rank holds of the table and looked up in it."""
        stats = _initialised(_c.STRUCT_TABLE_STATS, _c.TableStats())
        check(_c.lib.covey_table_stats_get(self._live(), ctypes.byref(stats)))
        return TableStats(*(getattr(stats, name) for name in TableStats._fields))


class Route:
    """What the ids of one batch resolved to; used by one lookup and at most one backward. Frees itself; `with` frees it
    at once."""

    def __init__(self, context: Context, handle: ctypes.c_void_p, features: tuple[Feature, ...], samples: int,
                 rows: list[int]):
        self._context, self._handle, self._features, self.samples, self._rows = context, handle, features, samples, rows
        self.looked_up = False
        self._then: Callable[[], None] | None = None  # what is to be done right after the lookup

    def prefetch(self) -> None:
        """Collective, between its making and its lookup. Sends the ids to their owners now, so that they travel and are
        found while the running step computes. Returns without waiting. At most prefetch_depth routes (an option of the
        context) may be on their way, and they are looked up in the order they were sent. Context.prefetch() does all
        this by itself."""
        check(_c.lib.covey_route_prefetch(self._live()))

    def lookup(self, out: np.ndarray | Sequence[np.ndarray] | None = None) -> np.ndarray | list[np.ndarray]:
        """Collective. The pooled rows of the batch, float32. out: one matrix [samples, sum of dims] for all features,
        or one array [rows, dim] per feature, where rows is samples, or the feature's ids with pooling none. Without out
        it is made here: a matrix, or a list where a feature has pooling none. An empty bag gives zeros."""
        if out is None:
            if any(feature.pooling == "none" for feature in self._features):
                out = [np.empty((rows, feature.dim), np.float32) for feature, rows in zip(self._features, self._rows)]
            else:
                out = np.empty((self.samples, sum(feature.dim for feature in self._features)), np.float32)
        slabs = self._slabs(out, "out", writable=True)
        self._context._used.add(self)
        status = _c.lib.covey_lookup(self._live(), slabs)
        error = None if status == _c.OK else failure(status)
        if status in (_c.OK, _c.ERR_INVALID):  # ids that are refused are this rank's affair; the exchange was whole
            self.looked_up = True
            if self._then is not None:
                self._then()
        if error is not None:
            raise error
        return out

    def backward(self, gradients: np.ndarray | Sequence[np.ndarray]) -> None:
        """Collective. d loss / d output, summed over samples, in the shapes of lookup's output. covey has read it on
        return."""
        slabs = self._slabs(gradients, "gradients", writable=False)
        check(_c.lib.covey_backward(self._live(), slabs))

    def free(self) -> None:
        """Gives the memory back; twice is fine."""
        if self._handle and self._context._handle:
            _c.lib.covey_route_free(ctypes.byref(self._handle))
        self._handle = ctypes.c_void_p()

    def __enter__(self) -> Route:
        return self

    def __exit__(self, *exception: object) -> None:
        self.free()

    def __del__(self) -> None:
        self.free()

    def _live(self) -> ctypes.c_void_p:
        self._context._live()
        if not self._handle:
            raise ValueError("the route has been freed; build one for each batch")
        return self._handle

    def _slabs(self, given: Any, argument: str, *, writable: bool) -> Any:
        slabs = (_c.Slab * max(len(self._features), 1))()
        if isinstance(given, np.ndarray):
            mixed = [feature.name for feature in self._features if feature.pooling == "none"]
            if mixed:
                raise ValueError(f"{argument}: feature {mixed[0]!r} has pooling none, one row per id, so the features "
                                 "do not fit one matrix; give a list with one array per feature")
            width = sum(feature.dim for feature in self._features)
            array(given, argument, np.float32, (self.samples, width), writable=writable, contiguous=False)
            stride, start = row_stride(given, argument), address(given)
            for slab, feature in zip(slabs, self._features):
                slab.data, slab.stride = start + 4 * feature.column, stride
            return slabs
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"{argument}: expected a numpy array of float32 or a list of one per feature, got "
                            f"{type(given).__name__}")
        if len(given) != len(self._features):
            raise ValueError(f"{argument}: expected {len(self._features)} arrays, one per feature, got {len(given)}")
        for slab, feature, rows, item in zip(slabs, self._features, self._rows, given):
            name = f"{argument}[{feature.id}] ({feature.name})"
            array(item, name, np.float32, (rows, feature.dim), writable=writable, contiguous=False)
            slab.data, slab.stride = address(item), row_stride(item, name)
        return slabs


class Group:
    """Ranks that are threads of this process, for tests and for learning. ctypes lets other threads run during a call,
    so they do work beside each other. Their world is fixed."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        self._handle = ctypes.c_void_p()
        check(_c.lib.covey_group_create(ranks, ctypes.byref(self._handle)))

    def run(self, function: Callable[[Context], Result], **options: Any) -> list[Result]:
        """Opens a context on each of `ranks` threads, calls function(context) on each, closes them, and returns what
        the calls returned, in rank order. Options are Context's. Where ranks fail, the first to fail is raised here."""
        results: list[Any] = [None] * self.ranks
        failures: list[BaseException] = []

        def rank(number: int) -> None:
            try:
                with Context(group=self, group_rank=number, **options) as context:
                    results[number] = function(context)
            except BaseException as failure:  # handed to the caller's thread below
                failures.append(failure)

        threads = [threading.Thread(target=rank, args=(number,), name=f"rank {number}") for number in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return results

    def free(self) -> None:
        """After all its contexts have closed; twice is fine."""
        if self._handle:
            _c.lib.covey_group_free(ctypes.byref(self._handle))

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *exception: object) -> None:
        self.free()


class Context:
    """One rank's view of the job: under mpirun one of its ranks, alone a world of one, with group one of its threads.

    Options are the fields of covey_options: wire ("auto", "local", "shm", "mpi"), mode ("exact", "fast"), slices,
    shards, timeout_ms, gradient_average ("samples", "none"), bind ("auto", "none", "cores"), vector ("auto", "plain",
    "avx2", "avx512"), announce, seed, memory_limit (bytes), threads (that covey computes with; 0: as many as cores are
    this rank's own); and for jobs whose ranks may die, leave and enter: elastic
    ("auto", "off", "on"), silence_ms, stuck_limit_ms, join (the rendezvous file of a running job to enter), job_file
    (the one to keep for others) and listen. See covey.h for their meaning and defaults.

        with covey.Context(mode="exact", seed=7) as context:
            table = context.table("C1", embedding_dim=16, optimizer=covey.Optimizer("adagrad", learning_rate=0.05))
            table.feature("C1")
            for values, lengths in batches:
                context.step_begin()
                route = context.route(values, lengths=lengths)
                out = route.lookup()
                route.backward(gradient_of(out))
                context.step_commit()

    In an elastic job any call of the loop may raise Redo or Left. steps() deals with them; the data then comes by the
    number of the step, since a step may come twice, and a rank that enters begins in the middle:

            for step in context.steps(len(batches)):
                with step:
                    values, lengths = batches[step.step]
                    ... route, lookup, backward and step_commit as above ...
            if not context.left:
                print(context.state_hash())

    The same by hand; what a rank keeps for its world or its slices it makes anew when step.epoch has changed:

            while True:
                try:
                    step = context.step_begin()
                    ...
                    context.step_commit()
                except covey.Redo:
                    continue
                except covey.Left:
                    break

    One thread at a time; route() alone may run on another thread beside it. Collective calls are to be made by all
    ranks in the same order. """

    def __init__(self, *, group: Group | None = None, group_rank: int = 0, **options: Any):
        self._handle = ctypes.c_void_p()
        self._features: list[Feature] = []
        self._kept: list[np.ndarray] = []  # registered buffers: covey holds their addresses until it is closed
        self._requests: set[Request] = set()
        self._aheads: weakref.WeakSet[Ahead] = weakref.WeakSet()
        self._used: weakref.WeakSet[Route] = weakref.WeakSet()  # routes that had their lookup: of no use after the step
        self._step_open = False
        self.left = False  # this rank has left the job, as it was told
        settings = _initialised(_c.STRUCT_OPTIONS, _c.Options())
        _fill(settings, {"mode": _MODES, "gradient_average": _AVERAGES, "bind": _BINDS, "vector": _VECTORS,
                         "elastic": _ELASTIC}, options, "Context")
        if group is not None:
            settings.group, settings.group_rank = group._handle, group_rank
        check(_c.lib.covey_open(ctypes.byref(self._handle), ctypes.byref(settings)))
        os.environ.pop("COVEY_BIRTH", None)  # gone for C already; Python would hand its own copy to child processes
        self._prefetch_depth = settings.prefetch_depth
        self._world = self._get_world()
        self._epoch = self._world.epoch

    def _live(self) -> ctypes.c_void_p:
        if not self._handle:
            raise ValueError("the context is closed")
        return self._handle

    def _get_world(self) -> World:
        world = _initialised(_c.STRUCT_WORLD, _c.World())
        check(_c.lib.covey_get_world(self._live(), ctypes.byref(world)))
        values = {name: getattr(world, name) for name in World._fields}
        names = {number: name for name, number in _MODES.items()}
        values.update(mode=names[world.mode], wire=world.wire.decode(), cause=world.cause.decode(),
                      elastic=bool(world.elastic), joining=bool(world.joining))
        return World(**values)

    @property
    def world(self) -> World:
        """The world as it is now; after close() the last one."""
        if self._handle:
            self._world = self._get_world()
        return self._world

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.world_size

    @property
    def features(self) -> tuple[Feature, ...]:
        return tuple(self._features)

    def close(self) -> None:
        """Collective in the usual case. Frees tables and routes; twice is fine."""
        if self._handle:
            self._world = self._get_world()
            for ahead_ in list(self._aheads):
                ahead_.end()
            _c.lib.covey_close(ctypes.byref(self._handle))
            self._kept.clear()
            self._requests.clear()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @staticmethod
    def _until_done(function: Any, *arguments: Any) -> None:
        """A call that sets up, between steps: what a world that changes undid is done again."""
        while (status := function(*arguments)) == _c.REDO:
            pass
        check(status)

    # ------------------------------------------------------------ elasticity

    def leave(self) -> None:
        """This rank wishes to leave: at the next commit its shards pass on, and step_begin raises Left. Returns at
        once. The wish of the last rank is refused. Any thread."""
        check(_c.lib.covey_leave(self._live()))

    def resize(self, world_size: int) -> None:
        """The job is to have world_size ranks, from the next commit on. Returns at once. Any rank, any thread."""
        check(_c.lib.covey_resize(self._live(), world_size))

    def leave_on_signals(self) -> None:
        """From now on SIGTERM and SIGUSR1 mean leave(), also for the last rank, until close().

        They get handlers in C, which act at once, whatever Python computes; so handlers given to signal.signal() before
        are not called meanwhile (close() puts them back), and one given to it afterwards takes covey's place. SIGINT
        stays Python's: KeyboardInterrupt. Processes that are forked get the handlers of before, so that they can be
        terminated."""
        check(_c.lib.covey_leave_on_signals(self._live()))
        _give_children_their_signals()

    def events(self) -> Iterator[Event]:
        """What befell the job since it was last asked, oldest first; nothing in a fixed world. Does not wait."""
        event = _initialised(_c.STRUCT_EVENT, _c.Event())
        while (status := _c.lib.covey_next_event(self._live(), ctypes.byref(event))) == _c.OK:
            values = {name: getattr(event, name) for name in Event._fields}
            values.update(kind=_EVENTS.get(event.kind, str(event.kind)), cause=event.cause.decode(),
                          operation=event.operation.decode())
            yield Event(**values)
        if status != _c.IN_PROGRESS:
            check(status)

    # ------------------------------------------------------------ tables

    def table(self, name: str, embedding_dim: int, *, optimizer: _c.Optimizer | None = None, **options: Any) -> Table:
        """Collective, between steps. Makes a table; options are the fields of covey_table_options: num_embeddings (0:
        any id), init ("uniform", "constant"), init_min, init_max, unknown_ids ("insert", "initial", "refuse"),
        refuse_negative, frozen, rows_type and (in fast mode) gradients_type ("fp32", "bf16", "fp16", "int8"), sharding
        ("auto", "row_wise", "table_wise", "column_wise", "data_parallel"), column_width, hot_rows ("auto", "off",
        "on"), pooling_factor, expected_rows."""
        settings = _initialised(_c.STRUCT_TABLE_OPTIONS, _c.TableOptions())
        if optimizer is not None:
            options["optimizer"] = optimizer
        _fill(settings, {"init": _INITS, "unknown_ids": _UNKNOWN_IDS, "rows_type": _PAYLOADS,
                         "gradients_type": _PAYLOADS, "sharding": _SHARDINGS, "hot_rows": _HOT_ROWS},
              {"name": name, "embedding_dim": embedding_dim, **options}, "Context.table")
        handle = ctypes.c_void_p()
        self._until_done(_c.lib.covey_table_create, self._live(), ctypes.byref(settings), ctypes.byref(handle))
        return Table(self, handle, name, embedding_dim)

    # ------------------------------------------------------------ one step

    def step_begin(self) -> Step:
        """Begins the next step. After Refused and Redo the same step number comes again. In an elastic job this is
        where the world changes. Frees the routes of the step before."""
        self._free_routes()
        step = _initialised(_c.STRUCT_STEP, _c.Step())
        status = _c.lib.covey_step_begin(self._live(), ctypes.byref(step))
        self.left = self.left or status == _c.LEFT
        check(status)
        self._step_open = True
        if step.epoch != self._epoch:
            self._epoch = step.epoch
            self._end_requests()
        return Step(*(getattr(step, name) for name in Step._fields))

    def step_cancel(self) -> None:
        """Gives the open step back before anything was done in it; the same number comes again. Not collective."""
        check(_c.lib.covey_step_cancel(self._live()))
        self._step_open = False

    def steps(self, count: int | None = None) -> Iterator[Attempt]:
        """The steps up to number `count`, each to be done and committed inside `with step:`. A step comes until it is
        committed. Ends when this rank has left, too: see `left`. Use `break` inside `with` where the end of the data
        shows only then; all ranks must come to it at the same step."""
        while True:
            try:
                step = Attempt(*self.step_begin())
                if count is not None and step.step >= count:
                    self._give_back()
                    return
            except Left:
                return
            except Redo:
                continue
            step._context = self
            yield step

    def prefetch(self, batches: Callable[[int, World], Any] | Iterable[Any], *,
                 arguments: Callable[[Any], Mapping[str, Any]] | None = None, depth: int = 1,
                 count: int | None = None) -> Iterator[tuple[Attempt, Any, Route]]:
        """steps() with data: each step, its batch and its route. Batches are fetched, and their routes built, on a
        thread of their own; right after a step's lookup the ids of the next `depth` batches are sent ahead, so that
        they travel and are found while this step computes.

            for step, batch, route in context.prefetch(batch_of):
                with step:
                    out = route.lookup()
                    ... forward, backward ...
                    route.backward(gradients)
                    context.step_commit()

        batches: a function (number, world) that gives this rank's share of the batch of a step, for which world.slices,
        slice_first and slice_count count, or None where the data is over. Or, in a world that is fixed, any iterable of
        this rank's shares. A share is a dict of route()'s arguments or a pair (values, lengths); or anything, from
        which arguments(share) makes such a dict. depth: 0 (routes are built ahead, nothing is sent) to prefetch_depth,
        an option of the context. count: as in steps(). All ranks must use the same depth and see the data end at the
        same step.

        A step that is refused comes again with the same batch and a new route; those on their way stay. When the world
        changes they are given up, and batches are asked for anew, from the step that then is. What the function raises
        is raised here: where its batch is to be sent, which is in the lookup of a step before, or used. The function is
        called by one thread at a time, but not the one that trains."""
        ahead_ = ahead(self, batches, arguments, depth, self._prefetch_depth, count)
        self._aheads.add(ahead_)
        return self._prefetched(ahead_, count)

    def _prefetched(self, ahead_: Ahead, count: int | None) -> Iterator[tuple[Attempt, Any, Route]]:
        try:
            for step in self.steps(count):
                built: Built = ahead_.of(step)
                if built.route is None:
                    self._give_back()
                    return
                yield step, built.batch, built.route
        finally:
            if self._handle:
                ahead_.end()

    def _give_back(self) -> None:
        """Cancels the open step; where its world is over, in the next one."""
        while self._step_open:
            try:
                self.step_cancel()
            except Redo:
                self.step_begin()

    def _free_routes(self) -> None:
        while self._used:
            self._used.pop().free()

    def _end_requests(self) -> None:
        """Requests that the world of before took with it; their buffers are the caller's again."""
        for request in [request for request in self._requests if request._epoch != self._epoch]:
            request._ended(_c.lib.covey_test(ctypes.byref(request._handle)))

    def route(self, values: np.ndarray, *, lengths: np.ndarray | None = None, offsets: np.ndarray | None = None,
              weights: np.ndarray | None = None, slice_samples: np.ndarray | None = None, read: bool = False) -> Route:
        """Not collective. Resolves the ids of this rank's share of a batch, feature-major.

        values: [ids] int64. lengths: [features * samples] or [features, samples], int64 or int32, or instead offsets:
        [features * samples + 1], from 0 to len(values). weights: [ids] float32. slice_samples: [slice_count] int64, the
        samples of each of this rank's slices, where they are not as even as can be. read: for evaluation; inserts
        nothing, needs no step, takes no backward."""
        features = self.features
        index = (np.int64, np.int32)
        array(values, "values", np.int64, (None,))
        if (lengths is None) == (offsets is None):
            raise ValueError("give either lengths or offsets")
        bounds = lengths if lengths is not None else offsets
        if lengths is not None and isinstance(lengths, np.ndarray) and lengths.ndim == 2:
            array(lengths, "lengths", index, (len(features), None))
        else:
            array(bounds, "lengths" if lengths is not None else "offsets", index, (None,))
        bags = bounds.size if lengths is not None else bounds.size - 1
        samples = bags // len(features) if features else 0
        if samples * len(features) != bags:
            raise ValueError(f"{'lengths' if lengths is not None else 'offsets'}: {bags} bags do not divide by the "
                             f"{len(features)} features of the context; bags lie feature by feature, each with all its "
                             "samples")
        batch = _initialised(_c.STRUCT_BATCH, _c.Batch())
        batch.samples, batch.values_count, batch.values = samples, values.size, address(values)
        batch.feature_count = len(features)
        batch.lengths, batch.offsets = address(lengths), address(offsets)
        batch.index_type = _DTYPES[bounds.dtype]
        if weights is not None:
            batch.weights = address(array(weights, "weights", np.float32, (values.size,)))
        if slice_samples is not None:
            batch.slice_samples = address(array(slice_samples, "slice_samples", np.int64, (self.world.slice_count,)))
        handle = ctypes.c_void_p()
        check(_c.lib.covey_route_build(self._live(), ctypes.byref(batch), _c.ROUTE_READ if read else 0,
                                       ctypes.byref(handle)))
        return Route(self, handle, features, samples, list(self._row_counts(features, samples, lengths, offsets)))

    @staticmethod
    def _row_counts(features: tuple[Feature, ...], samples: int, lengths: np.ndarray | None,
                    offsets: np.ndarray | None) -> Iterator[int]:
        """Rows of each feature's output: samples, or with pooling none its ids."""
        for number, feature in enumerate(features):
            first, last = number * samples, (number + 1) * samples
            if feature.pooling != "none":
                yield samples
            elif offsets is not None:
                yield int(offsets[last] - offsets[first])
            else:
                yield int(lengths.reshape(-1)[first:last].sum())

    def step_refuse(self, why: str) -> None:
        """Makes this rank refuse the open step; all ranks get Refused, with this reason, at the commit."""
        check(_c.lib.covey_step_refuse(self._live(), why.encode()))

    def step_commit(self) -> None:
        """Collective. On return the step is permanent on all ranks. Raises Refused or Redo when nothing of it was or
        will be applied. Requests begun in the step are done then."""
        status = _c.lib.covey_step_commit(self._live())
        self._step_open = self._step_open and status == _c.ERR_STATE
        check(status)

    # ------------------------------------------------------------ the dense part

    def dense_register(self, name: str, gradient: np.ndarray) -> int:
        """Registers a float32 gradient array and returns its number. Register in the order backward produces them."""
        array(gradient, "gradient", np.float32, writable=True)
        number = ctypes.c_int32()
        check(_c.lib.covey_dense_register(self._live(), name.encode(), address(gradient), gradient.size,
                                          ctypes.byref(number)))
        self._kept.append(gradient)
        return number.value

    def dense_ready(self, number: int, pass_: int = 0) -> None:
        """The registered array holds the gradient of pass `pass_`, summed over its samples; covey has read it on
        return."""
        check(_c.lib.covey_dense_ready(self._live(), number, pass_))

    def dense_wait(self) -> None:
        """Collective. On return every registered array holds its gradient, averaged over the samples of the step."""
        check(_c.lib.covey_dense_wait(self._live()))

    def state_register(self, name: str, data: np.ndarray) -> None:
        """Registers an array that is the same on all ranks after each commit: weights, optimizer state, counters."""
        array(data, "data", data.dtype if isinstance(data, np.ndarray) else np.float32, writable=True)
        check(_c.lib.covey_state_register(self._live(), name.encode(), address(data), data.nbytes))
        self._kept.append(data)

    def state_hash(self) -> str:
        """Collective, between steps. A fingerprint (32 hexadecimal digits) of all tables, their optimizer state and all
        registered state; in exact mode the same for every number of ranks."""
        out = _c.Hash()
        check(_c.lib.covey_state_hash(self._live(), ctypes.byref(out)))
        return f"{out.high:016x}{out.low:016x}"

    # ------------------------------------------------------------ plain collectives

    def all_reduce(self, src: np.ndarray, out: np.ndarray | None = None, op: str = "sum", *, wait: bool = True) -> Any:
        """Collective. out = op ("sum", "min", "max") over ranks of src: float32, float64, int32 or int64; the same bits
        on every rank. out may be src; without it a new array is made. With wait=False a Request is returned instead,
        and both arrays are covey's until it is done."""
        array(src, "src", list(_DTYPES))
        out = self._out(out, src.shape, src.dtype)
        return self._begin(_c.lib.covey_all_reduce, wait, out, (src,), address(src), address(out), src.size,
                           _DTYPES[src.dtype], _choose(_OPERATIONS, op, "op"))

    def broadcast(self, data: np.ndarray, root: int = 0, *, wait: bool = True) -> Any:
        """Collective. data of rank root to all, in place."""
        array(data, "data", data.dtype if isinstance(data, np.ndarray) else np.float32, writable=True)
        return self._begin(_c.lib.covey_broadcast, wait, data, (), address(data), data.nbytes, root)

    def all_gather(self, src: np.ndarray, out: np.ndarray | None = None, *, wait: bool = True) -> Any:
        """Collective. out [world_size, *src.shape], in rank order."""
        array(src, "src", src.dtype if isinstance(src, np.ndarray) else np.float32)
        out = self._out(out, (self.world_size, *src.shape), src.dtype)
        return self._begin(_c.lib.covey_all_gather, wait, out, (src,), address(src), src.nbytes, address(out))

    def all_to_allv(self, src: np.ndarray, send_counts: Sequence[int], recv_counts: Sequence[int],
                    out: np.ndarray | None = None, *, wait: bool = True) -> Any:
        """Collective. src [sum of send_counts] holds send_counts[r] elements for each rank r, one after the other; out
        [sum of recv_counts] takes recv_counts[r] from each."""
        send = np.asarray(send_counts, np.int64)
        recv = np.asarray(recv_counts, np.int64)
        for name, counts in (("send_counts", send), ("recv_counts", recv)):
            if counts.shape != (self.world_size,) or counts.min(initial=0) < 0:
                raise ValueError(f"{name}: expected {self.world_size} counts of at least 0, one per rank, got {counts}")
        array(src, "src", src.dtype if isinstance(src, np.ndarray) else np.float32, (int(send.sum()),))
        out = self._out(out, (int(recv.sum()),), src.dtype)
        send_bytes, recv_bytes = send * src.itemsize, recv * src.itemsize
        return self._begin(_c.lib.covey_all_to_allv, wait, out, (src, send_bytes, recv_bytes), address(src),
                           address(send_bytes), address(out), address(recv_bytes))

    def barrier(self) -> None:
        """Collective."""
        check(_c.lib.covey_barrier(self._live()))

    @staticmethod
    def _out(out: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.empty(shape, dtype) if out is None else array(out, "out", dtype, shape, writable=True)

    def _begin(self, function: Any, wait: bool, result: np.ndarray, buffers: tuple, *arguments: Any) -> Any:
        if wait:
            check(function(self._live(), *arguments, None))
            return result
        handle = ctypes.c_void_p()
        check(function(self._live(), *arguments, ctypes.byref(handle)))
        return Request(self, handle, result, buffers)

    # ------------------------------------------------------------ seeing what goes on

    def host_memory(self, size: int) -> np.ndarray:
        """Collective, between steps. [size] uint8 that all ranks of this host share, zeroed when made; it is gone when
        the context is closed. In an elastic job make all of them before the first step."""
        start = ctypes.c_void_p()
        self._until_done(_c.lib.covey_host_memory, self._live(), size, ctypes.byref(start))
        return np.frombuffer((ctypes.c_uint8 * size).from_address(start.value), np.uint8)

    def counters(self) -> Counters:
        """What this rank did and moved since it was opened."""
        counters = _initialised(_c.STRUCT_COUNTERS, _c.Counters())
        check(_c.lib.covey_get_counters(self._live(), ctypes.byref(counters)))
        values = {name: getattr(counters, name) for name in Counters._fields if name != "phase"}
        phases = {name: Phase(*(getattr(counters.phase[number], field) for field in Phase._fields))
                  for number, name in enumerate(_PHASES)}
        return Counters(**values, phase=phases)

    def describe(self, what: str = "topology") -> str:
        """A text about the context: topology, tables (collective), settings, state or plan."""
        number = _choose(_DESCRIBE, what, "what")
        needed = ctypes.c_uint64()
        check(_c.lib.covey_describe(self._live(), number, None, 0, ctypes.byref(needed)))
        buffer = ctypes.create_string_buffer(needed.value + 1)
        check(_c.lib.covey_describe(self._live(), number, buffer, needed.value + 1, None))
        return buffer.value.decode(errors="replace")
