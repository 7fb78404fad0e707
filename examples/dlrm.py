#!/usr/bin/env python3
"""Trains a DLRM on click logs with covey: examples/dlrm.c, in numpy.

    python3 dlrm.py --data clicks.tsv.xz                     one rank
    mpirun -n 4 python3 dlrm.py --data clicks.tsv.xz         four ranks, the same model, the same bits

The model, its first weights, the rows and their division into slices are those of dlrm.c, and so are the numbers, but
for the last bits of matrix products, which are numpy's here. Read dlrm.c for the reasons, this for the calls.
"""
import argparse

import gzip
import itertools
import json
import lzma
import os
import sys
import time

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
    """Rows as arrays: label [n] float32; dense [n, 13] float32, ln(x + 1); ids [n, 26] int64; present [n, 26] bool."""

    def __init__(self, label, dense, ids, present):
        self.label, self.dense, self.ids, self.present = label, dense, ids, present

    def __len__(self):
        return len(self.label)


class Clicks:
    """Click rows in Criteo layout from a file, or from standard input: a line a row."""

    def __init__(self, name):
        self.name = name
        self.lines = enumerate(open_packed(name), 1)

    def take(self, count):
        """Up to `count` rows that follow, not yet parsed: every rank passes over all lines, but parses only its own."""
        return list(itertools.islice(self.lines, count))

    def parse(self, taken):
        rows = Rows(np.zeros(len(taken), np.float32), np.zeros((len(taken), INTEGERS), np.float32),
                    np.zeros((len(taken), FIELDS), np.int64), np.zeros((len(taken), FIELDS), bool))
        for row, (number, line) in enumerate(taken):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) != 1 + INTEGERS + FIELDS:
                raise ValueError(f"{self.name}, line {number}: {len(cells)} columns, but a row has 40: label, I1 to I13, "
                                 "C1 to C26, tab between them")
            try:
                column, what = 0, "a label 0 or 1"
                rows.label[row] = {"0": 0, "1": 1}[cells[0]]
                what = "a whole number"
                for column in range(1, 1 + INTEGERS):
                    rows.dense[row, column - 1] = max(int(cells[column] or 0), 0) + 1
                what = "an id of at most 16 hexadecimal digits"
                for column in range(1 + INTEGERS, len(cells)):
                    if cells[column]:
                        field, number_of_id = column - 1 - INTEGERS, int(cells[column], 16)
                        rows.ids[row, field] = number_of_id - (number_of_id >> 63 << 64)  # as two's complement
                        rows.present[row, field] = True
            except (KeyError, ValueError, OverflowError):
                raise ValueError(f"{self.name}, line {number}, column {column + 1}, {cells[column]!r}: {what} belongs "
                                 "here") from None
        rows.dense = fixed_log(rows.dense)
        return rows


def open_packed(name):
    """The lines of a file, unpacked by what its first bytes say."""
    stream = sys.stdin.buffer if name == "-" else open(name, "rb")
    head = stream.peek(6)[:6]
    if head[:2] == b"\x1f\x8b":
        stream = gzip.open(stream)
    elif head == b"\xfd7zXZ\0":
        stream = lzma.open(stream)
    elif head[:3] == b"BZh":
        stream = bz2.open(stream)
    elif head[:4] == b"\x28\xb5\x2f\xfd":
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{name} is packed by zstd, which this Python cannot unpack: install python3-zstandard, or "
                             f"run `zstd -dc {name} | ...` with --data -") from None
        stream = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
    import io
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
        return self.generate(self.seed, np.arange(taken.start, taken.stop))[0]

    @classmethod
    def generate(cls, seed, numbers):
        """The rows of these numbers, and the logits that made their labels."""
        key = random_bits(seed, cls.of_row, numbers)
        draws = (mix64(key + u64(k) * GOLDEN) for k in itertools.count(1))
        logit = np.full(len(key), -2.6, np.float32)
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
        return Rows(label, dense, ids, present), logit

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


# ---------------------------------------------------------------- the model


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
        y = x @ self.w.T + self.b
        self.y = np.maximum(y, F(0), out=y) if self.relu else y
        return self.y

    def backward(self, dy):
        if self.relu:
            dy = np.where(self.y > 0, dy, F(0))
        np.matmul(dy.T, self.x, out=self.dw)
        np.sum(dy, axis=0, out=self.db)
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
        self.vectors = np.concatenate([x[:, None, :], embeddings.reshape(-1, FIELDS, self.dim)], axis=1)
        dots = self.vectors @ self.vectors.transpose(0, 2, 1)
        x = np.concatenate([x, dots[:, PAIR_I, PAIR_J]], axis=1)
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
        d_dots = np.zeros((len(label), VECTORS, VECTORS), np.float32)
        d_dots[:, PAIR_I, PAIR_J] = dx[:, self.dim:]
        d_dots[:, PAIR_J, PAIR_I] = dx[:, self.dim:]
        d_vectors = d_dots @ self.vectors
        d_vectors[:, 0] += dx[:, :self.dim]
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


# ---------------------------------------------------------------- one step


def slice_start(samples, slices, v):
    """The first sample of slice v when a batch is cut as evenly as can be, the first slices one longer."""
    return samples // slices * v + min(v, samples % slices)


class Trainer:
    def __init__(self, context, settings):
        self.context, self.settings = context, settings
        self.model = Model(settings.dim, settings.seed)
        self.tables = []
        for f in range(FIELDS):
            optimizer = covey.Optimizer(settings.optimizer, learning_rate=settings.lr)
            self.tables.append(context.table(f"C{f + 1}", settings.dim, optimizer=optimizer))
            self.tables[f].feature(f"C{f + 1}")
        self.dense_ids = {}
        for number in range(5, -1, -1):  # in the order in which backward is done with them
            layer = self.model.layers[number]
            name = f"{'bottom' if number < 3 else 'top'}.{number % 3}"
            self.dense_ids[layer] = context.dense_register(name, layer.gradients)
        context.state_register("weights", self.model.weights)
        context.state_register("squares", self.model.squares)
        self.logits, self.labels, self.curve = [], [], []

    def step(self, source, taken):
        """One step on one global batch, of which this rank parses and computes its slices."""
        context, model, step = self.context, self.model, self.context.step_begin()
        starts = [slice_start(len(taken), step.slices, v) for v in range(step.slices + 1)]
        first, last = starts[step.slice_first], starts[step.slice_first + step.slice_count]
        try:
            rows = source.parse(taken[first:last])
        except ValueError as error:  # go on with no samples: the others are told why at the commit
            context.step_refuse(str(error))
            rows, starts = source.parse(taken[:0]), [first] * len(starts)

        values = rows.ids.T[rows.present.T]  # feature by feature; a cell that is missing is an empty bag
        with context.route(values, lengths=np.ascontiguousarray(rows.present.T, np.int32)) as route:
            embeddings = route.lookup()
            gradients, share = np.empty_like(embeddings), np.zeros((2, len(taken)), np.float32)
            for number in range(step.pass_count):
                slices = step.slices_of_pass(number)
                part = slice(starts[slices.start] - first, starts[slices.stop] - first)
                share[0, first:last][part] = model.forward(rows.dense[part], embeddings[part])
                gradients[part] = model.backward(
                    rows.label[part], lambda layer: context.dense_ready(self.dense_ids[layer], number))
            if not np.isfinite(share).all():
                context.step_refuse("a prediction is not a number; a lower --lr or --dense-lr may help")
            share[1, first:first + len(rows)] = rows.label
            route.backward(gradients)
            context.dense_wait()
            context.step_commit()
        model.update(self.settings.dense_optimizer, self.settings.dense_lr)
        logits, labels = context.all_reduce(share)  # each sample is one rank's, so the sum is that rank's number
        self.logits.append(logits)
        self.labels.append(labels)
        self.curve.append(float(fixed_log_loss(logits, labels).sum(dtype=np.float64) / max(len(taken), 1)))

    def train(self):
        settings = self.settings
        began = time.monotonic()
        for _ in range(settings.epochs):
            source = open_data(settings.data)
            while not (settings.steps and len(self.curve) == settings.steps) and (taken := source.take(settings.batch)):
                self.step(source, taken)
        return time.monotonic() - began


# ---------------------------------------------------------------- what is measured, and the report


def score(logits, labels):
    """(mean log loss, AUC, normalised entropy): the loss over that of always answering the click rate."""
    clicks = int(labels.sum())
    if len(labels) == 0 or clicks in (0, len(labels)):
        return float(fixed_log_loss(logits, labels).mean(dtype=np.float64)) if len(labels) else 0.0, 0.5, 0.0
    loss = float(fixed_log_loss(logits, labels).mean(dtype=np.float64))
    _, where, ties = np.unique(logits, return_inverse=True, return_counts=True)
    rank = np.cumsum(ties) - (ties - 1) / 2  # of equal logits the mean of their ranks
    above = rank[where][labels > 0].sum() - clicks * (clicks + 1) / 2
    p = clicks / len(labels)
    return loss, float(above / (clicks * (len(labels) - clicks))), float(loss / -(p * np.log(p) + (1 - p) * np.log(1 - p)))


def make_report(trainer, seconds):
    context, settings, world = trainer.context, trainer.settings, trainer.context.world
    logits, labels = np.concatenate([[], *trainer.logits]), np.concatenate([[], *trainer.labels])
    logits, labels = logits.astype(np.float32), labels.astype(np.float32)
    late = len(labels) * 3 // 4
    loss, auc, ne = score(logits, labels)
    loss_late, auc_late, _ = score(logits[late:], labels[late:])
    counters = context.counters()
    totals = context.all_reduce(np.array([counters.ids, counters.unique_ids,
                                          *(phase.bytes_out for phase in counters.phase.values())], np.int64)).tolist()
    return {
        "version": covey.__version__, "world_size": world.world_size, "wire": world.wire, "mode": world.mode,
        "steps": len(trainer.curve), "samples": len(labels), "seconds": seconds,
        "samples_per_second": len(labels) / seconds, "loss": loss, "auc": auc, "auc_last_quarter": auc_late,
        "logloss_last_quarter": loss_late, "ne": ne, "state_hash": context.state_hash(),
        "bytes": dict(zip(counters.phase, totals[2:])), "unique_ids": totals[1], "ids": totals[0],
        "views": [{"epoch": world.epoch, "world_size": world.world_size, "first_step": world.resume_step,
                   "cause": world.cause}],
        "host": {"numpy": np.__version__, "topology": context.describe("topology")},
        "settings": vars(settings), "curve": trainer.curve[:settings.curve],
    }


def parse_options():
    parser = argparse.ArgumentParser(description="Trains a DLRM on click logs, on the ranks that mpirun started.")
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
    parser.add_argument("--curve", type=int, default=0, help="put the loss of the first N steps into the report")
    parser.add_argument("--report", help="write a JSON report to this file")
    return parser.parse_args()


def main():
    settings = parse_options()
    with covey.Context(wire=settings.wire, mode=settings.mode, slices=settings.slices, seed=settings.seed,
                       timeout_ms=settings.timeout_ms) as context:
        trainer = Trainer(context, settings)
        try:
            seconds = trainer.train()
        except (OSError, ValueError, covey.CoveyError) as error:
            if context.rank == 0 or not isinstance(error, covey.Refused):
                print(f"dlrm.py: {error}", file=sys.stderr)
            return 1
        report = make_report(trainer, seconds)
        if context.rank == 0:
            print(f"{report['samples']} samples on {report['world_size']} ranks, {report['samples_per_second']:.0f}/s, "
                  f"log loss {report['loss']:.4f}, AUC {report['auc']:.4f}, state {report['state_hash']}")
            if settings.report:
                with open(settings.report + ".part", "w") as file:
                    json.dump(report, file, indent=2)
                os.replace(settings.report + ".part", settings.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
