"""Several processes that train together, one for each host of a pod, joined by JAX's own runtime.

All processes run the same program on the same settings. Each reads the data and keeps the rows of its own devices; process 0
alone prints and writes, the others work in a folder that is thrown away. Checkpoints are written by all.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

import jlora
from jlora.core.tree import placement
from jlora.training import folder
from jlora.training.errors import LostError, SettingError
from jlora.training.hosts import peers

Result = TypeVar("Result")
CHECKPOINTS = "checkpoints"
# The number of the last call of `multihost_utils.reached_preemption_sync_point`: one sequence for the life of the processes.
_calls = [0]
# What a resumed run reads from its folder before it trains.
_READ_ON_RESUME = ("settings.json", "metrics.jsonl")


def join(distributed: bool, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the processes of a run; to be called before anything else of JAX. Without any argument nothing is joined.

    Args:
        distributed: ask the surroundings (Slurm, GKE, Cloud TPU, Open MPI) who takes part, as `jax.distributed` does.
        coordinator: `host:port` of process 0, where the surroundings don't say.
        processes: how many take part.
        process: the number of this one, from 0.

    Raises:
        SettingError: if only some of the three are given, or they make no sense, or the surroundings don't tell.
        OSError: if the others can't be reached.
    """
    given = (coordinator, processes, process)
    if not distributed and all(value is None for value in given):
        return
    if not distributed:
        _check(coordinator, processes, process)
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except ValueError as error:
        raise SettingError(
            "--distributed",
            f"finds no cluster in its surroundings ({error}); give --coordinator, --processes and --process",
        ) from error
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0]
        raise OSError(f"process {process} could not join the others at {coordinator}: {first}") from error


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    for name, value in (("--coordinator", coordinator), ("--processes", processes), ("--process", process)):
        if value is None:
            raise SettingError(name, "is missing: --coordinator, --processes and --process belong together")
    assert coordinator is not None and processes is not None and process is not None
    if not coordinator.rpartition(":")[2].isdigit() or ":" not in coordinator:
        raise SettingError("--coordinator", f"must be host:port, got {coordinator!r}")
    if not 0 <= process < processes:
        raise SettingError("--process", f"must be from 0 to {processes - 1} for {processes} processes, got {process}")


def several() -> bool:
    """Whether more than one process takes part."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


together = peers.together


def beat() -> None:
    """From now on this process shows the others that it lives, if there are any."""
    others = peers.current()
    if others is not None:
        others.beat()


def preemption() -> Callable[[], bool] | None:
    """A function that says whether all processes are to stop now, since one of them had a SIGTERM.

    JAX's runtime takes SIGTERM as the word that a host will be taken away. It tells all processes, which agree on the call at
    which the function says so: they must call it equally often, once a step. A call takes less than a microsecond.

    Returns:
        None where that is turned off (`jax_enable_preemption_service`).
    """
    if not jax.config.values["jax_enable_preemption_service"]:
        return None
    calls = itertools.count(judged(_calls[0], max) + 1)

    def stops() -> bool:
        _calls[0] = next(calls)
        return multihost_utils.reached_preemption_sync_point(_calls[0])

    return stops


def put(array: Any, sharding: Sharding) -> jax.Array:
    """An array that every process has in full, on the devices of all; each keeps what lies on its own."""
    if not several() or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array))
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def whole_adapters(adapted: jlora.Adapted) -> jlora.Adapted:
    """An `Adapted` whose trained and constant arrays are complete in every process; the base stays as it lies."""
    if not several():
        return adapted
    return adapted.replace(params=placement.complete(adapted.params), frozen=placement.complete(adapted.frozen))


def by_first(action: Callable[[], Result]) -> Result:
    """What `action` returns in process 0, in all of them; an error there is one everywhere.

    Raises:
        LostError: an OSError, in the others, with the words of process 0's error, whatever that is.
    """
    with peers.together():
        others = peers.current()
        if others is None:
            return action()
        name = others.next_name()
        if not first():
            return _opened(others.told(name, 0))
        try:
            value = action()
        except Exception as error:
            others.tell(name, pickle.dumps((None, str(error))))
            raise
        others.tell(name, pickle.dumps((value, None)))
        return value


def _opened(told: bytes) -> Any:
    """What process 0 told."""
    value, words = pickle.loads(told)
    if words is not None:
        raise LostError(0, words)
    return value


def judged(value: Any, judge: Callable[[list[Any]], Result]) -> Result:
    """What `judge` makes, in process 0, of the values of all processes in their order; in all of them.

    Raises:
        LostError: an OSError, where another process gave up before.
    """
    with peers.together():
        others = peers.current()
        if others is None:
            return judge([value])
        name = others.next_name()
        others.tell(name, pickle.dumps(value))
        return by_first(lambda: judge([pickle.loads(others.told(name, number)) for number in range(others.count)]))


@contextlib.contextmanager
def claim(out: str | Path, resume: bool) -> Iterator[Path]:
    """The folder to write to: `out` in process 0, which holds it for all; in others one that is thrown away.

    Raises:
        FolderError: as `folder.claim`; in the other processes a LostError with the same words.
    """
    if not several():
        with folder.claim(out, resume) as claimed:
            yield claimed
        return
    with contextlib.ExitStack() as stack:
        by_first(lambda: str(stack.enter_context(folder.claim(out, resume))))
        yield Path(out) if first() else stack.enter_context(_apart(Path(out), resume))


@contextlib.contextmanager
def _apart(out: Path, resume: bool) -> Iterator[Path]:
    """A folder with what a resumed run reads, whose checkpoints are those of all."""
    with tempfile.TemporaryDirectory(prefix="jlora_process_") as name:
        apart = Path(name)
        for file in _READ_ON_RESUME if resume else ():
            if (out / file).exists():
                shutil.copy(out / file, apart / file)
        os.symlink((out / CHECKPOINTS).absolute(), apart / CHECKPOINTS)
        yield apart
