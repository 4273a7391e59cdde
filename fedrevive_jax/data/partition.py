"""How the training split is handed to clients: Dirichlet class mixes, IID, or natural groups."""

from dataclasses import dataclass

import numpy as np

from fedrevive_jax.compute.streams import Stream, numpy_generator
from fedrevive_jax.config import Config
from fedrevive_jax.data.dataset import Dataset
from fedrevive_jax.errors import ConfigError


@dataclass(frozen=True)
class Shards:
    """Which samples each client holds.

    Attributes:
      indices: int32 array, positions in the data set, all clients one after the other.
      offsets: int64 array [N+1]; client i holds indices[offsets[i]:offsets[i+1]], at least one.
    """

    indices: np.ndarray
    offsets: np.ndarray

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1

    def client(self, i: int) -> np.ndarray:
        """Sample positions of client i, int32."""
        return self.indices[self.offsets[i] : self.offsets[i + 1]]

    def class_mixes(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """True label histogram of every client, float32 [N, classes], rows sum to 1."""
        sizes = np.diff(self.offsets)
        rows = np.repeat(np.arange(self.num_clients), sizes)
        cells = rows * num_classes + labels[self.indices]
        counts = np.bincount(cells, minlength=self.num_clients * num_classes)
        return (counts.reshape(-1, num_classes) / sizes[:, None]).astype(np.float32)

    def batches(
        self, client: int, visit: int, *, steps: int, batch_size: int, seed: int
    ) -> np.ndarray:
        """Minibatches of one job: a walk through reshuffled passes of the client's own samples.

        Addressed by (seed, client, visit), so a job draws the same batches whenever it is trained.

        Returns:
          int32 array [steps, batch_size] of positions in the data set.
        """
        own = self.client(client)
        generator = numpy_generator(seed, Stream.BATCH_ORDER, client, visit)
        passes = -(-steps * batch_size // len(own))
        walk = np.concatenate([generator.permutation(own) for _ in range(passes)])
        return walk[: steps * batch_size].reshape(steps, batch_size)


def create(config: Config, dataset: Dataset) -> Shards:
    """Who holds what of a data set's training split, as a configuration names it."""
    return partition(
        config.partition,
        dataset.splits["train"],
        dataset.labels,
        num_classes=dataset.num_classes,
        num_clients=config.num_clients,
        samples_per_client=config.samples_per_client,
        alpha=config.alpha,
        seed=config.seed,
        groups=dataset.groups,
    )


def partition(
    kind: str,
    samples: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    num_clients: int,
    samples_per_client: int,
    alpha: float,
    seed: int,
    groups: np.ndarray | None = None,
) -> Shards:
    """Hands the training samples to clients.

    Args:
      kind: `dirichlet`, `iid` or `natural`.
      samples: int array, positions of the training samples in the data set.
      labels: int array over the whole data set.
      num_classes: number of classes.
      num_clients: N.
      samples_per_client: how many samples a client holds (not for `natural`).
      alpha: concentration of the Dirichlet class mixes.
      seed: seed of the partition.
      groups: int array over the whole data set, the natural owner of each sample.
    """
    generator = numpy_generator(seed, Stream.PARTITION)
    if kind == "dirichlet":
        return _dirichlet(
            generator, samples, labels, num_classes, num_clients, samples_per_client, alpha
        )
    if kind == "iid":
        return _iid(generator, samples, num_clients, samples_per_client)
    if groups is None:
        raise ConfigError(
            "partition", kind, "this data set has no natural groups; allowed: dirichlet, iid"
        )
    return _natural(generator, samples, groups, num_clients)


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _walk_round(generator: np.random.Generator, items: np.ndarray, count: int) -> np.ndarray:
    """The first `count` items of a walk through reshuffled passes of `items`."""
    passes = -(-count // len(items))
    return np.concatenate([generator.permutation(items) for _ in range(max(passes, 1))])[:count]


def _dirichlet(generator, samples, labels, num_classes, num_clients, per_client, alpha) -> Shards:
    """Class mix ~ Dirichlet(alpha) per client; samples handed out class by class, wrapping round.

    Never hangs: a class that runs out starts over, and the counts of a client are its mix rounded
    by largest remainders, so every client gets exactly `per_client` samples at any alpha.
    """
    own_labels = labels[samples]
    present = np.flatnonzero(np.bincount(own_labels, minlength=num_classes))
    # Beyond these, mixes are of one class or even, as at them; but sums and shares are no floats.
    alpha = min(max(alpha, 1e-100), 1e100)
    mixes = generator.dirichlet(np.full(len(present), alpha), size=num_clients)
    # For extremely small alpha all gamma draws may underflow; such a client gets a single class.
    broken = ~np.isfinite(mixes).all(axis=1) | (np.abs(mixes.sum(axis=1) - 1) > 1e-6)
    mixes[broken] = np.eye(len(present))[generator.integers(len(present), size=broken.sum())]

    exact = mixes * per_client
    counts = np.floor(exact).astype(np.int64)
    missing = per_client - counts.sum(axis=1)
    order = np.argsort(-(exact - counts), axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    counts += rank < missing[:, None]

    rows: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for column, label in enumerate(present):
        of_class = samples[own_labels == label]
        walk = _walk_round(generator, of_class, int(counts[:, column].sum()))
        for row, part in zip(rows, np.split(walk, np.cumsum(counts[:-1, column])), strict=True):
            row.append(part)
    indices = np.concatenate([part for row in rows for part in row]).astype(np.int32)
    return Shards(indices, _offsets(np.full(num_clients, per_client)))


def _iid(generator, samples, num_clients, per_client) -> Shards:
    indices = _walk_round(generator, samples, num_clients * per_client).astype(np.int32)
    return Shards(indices, _offsets(np.full(num_clients, per_client)))


def _natural(generator, samples, groups, num_clients) -> Shards:
    """One client per group; with more groups than clients, a random choice of groups."""
    owners, which, sizes = np.unique(groups[samples], return_inverse=True, return_counts=True)
    if num_clients > len(owners):
        raise ConfigError(
            "num_clients",
            num_clients,
            f"must be at most {len(owners)}, the number of natural groups in the training split",
        )
    chosen = np.sort(generator.permutation(len(owners))[:num_clients])
    by_owner = np.split(samples[np.argsort(which, kind="stable")], np.cumsum(sizes)[:-1])
    indices = np.concatenate([by_owner[i] for i in chosen]).astype(np.int32)
    return Shards(indices, _offsets(sizes[chosen]))
