"""Checkpoints that are not whole: whatever became of one, the last whole one is found, and what was wrong is said."""

import json
import shutil
from types import SimpleNamespace

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.disk.checksums import checksums
from jlora.training.errors import CheckpointError
from jlora.training.model.loop import State
from jlora.training.run import checkpoint
from jlora.training.run.checkpoint import MANIFEST, Checkpoints, find_whole, last_whole


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 2 and 4; the files in them are anything."""
    for step in (2, 4):
        place = tmp_path / str(step)
        (place / "state").mkdir(parents=True)
        (place / "state" / "arrays").write_bytes(bytes([step]) * 100)
        (place / MANIFEST).write_text(json.dumps({"step": step, "base": "0" * 32, "files": checksums(place)}))
    return tmp_path


MANIFESTS = {
    "no bytes": "", "deep": "[" * 10**5, "deep objects": '{"files":' * 10**5, "list": "[]", "null": "null", "number": "3",
    "no files": '{"step": 4}', "files null": '{"files": null}', "files list": '{"files": ["state/arrays"]}',
    "files text": '{"files": "state/arrays"}', "files number": '{"files": 3}', "sums null": '{"files": {"state/arrays": null}}',
    "sums list": '{"files": {"state/arrays": []}}', "sums object": '{"files": {"state/arrays": {}}}',
    "surrogates": '{"files": {"\\ud800": "a"}}', "other file": '{"files": {"../2/state/arrays": "a"}}',
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_in_any_state_leads_back_to_the_checkpoint_before(name, folder):
    (folder / "4" / MANIFEST).write_text(MANIFESTS[name])
    assert last_whole(folder) == 2
    whole = find_whole(folder)
    assert whole.step == 2
    assert len(whole.complaints) == 1 and whole.complaints[0].startswith("the checkpoint of step 4 ")
    assert (folder / "damaged-4").is_dir() and not (folder / "4").exists()


def test_bytes_that_are_no_text_are_a_damaged_manifest(folder):
    (folder / "4" / MANIFEST).write_bytes(b'{"files": "\xff\xfe"}')
    assert find_whole(folder) == (2, [f"the checkpoint of step 4 has a damaged {MANIFEST}"])


def test_a_manifest_that_is_a_folder_and_a_checkpoint_that_is_a_file_are_passed_over(folder):
    (folder / "4" / MANIFEST).unlink()
    (folder / "4" / MANIFEST).mkdir()
    (folder / "6").write_text("")
    step, complaints = find_whole(folder)
    assert step == 2
    assert [words[:24] for words in complaints] == ["the checkpoint of step 6", "the checkpoint of step 4"]


@pytest.mark.parametrize("name", ["²", "٤", "007", "1" * 5000, "-1", "damaged-9"])
def test_a_folder_whose_name_is_no_step_is_left_alone(name, folder):
    if len(name) < 256:
        (folder / name).mkdir()
        assert find_whole(folder) == (4, [])
        assert (folder / name).is_dir()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_checkpoints_are_kept_as_asked_for_and_the_latest(keep, folder, monkeypatch):
    for step in (6, 8):
        shutil.copytree(folder / "4", folder / str(step))
        (folder / str(step) / MANIFEST).unlink()
    checkpoints = SimpleNamespace(directory=folder, keep=keep, fingerprint="0" * 32)
    Checkpoints._finish(checkpoints, None)  # pyright: ignore[reportArgumentType] (what orbax holds is not needed)
    assert sorted(int(path.name) for path in folder.iterdir()) == [2, 4, 6, 8][-keep:]
    assert checkpoint.complaint(folder / "8") is None


def state_of(adapted, key, step):
    return State(adapted.params, optax.adam(0.1).init(adapted.params), jnp.int32(step), jax.random.key(key))


def test_a_state_comes_back_with_its_key_its_constants_and_its_step(tmp_path):
    adapted = jlora.adapterize({"w": jnp.eye(4)}, {"w": jlora.RACLoRA(rank=2)})
    position = iter(grain.MapDataset.range(9).to_iter_dataset())
    assert [next(position) for _ in range(3)] == [0, 1, 2]
    checkpoints = Checkpoints(tmp_path, 2, "base of these")
    checkpoints.save(state_of(adapted, 7, 3), adapted, position)
    checkpoints.close()
    other, fresh = jax.tree.map(lambda leaf: leaf + 1, adapted), iter(grain.MapDataset.range(9).to_iter_dataset())
    again = Checkpoints(tmp_path, 2, "base of these")
    state, found = again.restore(3, state_of(other, 0, 0), other, fresh)
    again.close()
    assert (int(state.step), next(fresh)) == (3, 3)
    assert jax.random.key_data(state.key).tolist() == jax.random.key_data(jax.random.key(7)).tolist()
    jax.tree.map(np.testing.assert_array_equal, (found.params, found.frozen), (adapted.params, adapted.frozen))
    stranger = Checkpoints(tmp_path, 2, "another base")
    with pytest.raises(
        CheckpointError, match="3 belongs to a base with fingerprint base of these, this one has another"
    ):
        stranger.restore(3, state, adapted, fresh)
    stranger.close()


@pytest.mark.once
def test_the_groups_of_a_former_release_are_joined_where_they_are_one_now(tmp_path):
    adapted = jlora.adapterize({"w": jnp.eye(4), "b": jnp.ones(4)}, {"w": jlora.LoRA(2), "b": jlora.Full()})
    grads = jax.tree.map(jnp.ones_like, adapted.params)
    each = {
        name: optax.adamw(0.1, weight_decay=0.0 if name == "vector, kept" else 1e-4)
        for name in ("a", "b", "vector, kept")
    }
    former = optax.partition(each, {"w": {"a": "a", "b": "b"}, "b": {"w": "vector, kept"}})
    present = jlora.optimizer(adapted, optax.adamw, 0.1)
    after = lambda tx: tx.update(grads, tx.init(adapted.params), adapted.params)[1]
    state, wanted = jax.jit(lambda: (after(former), after(present)))()
    now = jax.tree.map(jnp.zeros_like, wanted)

    def position():
        return iter(grain.MapDataset.range(9).to_iter_dataset())

    def resumed(place, state):
        run = State(adapted.params, state, jnp.int32(1), jax.random.key(0))
        checkpoints = Checkpoints(tmp_path / place, 2, "base")
        checkpoints.save(run, adapted, position())
        checkpoints.close()
        again = Checkpoints(tmp_path / place, 2, "base")
        try:
            return again.restore(1, run._replace(opt_state=now), adapted, position())[0].opt_state
        finally:
            again.close()

    jax.tree.map(np.testing.assert_array_equal, resumed("former", state), wanted)
    inner = dict(state.inner_states)
    inner["b"] = jax.tree.map(lambda leaf: leaf + 1, inner["b"])
    with pytest.raises(
        CheckpointError, match="its inner_states.b.inner_state.0.count differs from .*: go on with that release"
    ):
        resumed("changed", state._replace(inner_states=inner))
