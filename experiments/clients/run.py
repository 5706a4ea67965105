"""Runs what `docs/trainers.md` shows of a client, and the scripts beside this one that hold it against what it must do.

    python experiments/clients/run.py tunix|kauldron|keras|kerashub|haliax

By hand, in an environment that has the client: their pins contradict one another, and tunix's contradict jlora's, so that no
environment of CI can have them. Fails where a block or a check fails.
"""

from __future__ import annotations

import argparse
import re
import runpy
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "trainers.md"
BLOCK = re.compile(r'^```python(?: title="(?P<client>\w+)")?\n(?P<body>.*?)^```$', re.MULTILINE | re.DOTALL)

#: The scripts of each client.
SCRIPTS = {
    "tunix": ("tunix_trainers.py", "grpo.py"),
    "kauldron": ("kauldron_trainer.py",),
    "keras": (),
    "kerashub": (),
    "haliax": ("haliax_blocks.py",),
}


def blocks(client: str) -> list[str]:
    """The page's blocks that are run for a client: its first one, with the data, and those under the client's name."""
    found = [(block["client"], block["body"]) for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))]
    return [body for n, (name, body) in enumerate(found) if n == 0 or name == client]


def run_page(client: str) -> None:
    """Runs the blocks of a client."""
    space = {"__name__": "docs"}
    if client == "haliax":
        space |= runpy.run_path(str(FOLDER / "haliax_blocks.py"), run_name="haliax_blocks")
    if client == "kauldron":
        import flax.linen

        space |= {"nn": flax.linen}
    for body in blocks(client):
        exec(compile(body, str(PAGE), "exec"), space)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("client", choices=sorted(SCRIPTS))
    client = parser.parse_args().client
    sys.path.insert(0, str(FOLDER))
    run_page(client)
    print(f"{client}: the blocks of {PAGE.name} run", flush=True)
    for script in SCRIPTS[client]:
        print(f"{client}: {script}", flush=True)
        subprocess.run([sys.executable, str(FOLDER / script)], check=True)


if __name__ == "__main__":
    main()
