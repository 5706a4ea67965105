"""Saved adapters: what is written, and one clear sentence for another base, a damaged file or a full disk."""

import errno
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jlora

pytestmark = pytest.mark.once

PARAMS = {
    "layer": {"kernel": jnp.arange(48.0).reshape(8, 6), "bias": jnp.ones(6)},
    "half": jnp.ones((6, 6), jnp.bfloat16),
}
SPEC = {
    "layer/kernel": jlora.DoRA(jlora.LoRA(rank=2, init="random")),
    "layer/bias": jlora.Full(),
    "half": jlora.LoRA(rank=1),
}


@pytest.fixture(scope="module")
def adapted():
    return jlora.adapterize(PARAMS, SPEC)


@pytest.fixture
def saved(adapted, tmp_path):
    jlora.save(tmp_path / "adapters", adapted)
    return tmp_path / "adapters"


def refused(path, error, *parts, params=PARAMS):
    with pytest.raises(error) as caught:
        jlora.load(path, params)
    for part in (str(path), *parts):
        assert part in str(caught.value), f"{part!r} is not in {str(caught.value)!r}"
    return str(caught.value)


def same(one, other):
    assert one.plan == other.plan
    assert jax.tree.structure(one.params) == jax.tree.structure(other.params)
    assert all(map(np.array_equal, jax.tree.leaves(one.params), jax.tree.leaves(other.params)))


def test_what_is_saved_is_loaded_bit_for_bit_onto_its_base(saved, adapted):
    loaded = jlora.load(saved, PARAMS)
    same(loaded, adapted)
    assert loaded.base is PARAMS
    assert all(map(np.array_equal, jax.tree.leaves(jlora.merge(loaded)), jax.tree.leaves(jlora.merge(adapted))))


def test_a_saved_directory_holds_the_manifest_and_the_arrays_and_nothing_else_is_left(saved):
    assert sorted(os.listdir(saved)) == ["arrays", "jlora.json"]
    assert os.listdir(saved.parent) == ["adapters"]
    described = json.loads((saved / "jlora.json").read_text())
    assert ["/".join(entry["keys"]) for entry in described["arrays"]] == [
        "params/half/a", "params/half/b", "params/layer/bias/w", "params/layer/kernel/a", "params/layer/kernel/b",
        "params/layer/kernel/m",
    ]  # fmt: skip
    assert described["base"] == jlora.fingerprint(PARAMS)


def test_saving_onto_something_is_refused_and_leaves_it_alone(saved, adapted):
    before = {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()}
    with pytest.raises(FileExistsError, match=f"{saved} exists already; save to a new directory"):
        jlora.save(saved, adapted)
    assert before == {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()}
    assert os.listdir(saved.parent) == ["adapters"]


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_after_a_part(checkpointer, directory, *args, **kwargs):
    Path(directory).mkdir(parents=True)
    (Path(directory) / "part").write_bytes(b"half of it")
    full_disk()


@pytest.mark.parametrize("place", ["arrays", "manifest", "fsync"])
def test_a_full_disk_leaves_nothing_behind(place, adapted, tmp_path, monkeypatch):
    if place == "arrays":
        monkeypatch.setattr(ocp.StandardCheckpointer, "save", full_after_a_part)
    else:
        target = (Path, "write_text") if place == "manifest" else (os, "fsync")
        with monkeypatch.context() as until_the_arrays_are_there:
            until_the_arrays_are_there.setattr(*target, full_disk)
            with pytest.raises(OSError, match="No space left on device"):
                jlora.save(tmp_path / "run" / "adapters", adapted)
    if place == "arrays":
        with pytest.raises(OSError, match="No space left on device"):
            jlora.save(tmp_path / "run" / "adapters", adapted)
    assert os.listdir(tmp_path / "run") == []
    monkeypatch.undo()
    jlora.save(tmp_path / "run" / "adapters", adapted)
    same(jlora.load(tmp_path / "run" / "adapters", PARAMS), adapted)


DISK = """
import os, resource, sys
import jax.numpy as jnp
import jlora

adapted = jlora.adapterize({"w": jnp.ones((256, 256))}, {"w": jlora.LoRA(rank=64)})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    jlora.save(sys.argv[1], adapted)
except OSError as error:
    print(f"{error.strerror}|{error.filename}")
"""


def test_a_real_refusal_of_the_disk_is_an_os_error_with_the_path(tmp_path):
    """A limit on the size of files is what an unprivileged test can have of a full disk."""
    command = [sys.executable, "-c", DISK, str(tmp_path / "adapters")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == f"{os.strerror(errno.EFBIG)}; nothing was saved|{tmp_path / 'adapters'}"
    assert os.listdir(tmp_path) == []


def test_a_base_that_differs_in_one_bit_is_another_base(saved):
    kernel = np.array(PARAMS["layer"]["kernel"])
    kernel.view(np.uint32)[5, 3] ^= 1
    other = {**PARAMS, "layer": {**PARAMS["layer"], "kernel": jnp.asarray(kernel)}}
    refused(
        saved,
        ValueError,
        "was made for another base: fingerprint",
        jlora.fingerprint(PARAMS),
        jlora.fingerprint(other),
        params=other,
    )


def test_a_leaf_that_is_not_adapted_belongs_to_the_base_too(saved):
    refused(saved, ValueError, "was made for another base", params={**PARAMS, "more": jnp.zeros(1)})


def test_another_shape_or_dtype_is_named_with_both(saved):
    layer = PARAMS["layer"]
    wide = {**PARAMS, "layer": {**layer, "kernel": jnp.ones((8, 7))}}
    refused(
        saved, ValueError, "adapts layer/kernel with shape (8, 6) and dtype float32", "the base has (8, 7)", params=wide
    )
    half = {**PARAMS, "half": jnp.ones((6, 6), jnp.float16)}
    refused(saved, ValueError, "adapts half with shape (6, 6) and dtype bfloat16", "(6, 6) and float16", params=half)


def test_a_missing_leaf_is_named_with_the_nearest(saved):
    lacking = {**PARAMS, "layer": {"kernels": PARAMS["layer"]["kernel"], "bias": PARAMS["layer"]["bias"]}}
    refused(saved, ValueError, "adapts layer/kernel, which the base lacks", "'layer/kernels'", params=lacking)


def test_a_folder_that_holds_no_adapters_is_refused(saved, tmp_path):
    refused(tmp_path / "nowhere", FileNotFoundError, "holds no saved adapters", "jlora.json")
    (saved / "jlora.json").rename(saved / "other.json")
    refused(saved, FileNotFoundError, "holds no saved adapters", "jlora.json")


def test_missing_arrays_are_noticed(saved):
    (saved / "arrays").rename(saved.parent / "elsewhere")
    refused(saved, FileNotFoundError, "the folder arrays is missing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "jlora.json is damaged or from another version"),
        (lambda text: "[]", "jlora.json is damaged or from another version"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "format 99, wanted 1"),
        (lambda text: text.replace('"DoRA"', '"Unheard"'), "describes a leaf that can't be read: a method table needs"),
        (lambda text: text.replace('"rank": 2', '"rank": 0'), "describes a leaf that can't be read: LoRA's rank must be"),
        (lambda text: text.replace('"in_axes"', '"in_axis"'), "describes a leaf that can't be read: 'in_axes'"),
        (lambda text: text.replace('"sites"', '"site"'), "jlora.json is damaged or from another version: it lacks sites"),
        (lambda text: text.replace('"adapters"', '"adapter"'), "from another version: it lacks adapters"),
        (lambda text: text.replace('"params",', '"params", "more",', 1), "jlora.json describes an array that can't be read"),
        (lambda text: text.replace('"dtype": "float32"', '"dtype": "float31"'), "float31"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_wrong_is_named(change, message, saved):
    manifest = saved / "jlora.json"
    changed = change(manifest.read_text())
    assert changed != manifest.read_text()
    manifest.write_text(changed)
    refused(saved, ValueError, message)


WRONG = [None, True, 3, 2.5, "text", [], {}, [None], [[]], [[[]]], {"a": None}]


@pytest.mark.parametrize("place", [
    ("format",), ("base",), ("adapters",), ("sites",), ("arrays",), ("files",), ("digest",), ("sites", 0), ("sites", 0, "keys"),
    ("sites", 0, "shape"), ("sites", 0, "dtype"), ("sites", 0, "in_axes"), ("sites", 0, "kind"), ("sites", 0, "method"),
    ("sites", 0, "method", "method"), ("sites", 0, "method", "rank"), ("arrays", 0), ("arrays", 0, "keys"),
    ("arrays", 0, "shape"), ("arrays", 0, "dtype"), ("files", "manifest.ocdbt"),
], ids=lambda place: "-".join(map(str, place)))  # fmt: skip
def test_values_of_other_types_in_the_manifest_are_one_error_that_names_it(place, saved):
    text = (saved / "jlora.json").read_text()
    for wrong in WRONG:
        described = json.loads(text)
        inner = described
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = wrong
        (saved / "jlora.json").write_text(json.dumps(described))
        refused(saved, ValueError)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"format":' * 10**5, '{"format": 1' + "0" * 5000 + "}", ""])
def test_a_manifest_that_is_no_json_is_named(text, saved):
    (saved / "jlora.json").write_text(text)
    refused(saved, ValueError, "jlora.json is damaged or from another version: not valid JSON")


def test_a_method_within_a_method_without_end_is_named(saved):
    text = (saved / "jlora.json").read_text()
    inner = '{"method": "DoRA", "inner": ' * 400 + "1" + "}" * 400
    (saved / "jlora.json").write_text(text.replace('"method": {', f'"method": {inner}, "was": {{', 1))
    refused(
        saved, ValueError, "jlora.json is damaged or from another version: not valid JSON (nested deeper than 64 levels"
    )


def test_a_changed_hyperparameter_is_noticed(saved):
    manifest = saved / "jlora.json"
    text = manifest.read_text()
    assert text.count('"alpha": 8.0') == 2
    manifest.write_text(text.replace('"alpha": 8.0', '"alpha": 80.0', 1))
    refused(saved, ValueError, "jlora.json is damaged, or was changed after it was written: its digest is")
    manifest.write_text(text.replace('"digest"', '"digits"'))
    refused(saved, ValueError, "it has 'digits', which no file of format 1 has")


def of_the_first_release(saved, **changes):
    described = json.loads((saved / "jlora.json").read_text())
    rest = {name: value for name, value in described.items() if name not in ("files", "digest")}
    (saved / "jlora.json").write_text(json.dumps(rest | changes))


def test_a_folder_without_checksums_is_read_and_its_arrays_are_compared_by_their_own_fingerprint(saved, adapted):
    of_the_first_release(saved)
    same(jlora.load(saved, PARAMS), adapted)
    of_the_first_release(saved, adapters="0" * 32)
    refused(saved, ValueError, "is damaged: its arrays are not those that were saved")


def test_a_leaf_that_is_described_twice_is_noticed(saved):
    sites = json.loads((saved / "jlora.json").read_text())["sites"]
    of_the_first_release(saved, sites=[*sites, sites[0]])
    refused(saved, ValueError, "jlora.json describes a leaf twice")


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flipped, lambda content: content[: len(content) // 2], None], ids=["flip", "cut", "gone"]
)
def test_damage_to_any_file_is_one_error_and_nothing_else_is_printed(damage, saved, adapted, capfd):
    for file in sorted(file for file in saved.rglob("*") if file.is_file() and file.stat().st_size):
        content = file.read_bytes()
        file.unlink() if damage is None else file.write_bytes(damage(content))
        wanted = "jlora.json" if file.name == "jlora.json" else f"arrays/{file.relative_to(saved / 'arrays')} is"
        refused(saved, (ValueError, FileNotFoundError), wanted)
        file.write_bytes(content)
    gc.collect()  # what is left behind unfinished is warned of when it goes
    assert capfd.readouterr() == ("", "")
    (saved / "arrays" / "notes.txt").write_text("mine")
    same(jlora.load(saved, PARAMS), adapted)


def test_adapters_load_onto_a_sharded_base(saved, adapted):
    mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), PARAMS)
    loaded = jlora.load(saved, placed)
    same(loaded, adapted)
    for leaf, merged in zip(jax.tree.leaves(placed), jax.tree.leaves(jlora.merge(loaded)), strict=True):
        assert merged.sharding == leaf.sharding
