"""What is run by hand in other trainers: the page's blocks are found under their client's name, and the scripts are there."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "clients"


@pytest.fixture(scope="module")
def run():
    """The module of the script."""
    spec = importlib.util.spec_from_file_location("clients_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.once
def test_every_block_of_a_client_belongs_to_one_that_the_script_runs_and_is_python(run):
    page = run.PAGE.read_text()
    named = [block["client"] for block in run.BLOCK.finditer(page) if block["client"]]
    assert set(named) == set(run.SCRIPTS) and page.count("```python") == len(list(run.BLOCK.finditer(page)))
    for client, scripts in run.SCRIPTS.items():
        blocks = run.blocks(client)
        assert "def cross_entropy" in blocks[0] and len(blocks) == 1 + named.count(client)
        for body in blocks:
            compile(body, client, "exec")
        for script in scripts:
            compile((FOLDER / script).read_text(), script, "exec")
