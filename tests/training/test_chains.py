"""Chains in the job: links of equal shares of the run, a rate that rises anew, and a stop right after a restart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from little_data import sentences

import jlora
from jlora.training.errors import SettingError
from jlora.training.model.selection import make_spec
from jlora.training.run.schedule import learning_rate, restarts_of
from jlora.training.settings.defaults import count_steps, resolve
from jlora.training.settings.fields import Settings

CHAINS = ("cola", "raclora", "xgblora", "relora")


def chosen(**settings):
    """The methods of a run of 40 steps."""
    return list(make_spec(None, resolve(Settings(steps=40, **settings))).values())


def test_the_flags_name_chains_of_the_runs_length():
    chain = lambda inner, links=4, **options: [jlora.Chain(inner, links, 40, **options)]
    assert chosen(method="cola", rank=4) == chain(jlora.LoRA(4, 8.0))
    assert chosen(method="raclora", rank=4, links=5, dropout=0.1) == chain(jlora.RACLoRA(4, 8.0, dropout=0.1), 5)
    assert chosen(method="xgblora") == chain(jlora.XGBLoRA(1, 2.0), 8)
    assert chosen(method="relora", rank=4, alpha=2.0) == chain(jlora.LoRA(4, 2.0), prune=0.99, by="magnitude")
    table = {"method": "Chain", "inner": {"method": "LoRA", "rank": 4}, "links": 3}
    assert chosen(spec={".*": table}) == chain(jlora.LoRA(4), 3)


def test_links_that_do_not_fit_are_refused():
    with pytest.raises(
        SettingError,
        match=r"links has no meaning with method lora, which has none; it is for cola, raclora, relora, xgblora",
    ):
        Settings(links=3)
    with pytest.raises(SettingError, match=r"links must be at most the 3 steps, got 4"):
        count_steps(resolve(Settings(method="cola", links=4, steps=3, warmup=0)), 100)


def test_the_learning_rate_rises_anew_with_each_link():
    settings = Settings(schedule="constant", learning_rate=1.0, warmup=2, steps=12)
    spec = {"w": jlora.Chain(jlora.LoRA(2), links=3, steps=12)}  # of --method, or of a [spec] table
    restarts = restarts_of(jlora.adapterize({"w": jnp.eye(8)}, spec))
    rates = [float(learning_rate(settings, restarts)(step)) for step in range(12)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1] * 3)


@pytest.mark.long
@pytest.mark.parametrize("method", CHAINS)
def test_a_run_stopped_right_after_a_restart_ends_with_the_same_bits(method, stopped_and_resumed, tmp_path):
    settings = Settings(
        method=method, links=3, steps=6, batch=4, max_length=16, rank=2, checkpoint_every=2, evaluate_every=6,
        targets=".*/(q|v)_proj/kernel", sample_tokens=0, progress="none", warmup=1, data=sentences(tmp_path),
    )  # fmt: skip
    result = stopped_and_resumed(settings)
    frozen = jax.device_get(result.adapted.frozen["layers"]["self_attn"]["q_proj"]["kernel"])
    assert np.all(frozen["link"] == 2)
    links = np.split(frozen["past_b"], 2, axis=-2)
    assert all(np.any(each) for each in links), "a finished link holds nothing"
