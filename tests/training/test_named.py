"""`--method`, `--set` and `--init`: every method by its name, with hyperparameters of its own."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.core.protocol.wrapping import parts
from jlora.disk import catalog
from jlora.training.cli import main
from jlora.training.errors import SettingError
from jlora.training.hosts.placement import make_mesh
from jlora.training.model.losses import sums
from jlora.training.model.prepared import prepared
from jlora.training.model.selection import check_method, make_spec
from jlora.training.run import record
from jlora.training.settings import told
from jlora.training.settings.configuration import gather
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings
from jlora.training.settings.inspected import settings_table
from jlora.training.settings.named import named

pytestmark = pytest.mark.once

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "job_methods.json").read_text())
ASKED = {name: {key: [3, 7] for key in recipe.asks} for name, recipe in catalog.recipes().items()}


def method_of(name, *, set=None, **settings):
    """What the job makes of a name, on a model of the user's own."""
    own = {"model": "m", "data": "d", "set": {**ASKED.get(name, {}), **(set or {})}, **settings}
    return named(resolve(Settings(method=name, **own)))


def test_names_mean_what_they_meant_before_methods_said_it_themselves():
    for key, wanted in GOLDEN.items():
        name, *rest = key.split(", ")
        settings = {}
        if rest != ["alone"]:
            rank, steps = int(rest[0].split()[1]), int(rest[1].split()[0])
            settings = {"rank": rank, "steps": steps, "model": "m", "data": "d", "dropout": 0.1 if rank == 5 else None}
        found = resolve(Settings(method=name, **settings))
        assert found.learning_rate == wanted["learning_rate"], key
        assert jlora.method_to_dict(named(found)) == jlora.method_to_dict(jlora.method_from_dict(wanted["method"])), key


def test_every_method_of_the_catalogue_has_a_name():
    made = {type(part) for name in catalog.recipes() for part in parts(method_of(name))}
    assert made == set(catalog.methods().values())
    assert told.method_names()[0] == "lora" and set(told.method_names()) == {*catalog.recipes(), "probe"}


def test_every_name_is_made_also_for_the_shortest_run():
    for name in catalog.recipes():
        for steps in (1, 2, None):
            given = {"steps": steps, "epochs": None if steps else 1.0}
            rank = 2 if catalog.recipes()[name].has("rank") else None
            method = method_of(name, rank=rank, **given)
            rule = method.optimizer_rule
            if rule is not None and steps is not None:
                adapt = lambda params, method=method: jlora.adapterize(params, {"w": method})
                sites = jax.eval_shape(adapt, {"w": jnp.ones((4, 4))}).plan.sites
                rule.wrap(optax.adam(1e-3), sites)  # refuses a schedule that does not fit


def test_what_a_method_does_without_has_no_default():
    shira, vera = (resolve(Settings(method=name)) for name in ("shira", "vera"))
    assert (shira.rank, shira.alpha, shira.dropout) == (None, None, None)
    assert (vera.rank, vera.alpha, vera.learning_rate) == (256, None, 1e-2)
    assert named(shira) == jlora.SHiRA() and named(vera) == jlora.VeRA()
    assert method_of("shira", rank=2) == jlora.SHiRA(rank=2)
    assert method_of("full") == jlora.Full() and method_of("rows") == jlora.Rows((3, 7))


def test_a_hyperparameter_of_the_user_s_goes_over_what_the_job_chooses():
    ada = method_of("adalora", rank=4, steps=40, set={"target": "2", "orthogonality": "0", "beta1": "0.5"})
    assert ada == jlora.AdaLoRA(6, 2, 8.0, 40, start_steps=4, final_steps=12, beta1=0.5, orthogonality=0)
    assert method_of("adalora", set={"rank": "16"}).rank == 16, "the rank to start with is none of --rank's"
    assert method_of("elalora", set={"anneal": "false", "max_rank": "none"}) == method_of(
        "elalora", set={"anneal": False}
    )
    assert not method_of("elalora", set={"anneal": "false"}).anneal
    sora = method_of("sora", steps=40, set={"stages": "3", "first_threshold": "0.0", "spacing": "linear"})
    assert (sora.stages, sora.first_threshold) == (3, 0.0), "one needs the other"


def test_a_hyperparameter_reaches_the_method_inside():
    assert method_of("dora", rank=4, set={"scaling": "rslora"}) == jlora.DoRA(jlora.LoRA(4, 8.0, "rslora"))
    boosted = method_of("xgblora", steps=40, set={"layers": "3", "prune": "0.5"})
    assert boosted == jlora.Chain(jlora.XGBLoRA(1, 2.0, layers=3), 8, 40, prune=0.5)
    assert method_of("xgblora", set={"layers": "1.0"}).inner.layers == 1.0, "a share, not a number of layers"
    assert method_of("cola", rank=4, links=2, set={"ranks": "4,2"}).ranks == (4, 2)


@pytest.mark.parametrize("name", ["lora", "dora", "cola", "rmlora"])
def test_an_init_is_chosen_by_name(name):
    method = method_of(name, init="pissa")
    assert parts(method)[-1].init == "pissa" and parts(method_of(name))[-1].init == "default"
    assert method_of("lora", rank=2, init="pissa_niter_4") == jlora.LoRA(2, 4.0, init="pissa_niter_4")


REFUSED = [
    (
        {"method": "adalora", "set": {"tagret": 4}},
        r"--set tagret: AdaLoRA has no hyperparameter tagret; did you mean targ",
    ),
    (
        {"method": "dora", "set": {"zz": 4}},
        r"--set zz: DoRA around LoRA has no hyperparameter",
    ),
    ({"method": "adalora", "set": {"target": "x"}}, "--set target: AdaLoRA's target must be a whole number, got 'x'"),
    ({"method": "adalora", "set": {"target": 2.5}}, "--set target: AdaLoRA's target must be a whole number, got 2.5"),
    ({"method": "adalora", "set": {"target": True}}, "--set target: AdaLoRA's target must be a whole number, got True"),
    ({"method": "adalora", "set": {"target": "99"}}, r"--set target=99: AdaLoRA's target \(99\) is above the rank"),
    ({"method": "dora", "set": {"inner": "LoRA"}}, "--set inner: DoRA around LoRA has no hyperparameter inner"),
    ({"method": "lora", "rank": 4, "set": {"rank": 8}}, "--set rank: is a setting of its own: give --rank"),
    ({"method": "lora", "set": {"alpha": 8}}, "--set alpha: is a setting of its own: give --alpha"),
    ({"method": "adalora", "set": {"steps": 8}}, "--set steps: is a setting of its own: give --steps"),
    ({"method": "cola", "set": {"links": 8}}, "--set links: is a setting of its own: give --links"),
    ({"method": "lora", "set": {"init": "olora"}}, "--set init: is a setting of its own: give --init"),
    ({"method": "full", "set": {"x": 1}}, "--set x: Full has no hyperparameter x; it has none"),
    (
        {"method": "probe", "task": "classify", "data": "a.csv", "set": {"x": 1}},
        "--set has no meaning with method probe",
    ),
    ({"spec": {".*": {"method": "Full"}}, "set": {"x": 1}}, r"--set and a \[spec\] table both say what is adapted"),
    ({"spec": {".*": {"method": "Full"}}, "init": "olora"}, r"--init and a \[spec\] table both say what is adapted"),
    ({"method": "adalora", "init": "olora"}, "--init has no meaning with AdaLoRA, which starts in one way"),
    ({"init": "olra"}, "--init olra: LoRA's init must be one of .*; did you mean olora?"),
    ({"method": "raclora", "set": {"layers": 2}}, "--set layers: Chain around RACLoRA has no hyperparameter layers"),
    ({"method": "shira", "alpha": 2.0}, "--alpha has no meaning with method shira, which has none"),
    ({"method": "deeplora", "dropout": 0.1}, "--dropout has no meaning with method deeplora, which has none"),
    ({"method": "full", "targets": ".*"}, "--targets has no meaning with method full, which has no adapters"),
    ({"method": "full", "lora_plus_ratio": 2.0}, "--lora-plus-ratio has no meaning with method full"),
    ({"method": "rows"}, "--method rows has no indices by default: give them by --set indices=..."),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=lambda each: str(each)[:50])
def test_what_no_method_can_take_is_one_sentence(flags, message, capsys):
    given = gather(flags)
    with pytest.raises(SettingError, match=message):
        try:
            resolve(given.settings())
        except SettingError as error:
            raise error.renamed("--" + error.setting.replace("_", "-")) from error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "target"], "argument --set: must be NAME=VALUE, such as target=4, got 'target'"),
        (["--set", "target=4", "--set", "target=5"], "argument --set: target is given twice: '4' and '5'"),
    ],
)
def test_a_flag_that_is_no_pair_or_comes_twice_is_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "--method", "adalora", *flags])
    assert message in capsys.readouterr().err


def test_a_table_of_a_file_holds_hyperparameters_and_flags_go_over_it(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('method = "adalora"\nmodel = "m"\ndata = "d"\nrank = 4\n[set]\ntarget = 2\nbeta1 = 0.5\n')
    by_file = resolve(gather({}, path).settings())
    assert by_file.set == {"target": 2, "beta1": 0.5}
    by_flags = {"method": "adalora", "model": "m", "data": "d", "rank": 4, "set": {"target": "2", "beta1": "0.5"}}
    assert resolve(gather(by_flags).settings()) == by_file, "the same run, however it is said"
    both = resolve(gather({"set": {"target": "3"}}, path).settings())
    assert both.set == {"target": 3, "beta1": 0.5}


def begun(tmp_path, **more):
    """The settings.json of a run, read again."""
    settings = resolve(Settings(method="gelora", out=str(tmp_path), **more))
    about = {"asked": {"method": "gelora"}, "settings": json.loads(json.dumps(vars(settings)))}
    return settings, {**about, "labels": [], "data_sha256": "", "base": "", "data": "", "model": ""}


def test_a_run_from_before_goes_on_and_its_hyperparameters_must_stay(tmp_path):
    _, about = begun(tmp_path)
    old = {**about, "ranks": {"layers/q": [2, 3]}}
    for name in ("set", "init"):
        del old["settings"][name]
    (tmp_path / "settings.json").write_text(json.dumps(old))
    again, about = begun(tmp_path, resume=True)
    no_chats = SimpleNamespace(template=None)
    record.begin(tmp_path, about, no_chats, again)
    assert record.measured_before(record.read_settings(tmp_path)) == {"layers/q": [2, 3]}
    other, about = begun(tmp_path, resume=True, set={"ranks": "2"})
    with pytest.raises(SettingError, match=r"set is {'ranks': 2}, but the run in .* was started with {}, which must"):
        record.begin(tmp_path, about, no_chats, other)


def test_inspect_lists_hyperparameters_and_finds_the_embedding(capsys):
    assert main(["inspect", "--method", "rows", "--set", "indices=3,7"]) == 0
    said = capsys.readouterr().out
    assert "embed_tokens/embedding  512x64  512 x 64  Rows(indices=(3, 7))" in said
    lines = [line.split() for line in said.partition("their hyperparameters")[2].splitlines()]
    assert lines[1][:3] == ["name", "value", "default"] and lines[2][:3] == ["indices", "3,7", "0"]


def test_inspect_says_what_a_run_finds_in_its_data_and_not_of_what_is_given():
    open_, given = (settings_table(resolve(Settings(method="gelora", set=own))) for own in ({}, {"ranks": "3"}))
    told = "found in the training data before a run"
    assert told in " ".join(open_.split()) and told not in " ".join(given.split())


def test_starts_from_gradients_are_those_of_the_first_batches_whatever_their_parts():
    params = {"w": jnp.cos(jnp.arange(48.0)).reshape(8, 6), "v": jnp.sin(jnp.arange(48.0)).reshape(8, 6)}
    rng = np.random.default_rng(0)
    batches = [
        {"x": rng.standard_normal((4, 8), np.float32), "labels": np.arange(4) % 6, "weights": np.float32([1, 1, 1, 0])}
        for _ in range(8)
    ]
    forward = lambda params, batch: batch["x"] @ (params["w"] + params["v"])
    spec = {"w": jlora.DeepLoRA(2, compressed=True), "v": jlora.SHiRA("snip", entries=6)}
    subject, mesh, key = SimpleNamespace(params=params, forward=forward), make_mesh({}), jax.random.key(1)
    data = SimpleNamespace(training_batches=lambda batch, seed: iter(batches))

    def mean_loss(params, batch):
        found = sums(forward, params, batch)
        return found.loss / found.weight

    def wanted(name, count):
        own = {each: method if each == name else None for each, method in spec.items()}
        return jlora.prepare(params, own, mean_loss, batches[:count], key).starts

    settings = Settings(batch=4, accumulate=2)
    found = prepared(spec, subject, settings, None, data, mesh, key).starts
    for site, start in {**wanted("w", 1), **wanted("v", 8)}.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found[site], start)
    assert prepared({"w": jlora.LoRA(2)}, subject, settings, None, data, mesh, key) is None


def test_a_chain_s_spec_is_of_what_is_named():
    (method,) = make_spec(None, resolve(Settings(method="relora", rank=4, steps=40, set={"by": "random"}))).values()
    assert method == jlora.Chain(jlora.LoRA(4, 8.0), 4, 40, prune=0.99, by="random")


def test_what_a_job_can_t_tell_a_method_is_said_before_a_run():
    tasks, one = (method_of("poly", set={"tasks": tasks}) for tasks in ("3", "1"))
    subject, settings = SimpleNamespace(config={}), resolve(Settings())
    with pytest.raises(SettingError, match="must be told the task of each row, which a job can't"):
        check_method(tasks, subject, settings, "method")
    check_method(one, subject, settings, "method")
