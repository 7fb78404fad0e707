"""The model of examples/dlrm in PyTorch on several ranks over gloo. Prints one JSON line.

usage: dlrm_gloo.py --data FILE [--ranks N] [--epochs N] [--batch N] [--seed N]
                    [--exchange all_to_all|send|gather]

Tables lie whole on one rank each (table-wise, as in DLRM by its authors), the networks on all. Each step: every rank
looks up its tables for the whole batch, pooled rows travel to the ranks whose samples they are, the networks compute,
the gradients of rows travel back, the networks' gradients are added up in one all_reduce that runs beside. Table
gradients are sparse, optimizers as in bench_torch.py.

The peer is helped where it can be. Every rank has the whole data parsed in memory, ids are places already, so no id
travels. All tables of a rank are one Embedding. All networks' gradients travel as one buffer. One thread a rank where
ranks share cores. Only the loop is timed. --exchange: how rows travel; gloo of torch 1.13 has all_to_all_single, which
was the fastest of the three (bench/NOTES.md).
"""
import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from bench_torch import DIM, FIELDS, INTEGERS, PAIR_I, PAIR_J, auc, network, read  # noqa: E402


def parts_of(count, ranks):
    """Where each rank's part of `count` things begins, and the end."""
    return [count * rank // ranks for rank in range(ranks + 1)]


class Exchange:
    """Blocks of floats to all ranks and from all ranks; sizes are floats for each rank."""

    def __init__(self, how, rank, ranks):
        self.rank, self.ranks = rank, ranks
        self.run = {"all_to_all": self.all_to_all, "send": self.send, "gather": self.gather}[how]

    def all_to_all(self, source, send, receive):
        out = torch.empty(sum(receive))
        dist.all_to_all_single(out, source, receive, send)
        return out

    def send(self, source, send, receive):
        out = torch.empty(sum(receive))
        sources, outs = source.split(send), out.split(receive)
        outs[self.rank].copy_(sources[self.rank])
        requests = []
        for shift in range(1, self.ranks):
            to, of = (self.rank + shift) % self.ranks, (self.rank - shift) % self.ranks
            requests += [dist.isend(sources[to], to), dist.irecv(outs[of], of)]
        for request in requests:
            request.wait()
        return out

    def gather(self, source, send, receive):
        """All blocks to all ranks; each takes its own. Blocks are of one size, so they are padded to the largest."""
        sizes = torch.zeros(self.ranks, self.ranks, dtype=torch.int64)
        sizes[self.rank] = torch.tensor(send)
        dist.all_reduce(sizes)
        most = int(sizes.sum(1).max())
        padded = functional.pad(source, (0, most - len(source)))
        everything = [torch.empty(most) for _ in range(self.ranks)]
        dist.all_gather(everything, padded)
        blocks = []
        for of, block in enumerate(everything):
            first = int(sizes[of, :self.rank].sum())
            blocks.append(block[first:first + receive[of]])
        return torch.cat(blocks)


class Rank:
    def __init__(self, rank, ranks, options, data):
        self.rank, self.ranks = rank, ranks
        label, dense, places, sizes = data
        self.fields = parts_of(FIELDS, ranks)
        mine = slice(self.fields[rank], self.fields[rank + 1])
        sizes = sizes[mine]
        shift = torch.from_numpy(np.cumsum([0, *sizes[:-1]]))
        nothing = sum(sizes)  # a missing cell is an empty bag: the row of zeros that is never trained
        self.table = nn.Embedding(nothing + 1, DIM, sparse=True, padding_idx=nothing)
        nn.init.uniform_(self.table.weight, -0.05, 0.05)
        self.table.weight.data[nothing] = 0
        torch.manual_seed(options.seed)  # the networks begin alike on all ranks
        self.bottom = network(INTEGERS, 64, 32, DIM, last_relu=True)
        self.top = network(DIM + len(PAIR_I), 64, 32, 1, last_relu=False)
        self.networks = [*self.bottom.parameters(), *self.top.parameters()]
        self.optimizers = [torch.optim.Adagrad(self.table.parameters(), lr=0.05, eps=1e-4),
                           torch.optim.Adagrad(self.networks, lr=0.02, eps=1e-8)]
        self.exchange = Exchange(options.exchange, rank, ranks)
        self.batches = []
        for first in range(0, len(label), options.batch):
            part = slice(first, min(first + options.batch, len(label)))
            samples = parts_of(part.stop - part.start, ranks)
            own = slice(first + samples[rank], first + samples[rank + 1])
            here = places[part, mine]
            self.batches.append((label[own], dense[own], torch.where(here < 0, nothing, here + shift), samples))

    def rows_of(self, ids, samples):
        """The pooled rows of my samples, and what is needed to bring their gradients back."""
        looked_up = self.table(ids)
        tables = [end - begin for begin, end in zip(self.fields, self.fields[1:])]
        counts = [end - begin for begin, end in zip(samples, samples[1:])]
        send = [count * tables[self.rank] * DIM for count in counts]
        receive = [counts[self.rank] * number * DIM for number in tables]
        received = self.exchange.run(looked_up.detach().reshape(-1), send, receive)
        blocks = [block.view(counts[self.rank], -1, DIM) for block in received.split(receive)]
        return torch.cat(blocks, 1).requires_grad_(), (looked_up, send, receive, tables)

    def return_gradients(self, gradient, way):
        looked_up, send, receive, tables = way
        blocks = torch.cat([block.reshape(-1) for block in gradient.split(tables, 1)])
        looked_up.backward(self.exchange.run(blocks, receive, send).view_as(looked_up))

    def step(self, labels, numbers, ids, samples):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        rows, way = self.rows_of(ids, samples)
        x = self.bottom(numbers)
        vectors = torch.cat([x[:, None], rows], 1)
        dots = torch.bmm(vectors, vectors.transpose(1, 2))[:, PAIR_I, PAIR_J]
        logits = self.top(torch.cat([x, dots], 1))[:, 0]
        loss = functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / samples[-1]
        loss.backward()
        gradients = torch.cat([parameter.grad.reshape(-1) for parameter in self.networks])
        adding = dist.all_reduce(gradients, async_op=True)
        self.return_gradients(rows.grad, way)
        self.optimizers[0].step()
        adding.wait()
        for parameter, gradient in zip(self.networks, gradients.split([p.numel() for p in self.networks])):
            parameter.grad = gradient.view_as(parameter)
        self.optimizers[1].step()
        return logits.detach()

    def train(self, epochs):
        """Seconds of the loop, and the logits of my samples."""
        logits = []
        dist.barrier()
        began = time.perf_counter()
        for _ in range(epochs):
            for batch in self.batches:
                logits.append(self.step(*batch))
        dist.barrier()
        return time.perf_counter() - began, torch.cat(logits)


def run(rank, options, data, folder):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.ranks))
    torch.manual_seed(1000 * options.seed + rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
    trainer = Rank(rank, options.ranks, options, data)
    seconds, logits = trainer.train(options.epochs)
    labels = torch.cat([batch[0] for batch in trainer.batches]).repeat(options.epochs)
    everything = [None] * options.ranks
    dist.all_gather_object(everything, (logits, labels))
    if rank == 0:
        samples = len(data[0]) * options.epochs
        logits, labels = (torch.cat([pair[i] for pair in everything]).numpy() for i in range(2))
        print(json.dumps({"name": "torch_gloo_dlrm", "samples_per_second": samples / seconds, "samples": samples,
                          "seconds": seconds, "ranks": options.ranks, "batch": options.batch,
                          "exchange": options.exchange, "auc": auc(logits, labels)}))
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--exchange", choices=["all_to_all", "send", "gather"], default="all_to_all")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive the fork
    data = read(options.data)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(run, (options, data, folder), options.ranks, start_method="fork")


if __name__ == "__main__":
    main()
