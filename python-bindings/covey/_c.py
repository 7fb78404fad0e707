"""The C interface of covey, as ctypes sees it: constants, structs, functions. One to one with include/covey.h.

A test compares every struct's size and offsets, every constant and the list of functions with the C compiler's view.
"""
from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import json
import os
import pathlib
import urllib.parse
from ctypes import POINTER, c_char, c_char_p, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p

VERSION_MAJOR = 0
VERSION_MINOR = 1
VERSION_PATCH = 0

# ---------------------------------------------------------------- constants (COVEY_ left out)

OK, IN_PROGRESS, REDO, REFUSED, LEFT = 0, 1, 2, 3, 4
ERR_INVALID, ERR_NO_MEMORY, ERR_UNSUPPORTED, ERR_TIMED_OUT, ERR_IO = -1, -2, -3, -4, -5
ERR_MISMATCH, ERR_PEER_FAILED, ERR_BACKEND, ERR_STATE, ERR_EXPELLED, ERR_STOPPED = -6, -7, -8, -9, -10, -11

EXACT, FAST = 0, 1
POOLING_SUM, POOLING_MEAN, POOLING_MEAN_WEIGHTED, POOLING_NONE = 0, 1, 2, 3
AVERAGE_SAMPLES, AVERAGE_NONE = 0, 1
F32, F64, I32, I64, U8, BF16, F16, I8 = 0, 1, 2, 3, 4, 5, 6, 7
SUM, MIN, MAX = 0, 1, 2
VECTOR_AUTO, VECTOR_PLAIN, VECTOR_AVX2, VECTOR_AVX512 = 0, 1, 2, 3
BIND_AUTO, BIND_NONE, BIND_CORES = 0, 1, 2
ELASTIC_AUTO, ELASTIC_OFF, ELASTIC_ON = 0, 1, 2
(SHARDING_AUTO, SHARDING_ROW_WISE, SHARDING_TABLE_WISE, SHARDING_COLUMN_WISE,
 SHARDING_DATA_PARALLEL) = 0, 1, 2, 3, 4
HOT_AUTO, HOT_OFF, HOT_ON = 0, 1, 2
SGD, MOMENTUM, ADAGRAD, ROWWISE_ADAGRAD, ADAM, LAMB, FTRL = 0, 1, 2, 3, 4, 5, 6
DECAY_NONE, DECAY_COUPLED, DECAY_DECOUPLED = 0, 1, 2
SCHEDULE_CONSTANT, SCHEDULE_LINEAR, SCHEDULE_STEP = 0, 1, 2
INIT_UNIFORM, INIT_CONSTANT = 0, 1
UNKNOWN_INSERT, UNKNOWN_INITIAL, UNKNOWN_REFUSE = 0, 1, 2
PHASE_IDS, PHASE_ROWS, PHASE_GRADIENTS, PHASE_DENSE, PHASE_VOTE, PHASE_COLLECTIVE, PHASES = 0, 1, 2, 3, 4, 5, 6
(STRUCT_OPTIONS, STRUCT_WORLD, STRUCT_STEP, STRUCT_TABLE_OPTIONS, STRUCT_BATCH, STRUCT_TABLE_STATS,
 STRUCT_COUNTERS, STRUCT_EVENT) = 1, 2, 3, 4, 5, 6, 7, 8
EVENT_SUSPECT, EVENT_STUCK, EVENT_REVOKED, EVENT_CHANGED = 1, 2, 3, 4
ROUTE_READ = 1
DESCRIBE_TOPOLOGY, DESCRIBE_TABLES, DESCRIBE_SETTINGS, DESCRIBE_STATE, DESCRIBE_PLAN = 0, 1, 2, 3, 4

# ---------------------------------------------------------------- structs


class Options(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32), ("version", c_uint32),
        ("wire", c_char_p), ("mode", c_int32), ("slices", c_int32), ("shards", c_int32), ("timeout_ms", c_int32),
        ("gradient_average", c_int32), ("bind", c_int32), ("vector", c_int32), ("announce", c_int32),
        ("group_rank", c_int32), ("reserved", c_int32), ("seed", c_uint64), ("memory_limit", c_uint64),
        ("group", c_void_p), ("elastic", c_int32), ("silence_ms", c_int32), ("stuck_limit_ms", c_int32),
        ("reserved_elastic", c_int32), ("join", c_char_p), ("job_file", c_char_p), ("listen", c_char_p),
        ("threads", c_int32), ("prefetch_depth", c_int32), ("replica_limit", c_uint64),
    ]


class World(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32), ("version", c_uint32),
        ("epoch", c_uint64), ("resume_step", c_uint64), ("rank", c_int32), ("world_size", c_int32),
        ("local_rank", c_int32), ("local_world_size", c_int32),
        ("slices", c_int32), ("slice_first", c_int32), ("slice_count", c_int32),
        ("shards", c_int32), ("shard_count", c_int32), ("mode", c_int32),
        ("wire", c_char * 16), ("cause", c_char * 32), ("elastic", c_int32), ("joining", c_int32),
    ]


class Step(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32), ("version", c_uint32),
        ("step", c_uint64), ("epoch", c_uint64),
        ("slices", c_int32), ("slice_first", c_int32), ("slice_count", c_int32), ("pass_count", c_int32),
    ]


class Optimizer(ctypes.Structure):
    _fields_ = [
        ("kind", c_int32), ("learning_rate", c_float), ("eps", c_float), ("beta1", c_float), ("beta2", c_float),
        ("momentum", c_float), ("initial_accumulator", c_float), ("l1", c_float), ("l2", c_float), ("beta", c_float),
        ("weight_decay", c_float), ("weight_decay_mode", c_int32), ("nesterov", c_int32),
        ("rowwise_bias_correction", c_int32), ("clip_value", c_float), ("clip_norm", c_float),
        ("schedule", c_int32), ("decay_rate", c_float), ("final_factor", c_float), ("reserved", c_int32),
        ("warmup_steps", c_uint64), ("decay_steps", c_uint64),
    ]


class TableOptions(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32), ("version", c_uint32),
        ("name", c_char_p), ("num_embeddings", c_int64), ("embedding_dim", c_int32), ("data_type", c_int32),
        ("init", c_int32), ("init_min", c_float), ("init_max", c_float), ("unknown_ids", c_int32),
        ("refuse_negative", c_int32), ("frozen", c_int32), ("optimizer", Optimizer),
        ("sharding", c_int32), ("column_width", c_int32), ("hot_rows", c_int32), ("rows_type", c_int32),
        ("gradients_type", c_int32), ("pooling_factor", c_float), ("expected_rows", c_int64),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32), ("version", c_uint32),
        ("samples", c_int64), ("values_count", c_int64), ("values", c_void_p), ("lengths", c_void_p),
        ("offsets", c_void_p), ("weights", c_void_p), ("slice_samples", c_void_p),
        ("feature_count", c_int32), ("index_type", c_int32),
    ]


class Slab(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64)]


class TableStats(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32), ("version", c_uint32),
        ("rows", c_int64), ("shards", c_int64), ("row_bytes", c_uint64), ("bytes", c_uint64), ("log_bytes", c_uint64),
        ("ids", c_uint64), ("unique_ids", c_uint64),
    ]


class Phase(ctypes.Structure):
    _fields_ = [
        ("messages", c_uint64), ("bytes_out", c_uint64), ("payload_out", c_uint64), ("payload_self", c_uint64),
        ("wait_ns", c_uint64), ("work_ns", c_uint64),
    ]


class Counters(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32), ("version", c_uint32),
        ("steps_committed", c_uint64), ("steps_refused", c_uint64), ("samples_committed", c_uint64),
        ("ids", c_uint64), ("unique_ids", c_uint64), ("apply_ns", c_uint64), ("phase", Phase * PHASES),
    ]


class Event(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32), ("version", c_uint32),
        ("kind", c_int32), ("rank", c_int32), ("epoch", c_uint64), ("step", c_uint64), ("world_size", c_int32),
        ("ms", c_int32), ("detect_ms", c_int32), ("recover_ms", c_int32), ("cause", c_char * 32),
        ("operation", c_char * 32),
    ]


class Hash(ctypes.Structure):
    _fields_ = [("low", c_uint64), ("high", c_uint64)]


# The names of the C structs, for the layout test.
STRUCTS = {
    "covey_options": Options, "covey_world": World, "covey_step": Step, "covey_optimizer": Optimizer,
    "covey_table_options": TableOptions, "covey_batch": Batch, "covey_slab": Slab, "covey_table_stats": TableStats,
    "covey_phase": Phase, "covey_counters": Counters, "covey_event": Event, "covey_hash": Hash,
}

LogFunction = ctypes.CFUNCTYPE(None, c_void_p, c_int32, c_char_p, c_char_p)

# ---------------------------------------------------------------- functions: name -> (result, arguments)
# Handles are void pointers; arrays are passed as their address (the caller has checked dtype, shape and order).

_status = c_int32
_handle_out = POINTER(c_void_p)

FUNCTIONS = {
    "covey_version": (c_uint32, []),
    "covey_status_name": (c_char_p, [c_int32]),
    "covey_last_error": (c_char_p, []),
    "covey_struct_init": (_status, [c_int32, c_void_p, c_uint32]),
    "covey_open": (_status, [_handle_out, POINTER(Options)]),
    "covey_close": (None, [_handle_out]),
    "covey_group_create": (_status, [c_int32, _handle_out]),
    "covey_group_free": (None, [_handle_out]),
    "covey_get_world": (_status, [c_void_p, POINTER(World)]),
    "covey_host_memory": (_status, [c_void_p, c_uint64, _handle_out]),
    "covey_leave": (_status, [c_void_p]),
    "covey_resize": (_status, [c_void_p, c_int32]),
    "covey_leave_on_signals": (_status, [c_void_p]),
    "covey_next_event": (_status, [c_void_p, POINTER(Event)]),
    "covey_table_create": (_status, [c_void_p, POINTER(TableOptions), _handle_out]),
    "covey_feature_add": (_status, [c_void_p, c_char_p, c_int32, POINTER(c_int32)]),
    "covey_table_set_learning_rate": (_status, [c_void_p, c_float]),
    "covey_table_freeze": (_status, [c_void_p, c_int32]),
    "covey_table_read": (_status, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p]),
    "covey_table_write": (_status, [c_void_p, c_void_p, c_int64, c_void_p]),
    "covey_table_stats_get": (_status, [c_void_p, POINTER(TableStats)]),
    "covey_step_begin": (_status, [c_void_p, POINTER(Step)]),
    "covey_step_cancel": (_status, [c_void_p]),
    "covey_route_build": (_status, [c_void_p, POINTER(Batch), c_int32, _handle_out]),
    "covey_route_free": (None, [_handle_out]),
    "covey_lookup": (_status, [c_void_p, POINTER(Slab)]),
    "covey_backward": (_status, [c_void_p, POINTER(Slab)]),
    "covey_route_prefetch": (_status, [c_void_p]),
    "covey_step_refuse": (_status, [c_void_p, c_char_p]),
    "covey_step_commit": (_status, [c_void_p]),
    "covey_dense_register": (_status, [c_void_p, c_char_p, c_void_p, c_int64, POINTER(c_int32)]),
    "covey_dense_ready": (_status, [c_void_p, c_int32, c_int32]),
    "covey_dense_wait": (_status, [c_void_p]),
    "covey_state_register": (_status, [c_void_p, c_char_p, c_void_p, c_uint64]),
    "covey_state_hash": (_status, [c_void_p, POINTER(Hash)]),
    "covey_all_reduce": (_status, [c_void_p, c_void_p, c_void_p, c_int64, c_int32, c_int32, _handle_out]),
    "covey_broadcast": (_status, [c_void_p, c_void_p, c_int64, c_int32, _handle_out]),
    "covey_all_gather": (_status, [c_void_p, c_void_p, c_int64, c_void_p, _handle_out]),
    "covey_all_to_allv": (_status, [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, _handle_out]),
    "covey_barrier": (_status, [c_void_p]),
    "covey_wait": (_status, [_handle_out, c_int32]),
    "covey_test": (_status, [_handle_out]),
    "covey_get_counters": (_status, [c_void_p, POINTER(Counters)]),
    "covey_describe": (_status, [c_void_p, c_int32, c_void_p, c_uint64, POINTER(c_uint64)]),
    "covey_set_log": (None, [LogFunction, c_void_p]),
}

# ---------------------------------------------------------------- finding and loading the library


def _checkouts() -> list[pathlib.Path]:
    """Checkouts of covey this package may belong to: the one it lies in, and the one pip installed it from (pip keeps
    that address in direct_url.json, PEP 610), so that after `pip install ./python-bindings` it finds what was built
    beside it."""
    bindings = [pathlib.Path(__file__).resolve().parent.parent]
    try:
        origin = importlib.metadata.distribution("covey").read_text("direct_url.json")
        url = urllib.parse.urlparse(json.loads(origin)["url"]) if origin else None
        if url and url.scheme == "file":
            bindings.append(pathlib.Path(urllib.parse.unquote(url.path)))
    except (importlib.metadata.PackageNotFoundError, KeyError, ValueError):
        pass
    return [folder.parent for folder in bindings if (folder.parent / "include" / "covey.h").exists()]


def _candidates() -> list[str]:
    """Where the library may lie, best first. COVEY_LIBRARY is not a hint but an order."""
    given = os.environ.get("COVEY_LIBRARY")
    if given:
        return [given]
    built = [checkout / "build" / "lib" / "libcovey.so" for checkout in _checkouts()]
    found = ctypes.util.find_library("covey")
    system = [f"libcovey.so.{VERSION_MAJOR}"] + ([found] if found else [])
    return [str(path) for path in built if path.exists()] + system


def _load() -> ctypes.CDLL:
    tried = []
    for name in _candidates():
        try:
            # RTLD_LOCAL (ctypes' default) is enough: Open MPI's plugins are linked to Open MPI's own libraries, so
            # they need no global symbols of ours.
            library = ctypes.CDLL(name)
            break
        except OSError as error:
            tried.append(str(error))
    else:
        raise ImportError(
            "covey's C library was not found. Build it (meson setup build && ninja -C build) and run from the "
            "checkout, or install it (ninja -C build install), or set COVEY_LIBRARY to the path of libcovey.so. Tried: "
            + "; ".join(tried))
    for function, (result, arguments) in FUNCTIONS.items():
        try:
            entry = getattr(library, function)
        except AttributeError:
            raise ImportError(f"{library._name} has no function {function}: it is not the libcovey this package "
                              f"(version {VERSION_MAJOR}.{VERSION_MINOR}.{VERSION_PATCH}) was written for; update the "
                              "older of the two") from None
        entry.restype, entry.argtypes = result, arguments
    major = library.covey_version() // 10000
    if major != VERSION_MAJOR:
        raise ImportError(f"{library._name} is covey version {major}, this package is version {VERSION_MAJOR}; update "
                          "the older of the two, or point COVEY_LIBRARY at a library of the same version")
    return library


lib = _load()
