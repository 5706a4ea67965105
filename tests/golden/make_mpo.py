"""Writes `mpo.npz`: what the reference's matrix product operators make of cores that two layers share, for `test_mpo.py`.

Run with a Python that has torch, on a checkout of lpyhdzx/MPOBERT-code (1b4291d): `python tests/golden/make_mpo.py CHECKOUT`.
The class of its `Matrix2MPO_beta.py` turns cores into the matrix; here that matrix is added to a weight.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

ROWS, COLUMNS, BOND = [2, 2, 2, 2, 2], [2, 2, 3, 2, 2], 3  # of digits; 32 rows, 48 columns
FILE = "src/pretraining/compress_tools_v2/Matrix2MPO_beta.py"


def main(checkout):
    spec = importlib.util.spec_from_file_location("reference", Path(checkout) / FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    mpo = module.MPO(ROWS, COLUMNS, BOND)
    bonds = mpo.mpo_truncate_ranks
    shape = lambda k: (bonds[k], ROWS[k], COLUMNS[k], bonds[k + 1])
    cores = {f"{n}/t{k}": torch.nn.Parameter(torch.randn(shape(k)) / 2) for n in range(2) for k in range(5) if k != 2}
    cores["central"] = torch.nn.Parameter(torch.randn(shape(2)) / 2)
    weights = [torch.randn(32, 48) / 6, torch.randn(32, 48) / 6]
    x = torch.randn(4, 32)

    def merged(n):
        own = [cores["central"] if k == 2 else cores[f"{n}/t{k}"] for k in range(5)]
        return weights[n] + 2 * mpo.mpo2matrix(own)

    def outputs():
        return torch.tanh(x @ merged(0))[:, :32] @ merged(1)

    out = {"x": x.numpy(), "y": outputs().detach().numpy()}
    out |= {f"w/{n}": weights[n].numpy() for n in range(2)} | {
        f"merged/{n}": merged(n).detach().numpy() for n in range(2)
    }
    out |= {f"before/{name}": core.detach().numpy().copy() for name, core in cores.items()}
    torch.sin(outputs()).sum().backward()
    out |= {f"gradient/{name}": core.grad.numpy().copy() for name, core in cores.items()}
    optimizer = torch.optim.AdamW(cores.values(), lr=0.01, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        torch.sin(outputs()).sum().backward()
        optimizer.step()
    out |= {f"after/{name}": core.detach().numpy().copy() for name, core in cores.items()}
    np.savez(Path(__file__).with_name("mpo.npz"), **out)


if __name__ == "__main__":
    main(sys.argv[1])
