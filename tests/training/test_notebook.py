"""The notebook of the documentation: its cells run from top to bottom, and what is committed has no outputs.

They run in this process, by `exec`, since a kernel would be one more package and a second process that compiles all anew. So
cells are plain Python, without the magics of a kernel.
"""

import json
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def cells(kind):
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_committed_without_outputs():
    whole = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert whole["nbformat"] == 4 and len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    assert [cell["id"] for cell in cells("code") if cell["outputs"] or cell["execution_count"]] == []
    assert [cell["id"] for cell in whole["cells"] if cell["metadata"]] == []


@pytest.mark.long
def test_the_cells_of_the_notebook_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    space = {"__name__": "notebook"}
    with jax.numpy_rank_promotion("allow"):  # what a reader's own session has
        for cell in cells("code"):
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}: {cell['id']}", "exec"), space)
    assert space["result"].after["loss"] < space["result"].before["loss"] - 1
    assert [line["step"] for line in space["train"]] == list(range(1, 21))
    assert len(space["axes"].lines[0].get_xdata()) == 20
    plt.close("all")
    printed = capsys.readouterr().out
    assert "trained " in printed and "before: " in printed and "after: " in printed
