"""What a run's numbers say of it: training that diverged or made the model worse is told, a short good run is left alone."""

import dataclasses
from types import SimpleNamespace

import pytest

from jlora.training.reporting.verdict import advice, complaint, is_stuck, unsteady
from jlora.training.settings.fields import Settings

SETTINGS = Settings(data="a.txt", model="dir", learning_rate=1.0)


def metrics(train, before, after, weight=1000.0, between=(), **accuracy):
    """Records of a run; accuracies as `accuracy=(before, after)`."""
    first, last = accuracy.get("accuracy", (None, None))
    validation = [(before, first), *((loss, None) for loss in between), (after, last)]
    found = {
        "train": [{"step": n, "loss": loss, "gradient_norm": 1.0} for n, loss in enumerate(train, 1)],
        "validation": [
            {"step": 10 * n, "loss": loss, "weight": weight} | ({} if right is None else {"accuracy": right})
            for n, (loss, right) in enumerate(validation)
        ],
    }
    return SimpleNamespace(of=found.__getitem__)


@pytest.mark.parametrize(
    "found",
    [
        metrics([6.0, 4.0, 3.0], 6.0, 3.0),
        # Twelve steps that did nothing yet: a loss that rose by less than what such a validation can tell.
        metrics([2.0] * 12, 2.0, 2.015),
        metrics([0.69, 0.75], 0.69, 0.80, weight=8.0, accuracy=(0.5, 0.5)),
        # A classifier that is surer than it should be, and yet more often right.
        metrics([0.7, 0.2], 0.69, 0.9, accuracy=(0.5, 0.8)),
    ],
)
def test_a_good_or_short_run_is_left_alone(found):
    assert complaint(found, SETTINGS) is None and unsteady(found, SETTINGS) is None


def test_a_validation_that_got_worse_is_told_with_its_reason():
    diverged = complaint(metrics([5.6, 12.0, 6.2], 5.99, 6.24), SETTINGS)
    assert diverged == (
        "the validation is worse than before the training: loss 5.9900 before, 6.2400 after; the training diverged: lower "
        "--learning-rate from 1 to 0.0005 or raise --warmup"
    )
    learned_by_heart = complaint(metrics([2.0, 1.0, 0.1], 2.0, 2.5, between=[1.5]), SETTINGS)
    assert "while the training loss fell" in learned_by_heart and "that of step 10: 1.5000" in learned_by_heart
    assert complaint(metrics([0.7, 3.0], 0.69, 3.0, accuracy=(0.5, 0.5)), SETTINGS) is not None


def test_a_lower_rate_is_advised_whatever_the_rate():
    assert "from 0.0005 to 0.00017" in advice(dataclasses.replace(SETTINGS, learning_rate=5e-4))
    assert "from 1 to 0.01" in advice(Settings(learning_rate=1.0))


def test_only_gradients_of_exactly_0_at_a_loss_are_stuck():
    dead, right = {"gradient_norm": 0.0, "loss": 6.2}, {"gradient_norm": 0.0, "loss": 1e-5}
    assert is_stuck([dead] * 10)
    assert not is_stuck([dead] * 9)
    assert not is_stuck([right] * 10)
    assert not is_stuck([*[dead] * 9, {"gradient_norm": 1e-9, "loss": 6.2}])


def test_a_loss_that_came_back_from_far_up_is_a_note():
    found = metrics([6.0, 6.0, 16.0, 11.0, 10.0, 9.0, 9.5, 6.0, 5.4], 6.0, 5.4)
    assert complaint(found, SETTINGS) is None
    assert "the training loss rose from 6.00 to 10.00 in steps 1 to 5" in unsteady(found, SETTINGS)
