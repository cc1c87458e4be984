"""Results of cells of the study, made up in place of trainings."""

import numpy as np

from experiments.networks.encoder import Encoder
from experiments.study.cell import Cell, Sizes

# Small networks of a few updates, with the seeds that an exact test needs.
TEXT = Sizes(
    width=8,
    num_heads=1,
    mlp_width=8,
    seq_len=6,
    vocab_size=20,
    num_train=32,
    num_validation=16,
    num_measured=8,
    batch_size=8,
    num_steps=4,
    num_observations=2,
    seeds=(0, 1),
)


def cell(sizes=TEXT, **options):
    return Cell(**{"sizes": sizes, "num_iters": 2, "learning_rate": 0.01} | options)


def made_up(
    cell: Cell, *, residual=0.1, entropy=0.8, accuracy=0.9, decades=(0.5, 0.6)
) -> dict:
    """What `train_and_measure` returns, in its shapes.

    Before training the residual is 0.5 and the entropy 0.9. Seed k has the residual
    times 1.01^k, with Sinkhorn a little more or less than that by turns, the entropy
    less column_tau k thousandths, and the accuracy less (1 - column_tau) k thousandths.
    `decades` are what each matrix of a product takes under softmax and Sinkhorn.
    """
    seeds = np.arange(len(cell.sizes.seeds))
    num_observations, depth = cell.sizes.num_observations + 1, cell.depth
    course = np.linspace(0, 1, num_observations)[:, None]  # [K, 1]

    def grid(first, last, num):
        """[S, K, num] from the first value to the last."""
        values = first + (np.asarray(last)[:, None, None] - first) * course
        return np.broadcast_to(values, (len(seeds), num_observations, num))

    by_turns = 1 + 2e-4 * (-1.0) ** seeds * bool(cell.num_iters)
    residuals = grid(0.5, residual * 1.01**seeds * by_turns, depth + 1)
    result = {
        "num_parameters": 7,
        "max_entropy": 3.0,
        "updates": np.linspace(0, cell.sizes.num_steps, num_observations).tolist(),
        "relative_residual": residuals,
        "words_residual": residuals,
        "entropy": grid(0.9, entropy - cell.column_tau * seeds / 1000, depth),
        "column_defect": grid(0.2, 0.1 + 0 * seeds, depth),
        "attention_gradient": grid(0.1, 0.2 + 0 * seeds, depth),
        "gradient": grid(0.2, 0.3 + 0 * seeds, depth),
        "train_loss": grid(0.7, 0.3 + 0 * seeds, 1)[:, 1:, 0],
        "validation_accuracy": accuracy + (cell.column_tau - 1) * seeds / 1000,
        "uniform_accuracy": 0.5 + 0.0 * seeds,
    }
    if cell.layer_norm == "pre" and cell.has_skip:
        lengths = np.arange(1, depth + 1)
        result["paths"] = {
            f"{kind}, {name}": (-each * lengths * 1.01 ** seeds[:, None]).tolist()
            for kind in ("sampled", "shuffled", "independent")
            for name, each in zip(("softmax", "Sinkhorn"), decades, strict=True)
        }
    listed = lambda x: x.tolist() if isinstance(x, np.ndarray) else x
    return {name: listed(each) for name, each in result.items()}


def encoder(cell: Cell) -> Encoder:
    """The network of a cell on text."""
    return cell.encoder(cell.sizes.vocab_size)
