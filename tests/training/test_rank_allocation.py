"""Rank allocation in the job: schedules of the run's length, and a stop in the middle of one."""

import pytest
from little_data import sentences

import jlora
from jlora import paths
from jlora.training.errors import SettingError
from jlora.training.model.selection import make_spec
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings

ADA = {"method": "AdaLoRA", "rank": 4, "target": 2}


def chosen(**settings):
    """The methods of a run of 40 steps."""
    resolved = resolve(Settings(steps=40, **settings))
    return list(make_spec(None, resolved).values())


def test_a_schedule_takes_its_length_from_the_run():
    assert chosen(spec={".*": ADA}) == [jlora.AdaLoRA(4, 2, steps=40)]
    assert chosen(spec={".*": {**ADA, "steps": 30}}) == [jlora.AdaLoRA(4, 2, steps=30)]
    assert chosen(spec={".*": {"method": "DoRA", "inner": ADA}}) == [jlora.DoRA(jlora.AdaLoRA(4, 2, steps=40))]
    assert chosen(spec={"a": "frozen", "b": {"method": "LoRA"}}) == [None, jlora.LoRA()]


def test_the_flags_name_the_methods_with_phases_of_the_run():
    (ada,) = chosen(method="adalora", rank=4)
    assert ada == jlora.AdaLoRA(6, 4, 8.0, 40, start_steps=4, final_steps=12)
    (ela,) = chosen(method="elalora", rank=4, dropout=0.1)
    assert ela == jlora.ElaLoRA(4, None, 8.0, 40, 4, 12, interval=1, dropout=0.1)
    (sora,) = chosen(method="sora", rank=4)
    assert sora == jlora.SoRA(6, 8.0, 0.43 / 28, l1=0.0, target=4, steps=40, final_steps=12)
    (beams,) = chosen(method="beamlora", rank=4)
    assert beams == jlora.BeamLoRA(4, 8.0, steps=40, final_steps=13, interval=3)
    (masked,) = chosen(method="rmlora", rank=5)
    assert masked == jlora.RMLoRA(5, 10.0, updated=3)
    (linear,) = chosen(method="prilora", rank=5)
    assert linear == jlora.PRILoRA(2, 8, 10.0, every=4)
    (ablated,) = chosen(method="alora", rank=4)
    assert ablated == jlora.ALoRA(4, None, 8.0, 40, start_steps=13, final_steps=6, interval=3)
    assert sum(ablated.event.due(step) for step in range(41)) == 8
    (measured,) = chosen(method="gelora", rank=4)
    assert measured == jlora.GeLoRA(4, 8.0)


def test_a_schedule_that_does_not_fit_into_the_run_is_refused():
    with pytest.raises(
        SettingError, match=r"entry '.\*': AdaLoRA's start_steps \(50\) and final_steps \(0\) leave none"
    ):
        chosen(spec={".*": {**ADA, "start_steps": 50}})


@pytest.mark.long
@pytest.mark.parametrize("method", ["adalora", "elalora", "sora", "beamlora"])
def test_a_run_stopped_in_the_middle_of_a_schedule_ends_with_the_same_bits(method, stopped_and_resumed, tmp_path):
    settings = Settings(
        method=method, steps=10, batch=4, max_length=16, rank=2, targets=".*/(q|v)_proj/kernel", checkpoint_every=2,
        evaluate_every=5, sample_tokens=0, progress="none", data=sentences(tmp_path),
    )  # fmt: skip
    result = stopped_and_resumed(settings)
    sites = result.adapted.plan.sites
    gates = [site.method.gates(paths.lookup(result.adapted.params, site.keys)) for site in sites]
    left = sum(int((gate != 0).sum()) for gate in gates)
    assert left > 0 if method == "elalora" else left == 2 * 2 * 5
