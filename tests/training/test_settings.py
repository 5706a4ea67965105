"""Settings from flags and files: what is wrong is named as the user wrote it."""

import dataclasses
import json

import pytest
from jax.sharding import PartitionSpec

from jlora.training.cli import build_parser
from jlora.training.commands.actions import _stored
from jlora.training.errors import SettingError
from jlora.training.settings.axes import cutting_axes, mesh_axes, shard_rules
from jlora.training.settings.configuration import gather
from jlora.training.settings.defaults import count_steps, resolve
from jlora.training.settings.fields import Settings
from jlora.training.settings.flags import given


def config(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    path = config(tmp_path, "rank = 4\nlearning-rate = 1e-3\n[spec]\n")
    settings = gather({"rank": 2}, path).settings()
    assert (settings.rank, settings.learning_rate, settings.seed) == (2, 1e-3, 0)


def test_a_spec_table_is_read_in_order(tmp_path):
    path = config(tmp_path, '[spec]\n".*/q/kernel" = {method = "LoRA", rank = 8}\n".*bias" = {method = "Full"}\n')
    spec = gather({}, path).settings().spec
    assert list(spec) == [".*/q/kernel", ".*bias"]
    assert spec[".*/q/kernel"] == {"method": "LoRA", "rank": 8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ranc = 4", r"ranc in .*run\.toml is not a setting; did you mean rank\?"),
        ("zzz = 4", r"zzz in .*run\.toml is not a setting; the settings are model"),
        ('rank = "four"', r"rank in .*run\.toml must be a whole number, got 'four' \(str\)"),
        ("rank = true", r"rank in .*run\.toml must be a whole number, got True"),
        ("rank = 0", r"rank in .*run\.toml must be at least 1, got 0"),
        ("dropout = 1.0", "dropout in .* must be at least 0 and below 1"),
        ('schedule = "exponential"', "schedule in .* must be one of constant, linear, cosine"),
        ('method = "loar"', r"method in .* must be one of lora, .*, got 'loar'; did you mean lora\?"),
        ("rank = 1\nrank = 2", r"run\.toml is not a TOML file"),
        ("batch = 5\naccumulate = 2", r"accumulate in .* must divide batch"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_key_and_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        gather({}, config(tmp_path, text)).settings()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"steps": 3, "epochs": 1.0}, "--epochs and steps both say how long to train"),
        ({"method": "full", "rank": 8}, "--rank has no meaning with method full"),
        ({"method": "probe"}, "--method probe trains the classification head"),
        ({"task": "classify"}, "--task classify needs a data file"),
        ({"targets": "*"}, r"--targets is not a regular expression: '\*'"),
        ({"task": "classify", "data": "x.csv", "packing": True}, "--packing is for --task lm"),
        ({"task": "classify", "data": "x.csv", "long_rows": "split"}, "--long-rows split is for --task lm"),
        ({"text_pair_column": "b"}, "--text-pair-column is for --task classify"),
        ({"steps": 5, "warmup": 5}, "--warmup must be less than the 5 steps"),
        ({"data": "a.txt", "validation": "b.txt", "validation_fraction": 0.1}, "--validation-fraction cuts a part off"),
        ({"mesh": "data=0"}, "--mesh must be distinct name=number pairs"),
        ({"mesh": "data=2,data=2"}, "--mesh must be distinct"),
        (
            {"mesh": "a=1,b=1,c=1"},
            "--mesh has an axis a, but beside data the last two axes cut the weights.*b and c: leave",
        ),
        (
            {"mesh": "fsdp=2,expert=2"},
            "--mesh has an axis expert, but the models of the job have no experts: leave it out",
        ),
        ({"mesh": "sequence=2"}, "--mesh has an axis sequence, but the job cuts no row along its tokens"),
        (
            {"mesh": "fsdp=2", "shard": {"w": "None,tensor"}},
            "--shard 'w' names the axis tensor, but the mesh has only fsdp",
        ),
        ({"shard": {"w": "fsdp"}}, "--shard 'w' names the axis fsdp, but the mesh has only data"),
        ({"mesh": "fsdp=2", "shard": {"(": "fsdp"}}, r"--shard has no regular expression: '\('"),
        (
            {"mesh": "fsdp=2", "shard": {"w": "fsdp,fsdp"}},
            "--shard 'w' must say for each axis.*each once, got 'fsdp,fsdp'",
        ),
        ({"mesh": "fsdp=2", "shard": {"w": "fsdp,"}}, "--shard 'w' must say for each axis of the weight which axis"),
        ({"method": "probe", "lora_plus_ratio": 4.0}, "--lora-plus-ratio has no meaning with method probe"),
    ],
)
def test_impossible_combinations_name_the_flag(flags, message):
    with pytest.raises(SettingError, match=message):
        gather(flags).settings()


def test_a_spec_excludes_the_flags_that_say_the_same():
    with pytest.raises(SettingError, match=r"rank and a \[spec\] table both say what is adapted"):
        Settings(spec={".*": {"method": "Full"}}, rank=4)


def test_what_is_left_open_is_chosen_by_task_and_method():
    lm = resolve(Settings(model="dir", data="a.txt"))
    assert (lm.rank, lm.alpha, lm.targets, lm.packing, lm.epochs) == (8, 16.0, "all-linear", True, 1.0)
    full = resolve(Settings(data="a.csv", task="classify", method="full"))
    assert (full.rank, full.targets, full.packing, full.learning_rate) == (None, None, False, 5e-5)
    assert resolve(Settings(steps=7)).steps == 7
    shipped = resolve(Settings())
    assert (shipped.rank, shipped.learning_rate, shipped.steps, shipped.epochs) == (16, 1e-2, 250, None)
    assert resolve(Settings(data="a.txt", method="full")).learning_rate == 5e-5


def test_steps_are_counted_from_epochs_and_rows():
    settings = count_steps(resolve(Settings(data="a.txt", batch=4, epochs=2.5)), rows=10)
    assert (settings.steps, settings.epochs, settings.warmup) == (7, None, 1)


def test_a_batch_takes_at_most_the_rows_that_there_are():
    few = count_steps(resolve(Settings(data="a.txt", accumulate=2, epochs=3.0)), rows=7)
    assert (few.batch, few.steps) == (6, 4)
    assert count_steps(resolve(Settings(data="a.txt")), rows=7, parts=4).batch == 4
    with pytest.raises(SettingError, match="batch takes 16 rows in 8 parts, but the training data makes 7 of them"):
        count_steps(resolve(Settings(data="a.txt", accumulate=2)), rows=7, parts=4)


@pytest.mark.parametrize(
    ("steps", "evaluate", "save"), [(1, 1, 1), (12, 12, 12), (20, 10, 10), (25, 13, 13), (250, 50, 25), (999, 200, 100)]
)
def test_short_runs_are_validated_and_saved_at_most_every_tenth_step(steps, evaluate, save):
    found = count_steps(resolve(Settings(steps=steps)), rows=1000)
    assert (found.evaluate_every, found.checkpoint_every) == (evaluate, save)
    asked = count_steps(resolve(Settings(steps=steps, evaluate_every=1, checkpoint_every=1)), rows=1000)
    assert (asked.evaluate_every, asked.checkpoint_every) == (1, 1)


def test_resolving_twice_changes_nothing():
    once = count_steps(resolve(Settings()), 1000)
    assert count_steps(resolve(once), 1000) == once
    assert Settings(**dataclasses.asdict(once)) == once


def test_flags_of_rules_come_before_those_of_the_file_and_an_axis_that_a_rule_names_cuts(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('mesh = "expert=2,fsdp=2,tensor=2"\n[shard]\nb = "None"\na = "fsdp"\n')
    parsed = build_parser().parse_args(["finetune", "--config", str(file), "--shard", "(?<=w)a=expert,fsdp+tensor"])
    found = shard_rules(given(parsed).settings().shard)
    assert list(found.items()) == [
        ("(?<=w)a", PartitionSpec("expert", ("fsdp", "tensor"))),
        ("b", PartitionSpec(None)),
        ("a", PartitionSpec("fsdp")),
    ]
    assert cutting_axes(["data", "expert", "fsdp", "tensor"]) == ["fsdp", "tensor"]


def test_a_run_goes_on_to_another_mesh_without_the_rules_of_the_old_one(tmp_path):
    old = dataclasses.asdict(Settings(mesh="fsdp=2", shard={"w": "fsdp"}))
    stored = {"asked": old, "settings": old, "labels": []}
    (tmp_path / "settings.json").write_text(json.dumps(stored))
    words = ["finetune", "--out", str(tmp_path), "--resume"]
    same = given(build_parser().parse_args(words))
    assert same.settings(_stored(same)).shard == {"w": "fsdp"}
    other = given(build_parser().parse_args([*words, "--mesh", "data=4"]))
    assert other.settings(_stored(other)).shard == {}


@pytest.mark.parametrize(("value", "message"), [("w", "must be REGEX=AXES"), ("=fsdp", "must be REGEX=AXES")])
def test_a_rule_that_is_no_rule_is_refused_by_its_flag(value, message, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["finetune", "--shard", value])
    assert f"argument --shard: {message}" in capsys.readouterr().err


def test_a_mesh_is_axes_with_sizes():
    assert mesh_axes("data=2, model=4") == {"data": 2, "model": 4}
    assert mesh_axes(None) == {}
