"""Writes `deeplinear.npz`: what the authors' compressed deep linear networks do, for `tests/methods/test_deeplinear.py`.

    python tests/golden/make_deeplinear.py FOLDER

FOLDER is a checkout of github.com/soominkwon/comp-deep-nets at commit 4349b87 (2024). Run with a Python that has jax, optax and
tqdm. What that code imports beside these is for its plots, and a blank module stands in for it. Their networks multiply from
the left; matrices are written transposed, as `[in, out]`, and so factors in the order from input to output.
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np

# Rows and columns of what is completed, its rank, and the share of its entries that is seen.
ROWS, COLUMNS, RANK, SEEN, EPS = 12, 9, 2, 0.7, 0.1
RUNS = {2: {"gd": 5.0, "adam": 0.01}, 3: {"gd": 5.0}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    sys.path.insert(0, str(parser.parse_args().folder))
    blanks = ("matplotlib", "matplotlib.pyplot", "matplotlib.collections", "matplotlib.ticker")
    sys.modules.update(dict.fromkeys(blanks, mock.MagicMock()))
    jax.config.update("jax_enable_x64", True)
    import loss
    import network
    import solver

    rng = np.random.default_rng(0)
    target = rng.standard_normal((COLUMNS, RANK)) @ rng.standard_normal((RANK, ROWS))
    mask = (rng.random((COLUMNS, ROWS)) < SEEN).astype(float)
    out = {"target": target.T, "mask": mask.T}
    for depth, rates in RUNS.items():
        whole, outer = network.kwon_compress_network(target * mask / SEEN, 2 * RANK, EPS, depth)
        # As in their notebooks: the outer square matrices are multiplied into the bases, and left away at depth 2.
        start = outer if depth == 2 else [whole[1] @ whole[0], whole[2], whole[4] @ whole[3]]
        out |= {f"{depth}/start/f{n}": np.array(factor.T) for n, factor in enumerate(start, 1)}
        for optimizer, rate in rates.items():
            losses = {"train": loss.create_loss(target, mask=mask)}
            run = solver.train(
                start, network.compute_end_to_end, losses, 1, rate, optimizer=optimizer, dlr=2.0, n_inner_loops=10
            )
            out |= {f"{depth}/{optimizer}/f{n}": np.array(factor.T) for n, factor in enumerate(run["final_weights"], 1)}
            out[f"{depth}/{optimizer}/losses"] = np.array(run["train_loss"])
    np.savez(Path(__file__).with_name("deeplinear.npz"), **out)


if __name__ == "__main__":
    main()
