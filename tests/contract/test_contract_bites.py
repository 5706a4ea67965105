"""The contract rejects broken methods: each by its own check, and every check rejects something."""

import pytest

from contract import broken, checks, discovery

pytestmark = pytest.mark.once

CHECKS = discovery.checks(checks)


@pytest.mark.parametrize(("cls", "check", "error"), broken.BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_method_is_rejected_by_its_own_check(cls, check, error):
    with pytest.raises(error):
        CHECKS[check](cls())


@pytest.mark.parametrize("check", CHECKS)
def test_the_unbroken_method_passes(check):
    CHECKS[check](broken.Sound())


def test_every_check_has_a_method_that_it_rejects():
    assert {check for _, check, _ in broken.BROKEN} == set(CHECKS)
