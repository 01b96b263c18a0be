"""Which sample stands where in which global batch: the same for any number of processes.

Streaming's own partitions deal single samples to ranks in turn, so where a sample stands in the global batch
depends on how many ranks there are, and with it AEMIM's noise and choice. Here the global batches of an epoch
are made first and cut afterwards: rank `r` of batches of `B` reads rows `[r * B, (r + 1) * B)` of each.

A *canonical node* is a share of the shards that is fixed for a run. A global batch is the next samples of the
first canonical node, then those of the second, and so on. Machines whose number divides that of the canonical
nodes therefore read no shard of one another's share, except where a share begins within a shard; any other
number of machines reads the same batches, with more downloads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.batching import batching_methods
from streaming.base.shuffle import get_shuffle

if TYPE_CHECKING:
    from streaming.base.world import World

__all__ = ["GLOBAL_BATCHES", "check_divisible", "deal", "global_batches"]

GLOBAL_BATCHES = "aemim_global_batches"
_NOBODY = -1  # streaming skips such sample ids


def global_batches(
    sample_ids: NDArray[np.int64], *, canonical_nodes: int, global_batch_size: int, drop_first: int = 0
) -> NDArray[np.int64]:
    """Cut an epoch into global batches; what is left over at its end is dropped.

    Args:
        sample_ids: The epoch's samples, those of the first canonical node first, shape (samples,).
        canonical_nodes: Number of equal shares that the samples lie in.
        global_batch_size: Samples of one optimizer step.
        drop_first: Samples that the epoch has given already, a multiple of `canonical_nodes`; batches of
            another size may have given them.

    Returns:
        Sample ids of shape (batches, global_batch_size), int64.

    Raises:
        ValueError: A number is not a multiple of `canonical_nodes`.
    """
    check_divisible("global batch size", global_batch_size, canonical_nodes)
    check_divisible("sample in the epoch", drop_first, canonical_nodes)
    size, done = global_batch_size // canonical_nodes, drop_first // canonical_nodes
    # The borders are those of streaming's shuffles, which move no sample from one share to another.
    edges = [len(sample_ids) * node // canonical_nodes for node in range(canonical_nodes + 1)]
    shares = [sample_ids[edges[node] + done : edges[node + 1]] for node in range(canonical_nodes)]
    count = min(map(len, shares)) // size
    return np.concatenate([share[: count * size].reshape(count, size) for share in shares], axis=1)


def deal(batches: NDArray[np.int64], *, nodes: int, ranks_per_node: int, workers: int) -> NDArray[np.int64]:
    """Give every worker its rows of its batches.

    Args:
        batches: Global batches, shape (batches, global_batch_size).
        nodes: Number of machines.
        ranks_per_node: Processes on each, each with an equal share of a batch.
        workers: Data loading workers of each process. The loader takes a batch from each in turn, so worker
            `w` has batches `w`, `w + workers`, ….

    Returns:
        Sample ids as streaming takes them, shape (nodes, ranks_per_node, workers, batches of a worker,
        batch_size), int64; -1 where a worker has a batch fewer than others.
    """
    count, size = batches.shape
    turns = -(-count // workers)
    padded = np.full((turns * workers, size), _NOBODY, np.int64)
    padded[:count] = batches
    batch_size = size // (nodes * ranks_per_node)
    dealt = padded.reshape(turns, workers, nodes, ranks_per_node, batch_size)
    return np.ascontiguousarray(dealt.transpose(2, 3, 1, 0, 4))


def check_divisible(name: str, number: int, canonical_nodes: int) -> None:
    """Raise `ValueError` unless every canonical node has the same share of `number`."""
    if number % canonical_nodes:
        raise ValueError(
            f"{name} {number} with canonical_nodes={canonical_nodes}: expected a multiple; change either"
        )


def _generate(dataset: Any, world: World, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
    """The rest of an epoch, as streaming asks its batching methods for it, once on each machine."""
    units, sample_ids = dataset.resample_streams(epoch)
    nodes, seed = dataset.num_canonical_nodes, dataset.shuffle_seed
    if dataset.shuffle:
        block_size = dataset.shuffle_block_size
        sample_ids = sample_ids[get_shuffle(dataset.shuffle_algo, units, nodes, seed, epoch, block_size)]
    batches = global_batches(
        sample_ids,
        canonical_nodes=nodes,
        global_batch_size=dataset.batch_size * world.num_ranks,
        drop_first=sample_in_epoch,
    )
    return deal(
        batches, nodes=world.num_nodes, ranks_per_node=world.ranks_per_node, workers=world.workers_per_rank
    )


batching_methods[GLOBAL_BATCHES] = _generate  # where streaming looks a dataset's `batching_method` up
