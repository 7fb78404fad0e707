"""PyTorch's side of bench_lookup.py: the same pooled lookups and updates, told by lines what to run.

usage: torch_rows.py DIM ROWS THREADS L

    ids FILE          the ids from now on: int64, L to a bag; one half is a batch that comes before the other
    lookup            torch.nn.functional.embedding_bag, sum; ids are places in the weight. Timed after the batch before
    step              the same with a gradient to come, and the optimizer's gradients cleared
    backward          backward (a sparse gradient) and torch.optim.Adagrad's step (which coalesces it)
    write lookup FILE the pooled rows of the last lookup
    rows FILE         the rows of the first ids
"""
import sys
import time

import numpy as np
import torch
from torch.nn import functional

ROWS_SHOWN = 1000


class Worker:
    def __init__(self, dim, rows, threads, bag):
        torch.set_num_threads(threads)
        self.dim, self.bag = dim, bag
        ids = torch.arange(rows, dtype=torch.int64)
        self.weight = torch.nn.Parameter((ids % 1000).float()[:, None] + torch.arange(dim).float()[None])
        self.optimizer = torch.optim.Adagrad([self.weight], lr=1, eps=1e-8)
        self.pooled = None

    def ids(self, name):
        self.before, self.values = torch.from_numpy(np.fromfile(name, np.int64)).chunk(2)
        bags = len(self.values) // self.bag
        self.offsets = torch.arange(bags) * self.bag
        self.gradient = ((torch.arange(bags) % 7 - 3).float() * 0.25)[:, None].expand(bags, self.dim).contiguous()

    def lookup(self, values=None):
        with torch.no_grad():
            self.pooled = functional.embedding_bag(self.values if values is None else values, self.weight,
                                                   self.offsets, mode="sum")

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        self.pooled = functional.embedding_bag(self.values, self.weight, self.offsets, mode="sum", sparse=True)

    def backward(self):
        self.pooled.backward(self.gradient)
        self.optimizer.step()

    def write(self, what):
        self.pooled.detach().numpy().tofile(what.split(" ", 1)[1])

    def rows(self, name):
        self.weight.detach()[self.values[:ROWS_SHOWN]].numpy().tofile(name)


def main():
    worker = Worker(*map(int, sys.argv[1:5]))
    print("done", flush=True)
    for line in sys.stdin:
        name, _, rest = line.strip().partition(" ")
        if name == "lookup":
            worker.lookup(worker.before)
        began = time.perf_counter_ns()
        getattr(worker, name)(*([rest] if rest else []))
        print(time.perf_counter_ns() - began if not rest else "done", flush=True)


if __name__ == "__main__":
    main()
