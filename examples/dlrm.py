#!/usr/bin/env python3
"""Trains a DLRM on click logs with covey: examples/dlrm.c, in numpy.

    python3 dlrm.py --data clicks.tsv.xz                     one rank
    mpirun -n 4 python3 dlrm.py --data clicks.tsv.xz         four ranks, the same model, the same bits
    covey run -n 4 -- python3 dlrm.py --data clicks.tsv.xz   the same, and ranks may die, leave and enter

The model, its first weights, the rows, their division into slices and every sum's order are those of dlrm.c. So where
numpy computes with the BLAS that dlrm.c is linked to, the results are its results to the last bit, and a report of the
one has the state_hash of the other. Read dlrm.c for the reasons, this for the calls.

Ranks that die, leave or enter cost nothing more than this: the batch of a step is asked for by its number (Batches),
what is remembered from step to step is registered state, and what comes after a commit needs no other rank.
"""
from __future__ import annotations

import argparse
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import time
import zlib
from typing import Any, NamedTuple

# Ranks are the parallelism; and one thread means one order of adding. To be said before numpy is there.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import covey

INTEGERS, FIELDS = 13, 26
VECTORS = 1 + FIELDS
PAIR_I, PAIR_J = np.tril_indices(VECTORS, -1)  # the pairs i > j, row by row
GOLDEN = np.uint64(0x9e3779b97f4a7c15)
F = np.float32

# ---------------------------------------------------------------- fixed_math.h, element by element the same bits


def u64(value):
    return np.asarray(value, np.uint64).reshape(-1)  # arrays wrap around silently, single numbers warn


def fixed_exp(x):
    x = np.minimum(np.maximum(x, F(-87)), F(88))
    k = x * F(1.44269504) + F(12582912) - F(12582912)
    r = x - k * F(0.693359375) - k * F(-2.12194440e-4)
    p = F(1 / 5040)
    for divisor in (720, 120, 24, 6, 2, 1, 1):
        p = F(1 / divisor) + r * p
    return p * ((k.astype(np.int32) + 127).astype(np.uint32) << 23).view(np.float32)


def fixed_log(x):
    bits = x.view(np.uint32)
    e = (bits >> 23).astype(np.int32) - 127
    m = (bits & 0x7fffff | 0x3f800000).view(np.float32)
    upper = m > F(1.41421356)
    m = np.where(upper, m * F(0.5), m)
    e = e + upper
    t = (m - F(1)) / (m + F(1))
    u = t * t
    series = F(1 / 9)
    for divisor in (7, 5, 3, 1):
        series = F(1 / divisor) + u * series
    return e.astype(np.float32) * F(0.693147181) + F(2) * t * series


def fixed_sigmoid(x):
    return F(1) / (F(1) + fixed_exp(-x))


def fixed_log_loss(z, y):
    return np.where(z > 0, z, F(0)) - y * z + fixed_log(F(1) + fixed_exp(-np.abs(z)))


def mix64(x):
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xbf58476d1ce4e5b9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94d049bb133111eb)
    return x ^ x >> np.uint64(31)


def random_bits(seed, stream, i):
    return mix64(mix64(u64(seed) + GOLDEN * u64(stream + 1)) + GOLDEN * (u64(i) + np.uint64(1)))


def random_uniform(bits):
    return (bits >> np.uint64(40)).astype(np.float32) * F(1 / 16777216)


def random_normal(seed, stream, count):
    """Numbers 0 ... count - 1 of a stream."""
    total = np.full(count, -6, np.float32)
    for k in range(6):
        bits = random_bits(seed, stream, 6 * np.arange(count) + k)
        total += random_uniform(bits) + random_uniform(bits << np.uint64(32))
    return total


# ---------------------------------------------------------------- rows: labels, numbers, ids


class Rows:
    """Rows as arrays: label [n] float32; dense [n, 13] float32, ln(x + 1); ids [n, 26] int64; present [n, 26] bool;
    truth [n] float32, the logit that a generated label was drawn with."""

    def __init__(self, label, dense, ids, present, truth):
        self.label, self.dense, self.ids, self.present, self.truth = label, dense, ids, present, truth

    def __len__(self):
        return len(self.label)


class Clicks:
    """Click rows in Criteo layout from a file, or from standard input: a line a row."""

    columns = [("label", "[01]", "the label must be 0 or 1"),
               *((f"I{k + 1}", "(?:-?[0-9]{1,18})?", "a whole number of at most 18 digits belongs here")
                 for k in range(INTEGERS)),
               *((f"C{f + 1}", "[0-9a-fA-F]{0,16}", "an id of at most 16 hexadecimal digits belongs here")
                 for f in range(FIELDS))]
    row = re.compile("\t".join(pattern for _, pattern, _ in columns) + "\r?\n?")

    def __init__(self, name):
        self.name = name
        self.lines = enumerate(open_packed(name), 1)

    def take(self, count):
        """Up to `count` rows that follow, not yet parsed: every rank passes over all lines, but parses only its own."""
        return list(itertools.islice(self.lines, count))

    def parse(self, taken):
        cells = np.empty((len(taken), len(self.columns)), object)
        for row, (number, line) in enumerate(taken):
            if not self.row.fullmatch(line):
                raise ValueError(self.what_is_wrong(number, line.rstrip("\r\n").split("\t")))
            cells[row] = line.rstrip("\r\n").split("\t")
        integers, ids = cells[:, 1:1 + INTEGERS], cells[:, 1 + INTEGERS:]
        numbers = np.array([int(cell or 0) for cell in integers.flat], np.int64).reshape(integers.shape)
        codes = np.array([int(cell or "0", 16) for cell in ids.flat], np.uint64).reshape(ids.shape)
        return Rows(cells[:, 0].astype(np.float32), fixed_log((np.maximum(numbers, 0) + 1).astype(np.float32)),
                    codes.view(np.int64), ids != "", np.zeros(len(taken), np.float32))

    def what_is_wrong(self, number, cells):
        for column, (cell, (name, pattern, rule)) in enumerate(zip(cells, self.columns), 1):
            if not re.fullmatch(pattern, cell):
                return f"{self.name}, line {number}, column {column} ({name}), {cell[:23]!r}: {rule}"
        return f"{self.name}, line {number}: {len(cells)} columns, but a row has {len(self.columns)}: label, I1 to " \
               "I13, C1 to C26, tab between them"


def open_packed(name):
    """The lines of a file, unpacked by what its first bytes say."""
    stream = sys.stdin.buffer if name == "-" else open(name, "rb")
    head = stream.peek(6)[:6]
    if head[:2] == b"\x1f\x8b":
        stream = gzip.open(stream)
    elif head == b"\xfd7zXZ\0":
        stream = lzma.open(stream)
    elif head[:4] == b"\x28\xb5\x2f\xfd":
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{name} is packed by zstd, which this Python cannot unpack: install python3-zstandard, "
                             f"or run `zstd -dc {name} | ...` with --data -") from None
        stream = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
    return io.TextIOWrapper(stream, encoding="ascii", errors="replace", newline="\n")


class GeneratedClicks:
    """Made-up clicks, row for row those of click_generate() in clicks.c."""

    octaves = (18, 13, 12, 11, 12, 2, 11, 9, 6, 17, 15, 14, 4, 10, 13, 8, 3, 9, 4, 20, 22, 16, 12, 11, 6, 5)
    missing_together = (0x380601, 0x41a000)
    pairs = ((5, 8), (12, 16), (18, 24), (7, 25), (6, 15), (4, 17))
    of_row, of_weight, of_id, of_effect, of_pair = 0, 1, 2, 2 + FIELDS, 2 + 2 * FIELDS

    def __init__(self, rows, seed):
        self.rows, self.seed, self.next = rows, seed, 0

    def take(self, count):
        taken = range(self.next, min(self.next + count, self.rows))
        self.next = taken.stop
        return taken

    def parse(self, taken):
        return self.generate(self.seed, np.arange(taken.start, taken.stop))

    @classmethod
    def generate(cls, seed, numbers):
        key = random_bits(seed, cls.of_row, numbers)
        draws = (mix64(key + u64(k) * GOLDEN) for k in itertools.count(1))
        logit = np.full(len(key), -3.0, np.float32)
        dense = np.empty((len(key), INTEGERS), np.float32)
        for k in range(INTEGERS):
            bits, octaves = next(draws), 2 + 3 * (k % 5)
            x = np.where(bits >> np.uint64(29) & np.uint64(7), cls.draw_skewed(bits, octaves), np.uint64(0))
            dense[:, k] = fixed_log((x + np.uint64(1)).astype(np.float32))
            weight = F(0.15) * cls.small_normal(random_bits(seed, cls.of_weight, k))
            logit += weight * (dense[:, k] - F(0.3) * F(octaves))
        missing = next(draws)
        both = np.where(missing & np.uint64(7), 0, cls.missing_together[0]) | \
            np.where(missing >> np.uint64(3) & np.uint64(3), 0, cls.missing_together[1])
        present = (both[:, None] >> np.arange(FIELDS) & 1) == 0
        ids, ranks = np.empty((len(key), FIELDS), np.int64), []
        for f in range(FIELDS):
            ranks.append(cls.draw_skewed(next(draws), cls.octaves[f]))
            ids[:, f] = random_bits(0, cls.of_id + f, ranks[f]) >> np.uint64(24)
            effect = F(0.3) * cls.small_normal(random_bits(seed, cls.of_effect + f, ranks[f]))
            logit = np.where(present[:, f], logit + effect, logit)
        for p, (a, b) in enumerate(cls.pairs):
            effect = F(0.5) * cls.small_normal(random_bits(seed, cls.of_pair + 2 * p, ranks[a])) * \
                cls.small_normal(random_bits(seed, cls.of_pair + 2 * p + 1, ranks[b]))
            logit = np.where(present[:, a] & present[:, b], logit + effect, logit)
        label = (random_uniform(next(draws)) < fixed_sigmoid(logit)).astype(np.float32)
        return Rows(label, dense, ids, present, logit)

    @staticmethod
    def draw_skewed(bits, octaves):
        octave = (bits >> np.uint64(32)) * np.uint64(octaves) >> np.uint64(32)
        low = (np.uint64(1) << octave) - np.uint64(1)
        return low + (bits & low)

    @staticmethod
    def small_normal(bits):
        parts = [(bits >> np.uint64(shift) & np.uint64(0xffff)).astype(np.int64) for shift in (0, 16, 32, 48)]
        return (sum(parts) - 131070).astype(np.float32) * (F(1.73205081) / F(65536))


def open_data(name):
    if not name.startswith("gen:"):
        return Clicks(name)
    parts = name.split(":")[1:]
    if not all(part.isdigit() for part in parts) or len(parts) > 2 or int(parts[0]) == 0:
        raise ValueError(f"'{name}' should be gen:ROWS or gen:ROWS:SEED, whole numbers")
    return GeneratedClicks(int(parts[0]), int(parts[1]) if len(parts) > 1 else 1)


class Batches:
    """The global batches of all epochs by number: batch n belongs to step n, whenever a rank comes to it. Those that
    were asked for lately are at hand, as a step may come again; a rank that enters late passes over those before."""
    KEPT = 8  # more than are asked for ahead

    def __init__(self, settings):
        self.settings = settings
        self.rewind()

    def rewind(self):
        self.source, self.number, self.lately, self.epochs = None, -1, {}, iter(range(self.settings.epochs))

    def at(self, number):
        """Rows not yet parsed; none where the data is over."""
        if number <= self.number and number not in self.lately:
            self.rewind()
        while self.number < number:
            self.number += 1
            self.lately[self.number] = self.follow()
            self.lately.pop(self.number - self.KEPT, None)
        return self.lately[number] if not self.settings.steps or number < self.settings.steps else []

    def follow(self):
        while True:
            if self.source and (taken := self.source.take(self.settings.batch)):
                return taken
            if next(self.epochs, None) is None:
                return []
            self.source = open_data(self.settings.data)

    def parse(self, taken):
        return self.source.parse(taken)


# ---------------------------------------------------------------- the model


def multiply(a, b):
    """a @ b by the same routine of BLAS for any shape: numpy itself takes another for single rows and columns, which
    adds up in another order."""
    if a.shape[0] == 1:
        return (np.concatenate([a, np.zeros_like(a)]) @ b)[:1]
    if b.shape[1] == 1:
        return (a @ np.concatenate([b, np.zeros_like(b)], axis=1))[:, :1]
    return a @ b


class Layer:
    """y = relu(x w^T + b), the last layer without relu."""

    def __init__(self, number, size_in, size_out, relu, seed, weights, gradients):
        self.relu = relu
        cut = size_in * size_out
        self.w, self.b = weights[:cut].reshape(size_out, size_in), weights[cut:]
        self.dw, self.db = gradients[:cut].reshape(size_out, size_in), gradients[cut:]
        self.gradients = gradients
        self.w.reshape(-1)[:] = np.sqrt(F(2) / F(size_in + size_out)) * random_normal(seed, 2 * number, cut)
        self.b[:] = np.sqrt(F(1) / F(size_out)) * random_normal(seed, 2 * number + 1, size_out)

    def forward(self, x):
        self.x = x
        y = multiply(x, self.w.T) + self.b
        self.y = np.maximum(y, F(0), out=y) if self.relu else y
        return self.y

    def backward(self, dy):
        if self.relu:
            dy = np.where(self.y > 0, dy, F(0))
        self.dw[:] = multiply(dy.T, self.x)
        self.db[:] = dy.cumsum(axis=0)[-1] if len(dy) else 0  # one after the other, which sum() does not promise
        return dy @ self.w


class Model:
    """The dense part of the DLRM: two networks and the dot products between them."""

    def __init__(self, dim, seed):
        self.dim = dim
        sizes = [(INTEGERS, 64), (64, 32), (32, dim), (dim + len(PAIR_I), 64), (64, 32), (32, 1)]
        counts = [(size_in + 1) * size_out for size_in, size_out in sizes]
        self.weights, self.gradients, self.squares = (np.zeros(sum(counts), np.float32) for _ in range(3))
        self.layers, at = [], 0
        for number, ((size_in, size_out), count) in enumerate(zip(sizes, counts)):
            self.layers.append(Layer(number, size_in, size_out, number < 5, seed, self.weights[at:at + count],
                                     self.gradients[at:at + count]))
            at += count
        self.bottom, self.top = self.layers[:3], self.layers[3:]

    def forward(self, dense, embeddings):
        """Logits [n] of dense [n, 13] and embeddings [n, 26 * dim]."""
        x = dense
        for layer in self.bottom:
            x = layer.forward(x)
        vectors = np.concatenate([x[:, None, :], embeddings.reshape(-1, FIELDS, self.dim)], axis=1)
        self.vectors = np.ascontiguousarray(vectors.transpose(2, 1, 0))  # [dim, 27, n]: samples lie side by side
        dots = np.zeros((VECTORS, VECTORS, len(x)), np.float32)
        for column in self.vectors:
            dots += column[:, None] * column[None, :]
        x = np.concatenate([x, dots[PAIR_I, PAIR_J].T], axis=1)
        for layer in self.top:
            x = layer.forward(x)
        self.logits = x[:, 0]
        return self.logits

    def backward(self, label, ready):
        """The gradient of the embeddings [n, 26 * dim]; ready(layer) is called when a layer's gradients are there.
        Gradients are sums over the samples."""
        dx = (fixed_sigmoid(self.logits) - label)[:, None]
        for layer in reversed(self.top):
            dx = layer.backward(dx)
            ready(layer)
        d_dots = np.zeros((VECTORS, VECTORS, len(label)), np.float32)
        d_dots[PAIR_I, PAIR_J] = d_dots[PAIR_J, PAIR_I] = dx[:, self.dim:].T
        d_vectors = np.zeros_like(self.vectors)
        d_vectors[:, 0] = dx[:, :self.dim].T
        for j in range(VECTORS):
            d_vectors += d_dots[:, j] * self.vectors[:, j, None]
        d_vectors = d_vectors.transpose(2, 1, 0)
        dx = d_vectors[:, 0]
        for layer in reversed(self.bottom):
            dx = layer.backward(dx)
            ready(layer)
        return d_vectors[:, 1:].reshape(len(label), FIELDS * self.dim)

    def update(self, optimizer, lr):
        if optimizer == "adagrad":
            self.squares += self.gradients * self.gradients
            self.weights -= F(lr) * self.gradients / (np.sqrt(self.squares) + F(1e-8))
        else:
            self.weights -= F(lr) * self.gradients


# ---------------------------------------------------------------- what is measured

BINS, BINS_PER_UNIT, SEGMENTS = 4096, 128, 64
COUNTS = np.dtype([("samples", np.uint64), ("loss", np.float64), ("clicks", np.float64),
                   ("predicted", np.uint32, (2, BINS)), ("truth", np.uint32, (2, BINS))])


class Metrics:
    """Counters of predictions made before the sample was learned, in bins by label and logit. A run is counted in
    segments of equally many steps; when all are used, neighbours are merged and segments become twice as long. All of
    it lies in `memory`, which covey fills on a rank that enters."""

    def __init__(self):
        self.memory = np.zeros(1, [("steps", np.uint64), ("steps_per_segment", np.uint64),
                                   ("segment", COUNTS, SEGMENTS)])
        self.segment = self.memory["segment"][0]

    @property
    def steps(self):
        return int(self.memory["steps"][0])

    def add(self, logits, labels, truth, starts):
        """A committed batch, its slices beginning at `starts`. Returns the mean loss."""
        steps, per_segment = self.steps, max(int(self.memory["steps_per_segment"][0]), 1)
        if steps == SEGMENTS * per_segment:
            for name in COUNTS.names:
                field = self.segment[name]
                field[:SEGMENTS // 2] = field[::2] + field[1::2]
                field[SEGMENTS // 2:] = 0
            per_segment *= 2
        counts = self.segment[steps // per_segment]
        self.memory["steps"], self.memory["steps_per_segment"] = steps + 1, per_segment
        losses = fixed_log_loss(logits, labels).astype(np.float64)
        loss = 0.0
        for begin, end in itertools.pairwise(starts):
            loss += losses[begin:end].cumsum()[-1] if end > begin else 0.0
        counts["samples"] += np.uint64(len(labels))
        counts["loss"] += loss
        counts["clicks"] += labels.sum()
        for name, values in (("predicted", logits), ("truth", truth)):
            at = (values + F(BINS // 2 // BINS_PER_UNIT)) * F(BINS_PER_UNIT)
            np.add.at(counts[name], (labels.astype(np.int64), np.clip(at, 0, BINS - 1).astype(np.int64)), 1)
        return loss / max(len(labels), 1)

    def last_quarter(self):
        """The segment that begins nearest to three quarters of the samples."""
        samples = self.segment["samples"].astype(np.int64)
        before = np.cumsum(samples) - samples
        return min(int(np.count_nonzero(8 * before + 4 * samples < 6 * samples.sum())), SEGMENTS - 1)

    def score(self, begin=0):
        """(samples, loss, AUC, best AUC of any model, normalised entropy) from a segment on. Normalised entropy: the
        loss over that of always answering the click rate."""
        sums = {name: self.segment[name][begin:].sum(axis=0) for name in COUNTS.names}
        samples, loss, p = int(sums["samples"]), 0.0, 0.0
        if samples:
            loss, p = sums["loss"] / samples, sums["clicks"] / samples
        ne = loss / -(p * np.log(p) + (1 - p) * np.log(1 - p)) if 0 < p < 1 else 0.0
        return samples, float(loss), self.auc(sums["predicted"]), self.auc(sums["truth"]), float(ne)

    @staticmethod
    def auc(bins):
        """The probability that a click has a higher logit than a non-click, ties counting half."""
        others, clicks = bins.astype(np.float64)
        pairs = clicks.sum() * others.sum()
        return float(clicks @ (others.cumsum() - 0.5 * others) / pairs) if pairs else 0.5


# ---------------------------------------------------------------- one step


def slice_start(samples, slices, v):
    """The first sample of slice v when a batch is cut as evenly as can be, the first slices one longer."""
    return samples // slices * v + min(v, samples % slices)


class Share(NamedTuple):
    rows: Any
    samples: int  # of the whole batch
    starts: list  # of the slices
    first: int
    last: int
    error: str | None


def route_arguments(share):
    present = share.rows.present.T  # feature by feature; a cell that is missing is an empty bag
    return {"values": share.rows.ids.T[present], "lengths": np.ascontiguousarray(present, np.int32)}


class Trainer:
    def __init__(self, context, settings, **optimizer_options):
        self.context, self.settings = context, settings
        self.model = Model(settings.dim, settings.seed)
        self.tables = []
        for f in range(FIELDS):
            optimizer = covey.Optimizer(settings.optimizer, learning_rate=settings.lr, **optimizer_options)
            if settings.optimizer.endswith("adagrad"):
                optimizer.eps = 1e-4  # the gradients of rare ids are about so large: see dlrm.c
            table = context.table(f"C{f + 1}", settings.dim, optimizer=optimizer, init_min=-0.05, init_max=0.05)
            table.feature(table.name)
            self.tables.append(table)
        self.dense_ids = {}
        for number in range(5, -1, -1):  # in the order in which backward is done with them
            layer = self.model.layers[number]
            name = f"{'bottom' if number < 3 else 'top'}.{number % 3}"
            self.dense_ids[layer] = context.dense_register(name, layer.gradients)
        context.state_register("weights", self.model.weights)
        context.state_register("squares", self.model.squares)
        self.metrics = Metrics()
        context.state_register("metrics", self.metrics.memory)
        self.batches = Batches(settings)
        self.curve = {}                    # loss by step, of the steps that this rank saw
        self.samples, self.seconds = 0, 0  # trained since this rank is there
        self.views, self.epoch = [], None

    def take_world(self, step):
        """What this rank would make for its world or its slices, it would make anew here."""
        if step.epoch == self.epoch:
            return
        self.epoch, world = step.epoch, self.context.world
        self.views.append({"epoch": world.epoch, "world_size": world.world_size, "first_step": world.resume_step,
                           "cause": world.cause})
        for event in self.context.events():
            if event.kind == "changed" and event.epoch == self.epoch:
                self.views[-1].update(detect_ms=event.detect_ms, recover_ms=event.recover_ms)

    def share_of(self, number, world):
        """This rank's slices of a global batch, parsed; None where the data is over. Called beside the training."""
        taken = self.batches.at(number)
        if not taken:
            return None
        starts = [slice_start(len(taken), world.slices, v) for v in range(world.slices + 1)]
        first, last = starts[world.slice_first], starts[world.slice_first + world.slice_count]
        try:
            return Share(self.batches.parse(taken[first:last]), len(taken), starts, first, last, None)
        except ValueError as error:  # go on with no samples: the others are told why at the commit
            return Share(self.batches.parse(taken[:0]), len(taken), [0] * len(starts), 0, 0, str(error))

    def step(self, step, batch, route):
        """One step on one global batch, of which this rank computes its slices."""
        context, model = self.context, self.model
        rows, samples, starts, first, last, error = batch
        if error:
            context.step_refuse(error)
        with route:
            embeddings = route.lookup()
            gradients, share = np.empty_like(embeddings), np.zeros((3, samples), np.float32)
            for number in range(step.pass_count):
                slices = step.slices_of_pass(number)
                part = slice(starts[slices.start] - first, starts[slices.stop] - first)
                share[0, first:last][part] = model.forward(rows.dense[part], embeddings[part])
                gradients[part] = model.backward(
                    rows.label[part], lambda layer: context.dense_ready(self.dense_ids[layer], number))
            if not np.isfinite(share).all():
                context.step_refuse("a prediction is not a number; a lower --lr or --dense-lr may help")
            share[1, first:last], share[2, first:last] = rows.label, rows.truth
            sharing = context.all_reduce(share, wait=False)  # each sample is one rank's: the sum is that rank's number
            route.backward(gradients)
            context.dense_wait()
            time.sleep(self.settings.step_delay_ms / 1000)
            context.step_commit()
        model.update(self.settings.dense_optimizer, self.settings.dense_lr)
        logits, labels, truth = sharing.wait()  # a request begun in the step is done by the commit
        self.curve[step.step] = float(self.metrics.add(logits, labels, truth, starts))
        self.samples += samples

    def train(self):
        """Until the data is over, or this rank has left."""
        began = time.monotonic()
        for step, batch, route in self.context.prefetch(self.share_of, arguments=route_arguments,
                                                        depth=self.settings.prefetch):
            with step:
                self.take_world(step)
                self.step(step, batch, route)
        self.seconds += time.monotonic() - began


# ---------------------------------------------------------------- the report


def same_world(trainer):
    """All ranks go back to the loop when the world has changed since, also those whose own calls went well."""
    if trainer.context.world.epoch != trainer.epoch:
        raise covey.Redo("the world changed after the last step")


def make_report(trainer):
    context, settings, world = trainer.context, trainer.settings, trainer.context.world
    metrics, seconds = trainer.metrics, trainer.seconds
    samples, loss, auc, auc_best, ne = metrics.score()
    samples_late, loss_late, auc_late, auc_best_late, ne_late = metrics.score(metrics.last_quarter())
    counters = context.counters()
    totals = context.all_reduce(np.array([counters.ids, counters.unique_ids,
                                          *(phase.bytes_out for phase in counters.phase.values())], np.int64)).tolist()
    same_world(trainer)
    state_hash = context.state_hash()
    same_world(trainer)
    report = {
        "version": covey.__version__, "world_size": world.world_size, "wire": world.wire, "mode": world.mode,
        "steps": metrics.steps, "samples": samples, "seconds": seconds,
        "samples_per_second": trainer.samples / seconds, "loss": loss, "auc": auc, "auc_last_quarter": auc_late,
        "logloss_last_quarter": loss_late, "ne": ne, "ne_last_quarter": ne_late,
        "samples_last_quarter": samples_late, "state_hash": state_hash,
        "bytes": dict(zip(counters.phase, totals[2:])), "unique_ids": totals[1], "ids": totals[0],
        "views": trainer.views,
        "host": {"numpy": np.__version__, "topology": context.describe("topology")},
        "settings": vars(settings), "curve": [trainer.curve.get(n) for n in range(min(settings.curve, metrics.steps))],
    }
    if settings.data.startswith("gen:"):
        report.update(auc_best=auc_best, auc_best_last_quarter=auc_best_late)
    return report


def tell(report, settings):
    print(f"{report['samples']} samples on {report['world_size']} ranks, {report['samples_per_second']:.0f}/s, "
          f"log loss {report['loss']:.4f}, AUC {report['auc']:.4f}, state {report['state_hash']}", flush=True)
    if settings.report:
        try:
            with open(settings.report + ".part", "w") as file:
                json.dump(report, file, indent=2)
            os.replace(settings.report + ".part", settings.report)
        except OSError as error:
            raise ValueError(f"cannot write {settings.report}: {error.strerror}") from None


def parse_options():
    parser = argparse.ArgumentParser(description="Trains a DLRM on click logs, on the ranks that mpirun or covey run "
                                     "started.")
    parser.add_argument("--data", default="gen:300000", help="TSV in Criteo layout (plain, .gz, .xz, .zst), - for "
                        "standard input, or gen:ROWS[:SEED] for made-up clicks (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps; 0: at the end of the data")
    parser.add_argument("--batch", type=int, default=512, help="samples of all ranks together")
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--dim", type=int, default=16, help="of the embeddings")
    parser.add_argument("--optimizer", default="adagrad", help="of the tables")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--dense-optimizer", choices=["adagrad", "sgd"], default="adagrad")
    parser.add_argument("--dense-lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mode", choices=["exact", "fast"], default="exact")
    parser.add_argument("--wire", default="auto")
    parser.add_argument("--timeout-ms", type=int, default=60000)
    parser.add_argument("--elastic", choices=["auto", "on", "off"], default="auto", help="ranks may die, leave and "
                        "enter; auto: where whoever started them has arranged for it")
    parser.add_argument("--job", help="keep a file by which others find this job (elastic)")
    parser.add_argument("--join", help="enter the running job whose --job file this is (elastic)")
    parser.add_argument("--silence-ms", type=int, default=0, help="silence that makes a rank count as dead; 0: 2000")
    parser.add_argument("--stuck-limit-ms", type=int, default=0, help="standing still that expels a living rank; 0: 30 "
                        "times --silence-ms, -1: never")
    parser.add_argument("--step-delay-ms", type=int, default=0, help="make every step so much longer, for trials")
    parser.add_argument("--prefetch", type=int, default=1, help="batches whose ids are sent ahead (0 to 2)")
    parser.add_argument("--curve", type=int, default=0, help="put the loss of the first N steps into the report")
    parser.add_argument("--report", help="write a JSON report to this file")
    return parser.parse_args()


def work(trainer):
    """Trains and tells. If the world changes while the ranks tell they go back to the loop, which is at its end."""
    context = trainer.context
    while True:
        trainer.train()
        if context.left:
            print(f"dlrm.py: rank {context.rank} has left, as it was told, with {trainer.metrics.steps} steps "
                  "committed", file=sys.stderr)
            return
        try:
            report = make_report(trainer)
            if context.rank == 0:
                tell(report, trainer.settings)
            if context.world.elastic:  # the others stay until rank 0 has told: if it dies over it, another one will
                context.barrier()
            return
        except covey.WorldChanged:
            pass


def main():
    settings = parse_options()
    with covey.Context(wire=settings.wire, mode=settings.mode, slices=settings.slices, seed=settings.seed,
                       timeout_ms=settings.timeout_ms, elastic=settings.elastic, job_file=settings.job,
                       join=settings.join, silence_ms=settings.silence_ms,
                       stuck_limit_ms=settings.stuck_limit_ms) as context:
        if context.world.elastic:
            context.leave_on_signals()
        try:
            work(Trainer(context, settings))
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            print(f"dlrm.py: cannot read {settings.data}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
            return 1
        except (ValueError, covey.CoveyError) as error:
            if context.rank == 0 or not isinstance(error, covey.Refused):  # a refusal all ranks know
                print(f"dlrm.py: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
