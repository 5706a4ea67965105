"""What a process knows of the others of its run: what they tell, and that one of them gave up or died."""

import itertools
import threading
import time

import jax
import pytest

from jlora.training import folder
from jlora.training.errors import DivergenceError, LostError, Stopped
from jlora.training.hosts import agreement, peers, versions
from jlora.training.hosts.agreement import Part

pytestmark = pytest.mark.once


MET = []


class Store:
    """The key-value store of `jax.distributed`, in one process."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set_bytes(self, key, value, allow_overwrite=False):
        with self.changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get_bytes(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]

    def key_value_dir_get_bytes(self, prefix):
        with self.changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


@pytest.fixture
def ended(monkeypatch):
    """The exit codes with which processes were ended; all waits are short."""
    codes = []
    for name, seconds in (("_LOOK", 0.02), ("_PATIENCE", 0.5), ("_LITTLE_PATIENCE", 0.2), ("_GRACE", 0.2)):
        monkeypatch.setattr(peers, name, seconds)
    monkeypatch.setattr(peers, "_meetings", itertools.repeat(0))
    monkeypatch.setattr(peers.os, "_exit", codes.append)
    yield codes
    for process in MET:
        process._left.set()
    MET.clear()
    for thread in [thread for thread in threading.enumerate() if thread.name == "peers"]:
        thread.join()


def meet(count=2):
    store = Store()
    MET.extend(peers.Peers(store, number, count) for number in range(count))
    return MET[-count:]


def die(process):
    """Signs of life end, and nothing is said: as after SIGKILL."""
    process.beat()
    time.sleep(0.1)
    process._left.set()


def wait_until(holds, seconds=20):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_texts_of_any_length_reach_all_and_whoever_waits_learns_why_another_gave_up(ended):
    first, second = meet()
    first.tell("a", b"")
    second.tell("a", b"x" * 100_000)
    assert [second.told("a", 0), first.told("a", 1)] == [b"", b"x" * 100_000]
    second.leave(ValueError("no\nrows"))
    with pytest.raises(LostError, match="^process 1 gave up: no rows$") as caught:
        first.told("b", 1)
    assert caught.value.code == 2
    first.leave(caught.value)
    assert ended == []


def test_a_process_whose_signs_of_life_end_is_dead_and_the_others_end_with_a_sentence(ended, capsys):
    first, second, third = meet(3)
    third._patience = 1000.0  # it is told by the first
    die(second)
    wait_until(lambda: sorted(ended) == [5, 5])
    assert capsys.readouterr().err.count("jlora: process 1 died; start all processes again with --resume\n") == 2
    assert str(third.lost) == str(first.lost)


def test_a_process_that_is_done_is_not_dead(ended):
    first, second = meet()
    second.beat()
    second.leave(None)
    time.sleep(1.0)
    assert first.lost is None and ended == []
    first.leave(None)


@pytest.mark.parametrize("error", [Stopped("run", 3), DivergenceError("the loss is nan"), LostError(0)])
def test_what_all_meet_by_themselves_makes_none_give_up_the_others(error, ended):
    first, second = meet()
    second.leave(error)
    time.sleep(0.2)
    assert first.lost is None and ended == []
    first.leave(None)


def test_a_process_that_hangs_is_ended_after_another_gave_up(ended, capsys, monkeypatch):
    shut = []
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: shut.append(True))
    _, second = meet()
    second.leave(ValueError("no rows"))
    wait_until(lambda: ended == [2])
    assert shut == [True] and capsys.readouterr().err == "\njlora: process 1 gave up: no rows\n"


def test_a_process_is_ended_soon_after_another_was_ended_by_hand(ended, monkeypatch):
    monkeypatch.setattr(peers, "_GRACE", 1000.0)
    _, second = meet()
    second.leave(KeyboardInterrupt())
    wait_until(lambda: ended == [2])


def test_an_error_in_the_exchange_between_devices_is_told_as_what_caused_it(ended):
    error = ValueError("UNKNOWN: Gloo all-reduce failed: connection closed by peer")
    first, second, third = meet(3)
    second.leave(ValueError("no rows"))
    with pytest.raises(LostError, match="process 1 gave up: no rows"):
        first.leave(error)
    wait_until(lambda: third.lost is not None)
    assert str(third.lost) == "process 1 gave up: no rows"  # and not what the first met
    third.leave(third.lost)
    first, second = meet()
    first.leave(error)  # nothing else is known: it is the reason itself
    with pytest.raises(LostError, match="process 0 gave up: UNKNOWN: Gloo"):
        second.told("a", 0)
    second.leave(None)


@pytest.mark.parametrize(
    ("everyone", "found"),
    [
        ([["1", "2"], ["1", "2"]], None),
        ([["1", "2"], ["1", "2"], ["0", "3"]], (2, "a", "0", "1")),
        ([["1", "2"], ["1", "3"], ["0", "2"]], (1, "b", "3", "2")),
    ],
)
def test_the_first_difference_is_told_with_its_process(everyone, found):
    assert agreement._difference([[Part(*part) for part in zip("ab", values)] for values in everyone]) == found


def test_the_sign_by_which_a_folder_is_known_leaves_no_trace_and_is_no_content(tmp_path):
    out = tmp_path / "a" / "run"
    with folder.sign(out) as name:
        assert agreement._appears(out / name, 0.0) and not agreement._appears(out / "other", 0.1)
        folder.check_free(out, resume=False)
    assert not out.exists()
    out.mkdir()
    with folder.sign(out):
        (out / "settings.json").touch()
    assert [path.name for path in out.iterdir()] == ["settings.json"]


def test_the_environment_is_what_decides_about_numbers_and_not_where_a_process_writes(monkeypatch):
    jax.devices()  # before XLA reads flags that it does not have
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_dump_to=/tmp/0 --xla_b=2")
    before = versions.environment()
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=2 --xla_a=1")
    with jax.log_compiles():
        assert versions.environment() == before
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=3 --xla_a=1")
    with jax.default_matmul_precision("float32"):
        now = versions.environment()
    assert {name for name in now if now[name] != before[name]} == {"XLA_FLAGS", "jax_default_matmul_precision"}
