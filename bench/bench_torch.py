"""The model of examples/dlrm in PyTorch, in one process: the peer of the trainer's benchmark. Prints one JSON line.

usage: bench_torch.py --data FILE [--epochs N] [--batch N] [--threads N] [--seed N] [--tables one|separate]

What is timed is the training loop alone: the rows lie parsed in memory, and ids are already places in the tables, so
the peer has its input for nothing while the trainer's figure includes unpacking and parsing. Tables are sparse and of
the right size from the start. --tables separate: an EmbeddingBag per field, as DLRM's authors wrote it; one (default):
all fields in one Embedding with places shifted by field, which spares most of the calls and is the faster.
"""
import argparse
import gzip
import json
import lzma
import time

import numpy as np
import torch
from torch import nn

INTEGERS, FIELDS, DIM = 13, 26, 16
PAIR_I, PAIR_J = torch.tril_indices(1 + FIELDS, 1 + FIELDS, -1)


def read(name):
    """label [n], ln(x + 1) of the integers [n, 13], places [n, 26] in a field's table or -1, and the table sizes."""
    with open(name, "rb") as file:
        head = file.read(6)
    unpack = lzma.open if head == b"\xfd7zXZ\0" else gzip.open if head[:2] == b"\x1f\x8b" else open
    with unpack(name, "rt") as file:
        cells = np.array([line.rstrip("\r\n").split("\t") for line in file], object)
    numbers = np.array([max(int(cell or 0), 0) for cell in cells[:, 1:1 + INTEGERS].flat], np.float32)
    places, sizes = np.full((len(cells), FIELDS), -1, np.int64), []
    for field in range(FIELDS):
        place_of = {}
        column = cells[:, 1 + INTEGERS + field]
        places[:, field] = [place_of.setdefault(cell, len(place_of)) if cell else -1 for cell in column]
        sizes.append(len(place_of))
    label = torch.from_numpy(cells[:, 0].astype(np.float32))
    return label, torch.from_numpy(np.log1p(numbers).reshape(-1, INTEGERS)), torch.from_numpy(places), sizes


def network(*sizes, last_relu):
    layers = []
    for size_in, size_out in zip(sizes, sizes[1:]):
        layer = nn.Linear(size_in, size_out)
        nn.init.normal_(layer.weight, 0, (2 / (size_in + size_out)) ** 0.5)
        nn.init.normal_(layer.bias, 0, (1 / size_out) ** 0.5)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers if last_relu else layers[:-1])


class SeparateTables(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(max(size, 1), DIM, mode="sum", sparse=True) for size in sizes)

    @staticmethod
    def prepare(places, sizes):
        """For each field the places that are there and where each sample's begin: a missing cell is an empty bag."""
        present = places >= 0
        return [(places[:, f][present[:, f]], present[:, f].cumsum(0) - present[:, f].long()) for f in range(FIELDS)]

    def forward(self, batch):
        return torch.stack([table(values, offsets) for table, (values, offsets) in zip(self.tables, batch)], 1)


class OneTable(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(sum(sizes) + 1, DIM, sparse=True, padding_idx=sum(sizes))])

    @staticmethod
    def prepare(places, sizes):
        shift = torch.from_numpy(np.cumsum([0, *sizes[:-1]]))
        return torch.where(places < 0, sum(sizes), places + shift)

    def forward(self, batch):
        return self.tables[0](batch)


class Dlrm(nn.Module):
    def __init__(self, tables):
        super().__init__()
        self.tables = tables
        for table in tables.tables:
            nn.init.uniform_(table.weight, -0.05, 0.05)
            if getattr(table, "padding_idx", None) is not None:
                table.weight.data[table.padding_idx] = 0
        self.bottom = network(INTEGERS, 64, 32, DIM, last_relu=True)
        self.top = network(DIM + len(PAIR_I), 64, 32, 1, last_relu=False)

    def forward(self, dense, batch):
        x = self.bottom(dense)
        vectors = torch.cat([x[:, None], self.tables(batch)], 1)
        dots = torch.bmm(vectors, vectors.transpose(1, 2))[:, PAIR_I, PAIR_J]
        return self.top(torch.cat([x, dots], 1))[:, 0]


def auc(logits, labels):
    """The probability that a click has a higher logit than a non-click."""
    rank = np.empty(len(logits))
    rank[np.argsort(logits, kind="stable")] = np.arange(1, len(logits) + 1)
    clicks = labels.sum()
    return float((rank[labels > 0].sum() - clicks * (clicks + 1) / 2) / (clicks * (len(labels) - clicks)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tables", choices=["separate", "one"], default="one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    label, dense, places, sizes = read(options.data)
    kind = SeparateTables if options.tables == "separate" else OneTable
    parts = [slice(i, i + options.batch) for i in range(0, len(label), options.batch)]
    batches = [(label[part], dense[part], kind.prepare(places[part], sizes)) for part in parts]
    model = Dlrm(kind(sizes))
    networks = [*model.bottom.parameters(), *model.top.parameters()]
    optimizers = [torch.optim.Adagrad(model.tables.parameters(), lr=0.05, eps=1e-4),
                  torch.optim.Adagrad(networks, lr=0.02, eps=1e-8)]
    loss_of = nn.BCEWithLogitsLoss()

    logits = []
    began = time.perf_counter()
    for _ in range(options.epochs):
        for labels, numbers, ids in batches:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            predicted = model(numbers, ids)
            loss_of(predicted, labels).backward()
            for optimizer in optimizers:
                optimizer.step()
            logits.append(predicted.detach())
    seconds = time.perf_counter() - began

    samples = len(label) * options.epochs
    print(json.dumps({"name": "torch_dlrm", "samples_per_second": samples / seconds, "samples": samples,
                      "seconds": seconds, "tables": options.tables, "threads": options.threads,
                      "auc": auc(torch.cat(logits).numpy(), label.repeat(options.epochs).numpy())}))


if __name__ == "__main__":
    main()
