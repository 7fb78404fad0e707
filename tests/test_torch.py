"""covey's numbers against PyTorch's: pooling, gradients, optimizers, and the loss curve of the DLRM."""
import argparse
import os
import pathlib
import sys
import unittest

import tap

try:
    import numpy as np
except ImportError:
    tap.skip_all("this Python has no numpy")
os.environ["OPENBLAS_NUM_THREADS"] = "1"
try:
    import torch
except ImportError:
    tap.skip_all("PyTorch is not installed (Debian: python3-torch)")

import covey

SOURCE_ROOT = pathlib.Path(os.environ.get("SOURCE_ROOT", pathlib.Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(SOURCE_ROOT / "examples"))
import dlrm

torch.set_num_threads(1)

ROWS, DIM, SAMPLES = 50, 16, 24


def close(case, ours, theirs, what, relative=1e-5):
    """Equal up to `relative` of the largest element: one that has cancelled to nearly 0 has no digits to compare."""
    theirs = theirs.detach().numpy()
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    case.assertLess(error, relative, what)


class Bags:
    """Drawn bags over ROWS ids; with all_rows each id comes at least once. Some bags are empty, some ids come again."""

    def __init__(self, seed, all_rows=False):
        draw = np.random.default_rng(seed)
        lengths = draw.integers(0, 6, SAMPLES)
        values = draw.zipf(1.3, lengths.sum()) % ROWS
        if all_rows:
            values = np.concatenate([values, draw.permutation(ROWS)])
            lengths[-1] += ROWS
        self.values, self.lengths = values.astype(np.int64), lengths.astype(np.int64)
        self.weights = draw.uniform(0.25, 2, values.size).astype(np.float32)
        self.target = draw.normal(size=(SAMPLES, DIM)).astype(np.float32)

    def torch_bag(self, rows, mode, weighted):
        offsets = torch.from_numpy(np.cumsum(self.lengths) - self.lengths)
        weights = torch.from_numpy(self.weights) if weighted else None
        return torch.nn.functional.embedding_bag(torch.from_numpy(self.values), rows, offsets, mode=mode,
                                                 per_sample_weights=weights)


def train_both(case, ours, make_theirs, *, pooling="sum", mode="sum", weighted=False, steps=20, all_rows=True,
               sparse=False):
    """Trains one table on least squares, with covey and with PyTorch, from the same rows."""
    every_id = np.arange(ROWS)
    with covey.Context() as context:
        table = context.table("t", DIM, optimizer=ours, init_min=-0.5, init_max=0.5)
        table.feature("f", pooling)
        rows = torch.from_numpy(table.read(every_id)).requires_grad_()
        theirs = make_theirs([rows])
        for step in range(steps):
            bags = Bags((11, step), all_rows)
            context.step_begin()
            with context.route(bags.values, lengths=bags.lengths, weights=bags.weights if weighted else None) as route:
                out = route.lookup()
                route.backward(out - bags.target)
                context.step_commit()
            theirs.zero_grad()
            wanted = bags.torch_bag(rows, mode, weighted)
            close(case, out, wanted, f"outputs of step {step}")
            (((wanted - torch.from_numpy(bags.target)) ** 2).sum() / 2 / SAMPLES).backward()
            if sparse:  # only what the step touched, as covey does
                touched = torch.from_numpy(np.unique(bags.values))
                rows.grad = torch.sparse_coo_tensor(touched[None], rows.grad[touched], rows.shape).coalesce()
            theirs.step()
        close(case, table.read(every_id), rows, "rows at the end")


def optimizer(kind, **options):
    return covey.Optimizer(kind, learning_rate=0.1, **options)


class Pooling(unittest.TestCase):
    """Forward, and backward by one step of SGD with learning rate 1, whose change is the gradient."""

    def one_step(self, **options):
        train_both(self, covey.Optimizer("sgd", learning_rate=1), lambda rows: torch.optim.SGD(rows, lr=1), steps=2,
                   all_rows=False, **options)

    def test_sum(self):
        self.one_step()

    def test_mean(self):
        self.one_step(pooling="mean", mode="mean")

    def test_weighted_sum(self):
        self.one_step(weighted=True)

    def test_weighted_mean(self):
        bags = Bags(5)
        with covey.Context() as context:
            table = context.table("t", DIM)
            table.feature("f", "mean_weighted")
            rows = torch.from_numpy(table.read(np.arange(ROWS)))
            with context.route(bags.values, lengths=bags.lengths, weights=bags.weights, read=True) as route:
                bag = np.repeat(np.arange(SAMPLES), bags.lengths)
                totals = np.bincount(bag, bags.weights, SAMPLES).astype(np.float32)
                wanted = bags.torch_bag(rows, "sum", True) / torch.from_numpy(np.maximum(totals, 1e-9))[:, None]
                close(self, route.lookup(), wanted, "outputs")


class Optimizers(unittest.TestCase):
    def test_sgd(self):
        train_both(self, optimizer("sgd"), lambda rows: torch.optim.SGD(rows, lr=0.1), all_rows=False)

    def test_sgd_with_weight_decay(self):
        train_both(self, optimizer("sgd", weight_decay=0.1, weight_decay_mode="coupled"),
                   lambda rows: torch.optim.SGD(rows, lr=0.1, weight_decay=0.1))

    def test_momentum(self):
        train_both(self, optimizer("momentum"), lambda rows: torch.optim.SGD(rows, lr=0.1, momentum=0.9))

    def test_momentum_with_nesterov_and_weight_decay(self):
        ours = optimizer("momentum", momentum=0.8, nesterov=1, weight_decay=0.05, weight_decay_mode="coupled")
        train_both(self, ours,
                   lambda rows: torch.optim.SGD(rows, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.05))

    def test_adagrad(self):
        train_both(self, optimizer("adagrad", eps=1e-10), lambda rows: torch.optim.Adagrad(rows, lr=0.1),
                   all_rows=False)

    def test_adagrad_with_initial_accumulator(self):
        train_both(self, optimizer("adagrad", eps=1e-10, initial_accumulator=0.3),
                   lambda rows: torch.optim.Adagrad(rows, lr=0.1, initial_accumulator_value=0.3), all_rows=False)

    def test_adagrad_with_weight_decay(self):
        train_both(self, optimizer("adagrad", eps=1e-10, weight_decay=0.1, weight_decay_mode="coupled"),
                   lambda rows: torch.optim.Adagrad(rows, lr=0.1, weight_decay=0.1))

    def test_adam(self):
        train_both(self, optimizer("adam"), lambda rows: torch.optim.Adam(rows, lr=0.1))

    def test_adam_with_other_betas_and_weight_decay(self):
        train_both(self, optimizer("adam", beta1=0.8, beta2=0.95, weight_decay=0.1, weight_decay_mode="coupled"),
                   lambda rows: torch.optim.Adam(rows, lr=0.1, betas=(0.8, 0.95), weight_decay=0.1))

    def test_adam_with_decoupled_weight_decay(self):
        train_both(self, optimizer("adam", weight_decay=0.1, weight_decay_mode="decoupled"),
                   lambda rows: torch.optim.AdamW(rows, lr=0.1, weight_decay=0.1))

    def test_adam_of_touched_rows(self):
        """SparseAdam leaves rows that a step does not touch alone, as covey does. It adds eps before the correction of
        the bias, covey after it, which is why eps is small here."""
        train_both(self, optimizer("adam", eps=1e-12), lambda rows: torch.optim.SparseAdam(rows, lr=0.1, eps=1e-12),
                   all_rows=False, sparse=True)


class TorchDlrm:
    """The model of dlrm.py in PyTorch, from the same first weights and rows."""

    def __init__(self, model, rows):
        self.layers = [tuple(torch.from_numpy(part.copy()).requires_grad_() for part in (layer.w, layer.b))
                       for layer in model.layers]
        self.dense = [parameter for layer in self.layers for parameter in layer]
        self.rows = torch.from_numpy(rows).requires_grad_()
        self.pairs = torch.from_numpy(np.stack([dlrm.PAIR_I, dlrm.PAIR_J]))

    def network(self, x, layers):
        for w, b in layers:
            x = torch.nn.functional.linear(x, w, b)
            x = torch.relu(x) if w.shape[0] > 1 else x
        return x

    def loss(self, rows, places):
        """places [n, 26]: where a cell's row lies, or the last row, which is zero and stays so."""
        dense = self.network(torch.from_numpy(rows.dense), self.layers[:3])
        embeddings = torch.nn.functional.embedding(places, self.rows, padding_idx=len(self.rows) - 1)
        vectors = torch.cat([dense[:, None], embeddings], 1)
        dots = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        logits = self.network(torch.cat([dense, dots], 1), self.layers[3:])[:, 0]
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(rows.label))


class Dlrm(unittest.TestCase):
    """Both train on the same generated clicks. The first step of a plain Adagrad is the learning rate whatever the size
    of the gradient, so that the last bit of a gradient or activation near 0 decides about a whole step, and two right
    programs part after a few. A start of the accumulators at 1e-6 takes that away and leaves the rest."""

    STEPS, BATCH = 100, 512

    def curves(self, kind, lr, dense_lr, accumulator=0.0):
        settings = argparse.Namespace(data=f"gen:{self.STEPS * self.BATCH}:3", epochs=1, steps=0, batch=self.BATCH,
                                      dim=16, seed=5, optimizer=kind, lr=lr, dense_optimizer=kind, dense_lr=dense_lr,
                                      step_delay_ms=0, prefetch=1)
        source = dlrm.open_data(settings.data)
        batches = [source.parse(source.take(self.BATCH)) for _ in range(self.STEPS)]
        cells = np.concatenate([batch.ids * dlrm.FIELDS + np.arange(dlrm.FIELDS) for batch in batches])
        unique, places = np.unique(cells, return_inverse=True)
        present = np.concatenate([batch.present for batch in batches])
        places = np.where(present, places.reshape(cells.shape), len(unique))
        with covey.Context(seed=settings.seed) as context:
            trainer = dlrm.Trainer(context, settings, initial_accumulator=accumulator)
            trainer.model.squares[:] = accumulator
            first = np.zeros((len(unique) + 1, settings.dim), np.float32)
            for f, table in enumerate(trainer.tables):
                mine = np.flatnonzero(unique % dlrm.FIELDS == f)
                first[mine] = table.read(unique[mine] // dlrm.FIELDS)
            theirs = TorchDlrm(trainer.model, first)
            trainer.train()
        optimizers = [torch.optim.SGD(theirs.dense, lr=dense_lr), torch.optim.SGD([theirs.rows], lr=lr)]
        if kind == "adagrad":
            optimizers = [
                torch.optim.Adagrad(theirs.dense, lr=dense_lr, eps=1e-8, initial_accumulator_value=accumulator),
                torch.optim.Adagrad([theirs.rows], lr=lr, eps=1e-4, initial_accumulator_value=accumulator)]
        curve = []
        for step, batch in enumerate(batches):
            for optimizer_ in optimizers:
                optimizer_.zero_grad()
            loss = theirs.loss(batch, torch.from_numpy(places[step * self.BATCH:(step + 1) * self.BATCH]))
            loss.backward()
            for optimizer_ in optimizers:
                optimizer_.step()
            curve.append(loss.item())
        return np.array([trainer.curve[n] for n in range(self.STEPS)]), np.array(curve)

    def check(self, ours, theirs):
        self.assertEqual(len(ours), self.STEPS)
        self.assertLess(ours[-20:].mean(), ours[:20].mean() - 0.02, "it has not learned anything")
        apart = np.abs(ours / theirs - 1)
        self.assertLess(apart.max(), 1e-4, f"at step {apart.argmax()}")

    def test_loss_curve_with_sgd(self):
        self.check(*self.curves("sgd", 0.5, 0.05))

    def test_loss_curve_with_adagrad(self):
        self.check(*self.curves("adagrad", 0.05, 0.02, accumulator=1e-6))


if __name__ == "__main__":
    tap.main()
