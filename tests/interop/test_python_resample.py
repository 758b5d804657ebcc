"""The laws of t by the original's names: the published weights, and draws from numpy's generator."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from golden_rules import load
from iddpm.interop.openai.python import resample

GOLDEN = load("second_moment.json")
CHAIN = SimpleNamespace(num_timesteps=GOLDEN["num_timesteps"])


def test_second_moment_weights_are_the_published_ones() -> None:
    """B1: the original cannot be made with a numpy from 1.24 on."""
    law = resample.LossSecondMomentResampler(CHAIN, GOLDEN["history_per_term"], GOLDEN["uniform_prob"])
    for update in GOLDEN["updates"]:
        law.update_with_all_losses(update["ts"], update["losses"])
        np.testing.assert_allclose(law.weights(), update["weights"], rtol=1e-9)
        assert law._warmed_up() == update["warm"]
    other = resample.LossSecondMomentResampler(CHAIN)
    other.load_state_dict(law.state_dict())
    np.testing.assert_array_equal(other.weights(), law.weights())


@pytest.mark.parametrize("name", resample.SAMPLERS)
def test_samplers_have_names(name: str) -> None:
    sampler = resample.create_named_schedule_sampler(name, CHAIN)
    np.testing.assert_array_equal(sampler.weights(), np.ones(12))
    t, w = sampler.sample(5, "cpu")
    assert t.dtype == torch.int64 and w.tolist() == [1.0] * 5


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(NotImplementedError, match="uniform, loss-second-moment"):
        resample.create_named_schedule_sampler("gaussian", CHAIN)


def test_a_draw_is_of_numpys_generator_and_weighted_to_be_unbiased() -> None:
    class Two(resample.ScheduleSampler):
        def weights(self) -> np.ndarray:
            return np.array([1.0, 3.0])

    np.random.seed(0)
    t, w = Two().sample(2000, "cpu")
    np.random.seed(0)
    np.testing.assert_array_equal(t.numpy(), np.random.choice(2, size=(2000,), p=[0.25, 0.75]))
    assert w[t == 0].unique().item() == 2 and w[t == 1].unique().item() == pytest.approx(2 / 3)


def test_one_process_updates_from_its_own_losses() -> None:
    law = resample.LossSecondMomentResampler(SimpleNamespace(num_timesteps=2), history_per_term=1)
    law.update_with_local_losses(torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
    np.testing.assert_allclose(law.weights(), [0.001 / 2 + 0.999 / 4, 0.001 / 2 + 0.999 * 3 / 4], rtol=1e-6)
