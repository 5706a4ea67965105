"""Ten steps of AdamW on a tiny Llama give the losses that they give in PEFT 0.21, and AdaLoRA leaves the same ranks."""

import numpy as np
import peft_training_steps as training
import pytest

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", training.names())
def test_ten_steps_of_adamw_have_the_losses_of_peft(name):
    expected = training.expected(name)
    losses, ranks = training.train(training.GOLDEN / name, name, expected["tokens"])
    assert losses[0] - losses[-1] > 0.1
    np.testing.assert_allclose(losses, expected["losses"], rtol=2e-5, atol=2e-5)
    assert ranks == expected["ranks"]
