"""Writes `lorahub.npz`: the points that LoraHub's optimizer tries, nevergrad 1.0.12's NGOpt with the paper's settings.

Run with a Python that has nevergrad: `python tests/golden/make_lorahub.py`.
"""

from pathlib import Path

import nevergrad
import numpy as np

SIZE, STEPS, BOUND, PENALTY = 6, 40, 1.5, 0.05
LEAST = np.linspace(-1.2, 1.4, SIZE)


def main():
    tried = []

    def objective(point):
        tried.append(np.array(point))
        return float(np.sum((point - LEAST) ** 2) + PENALTY * np.mean(np.abs(point)))

    box = nevergrad.p.Array(init=[0] * SIZE, upper=[BOUND] * SIZE, lower=[-BOUND] * SIZE)
    best = nevergrad.optimizers.NGOpt(parametrization=box, budget=STEPS).minimize(objective).value
    np.savez(Path(__file__).with_name("lorahub.npz"), least=LEAST, tried=np.array(tried), best=best)


if __name__ == "__main__":
    main()
