"""Eight optimizer steps of the published training loop, on the same images, noise, steps t and weights."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from golden_rules import fill, image_tensor, load, noise
from iddpm.diffusion.denoiser import Denoiser, learned_range
from iddpm.diffusion.grid import Chain
from iddpm.diffusion.objective import hybrid
from iddpm.diffusion.parametrization import eps as predicts_eps
from iddpm.diffusion.schedule import SCHEDULES
from iddpm.nn import UNet, attention_rates, channel_mult_for
from iddpm.training.ema import EMA

GOLDEN = load("training.json")
MODEL, TRAIN = GOLDEN["model_config"], GOLDEN["train_config"]
RATES = [float(rate) for rate in TRAIN["ema_rate"].split(",")]
STEPS, BATCH, MICRO = TRAIN["steps"], TRAIN["batch_size"], TRAIN["microbatch"]


def network() -> nn.Module:
    side, mult = MODEL["image_size"], channel_mult_for(MODEL["image_size"])
    resolutions = [int(r) for r in MODEL["attention_resolutions"].split(",")]
    net = UNet(
        in_channels=3,
        num_channels=MODEL["num_channels"],
        out_channels=6,
        num_res_blocks=MODEL["num_res_blocks"],
        attention=attention_rates(resolutions, side, len(mult)),
        channel_mult=mult,
        num_heads=MODEL["num_heads"],
        use_scale_shift_norm=MODEL["use_scale_shift_norm"],
    )
    return fill(net)


@cache
def trained() -> tuple[nn.Module, EMA, list[dict[str, Tensor]]]:
    """The network and averages after all steps, and each microbatch's losses."""
    net = network()
    schedule = SCHEDULES[MODEL["noise_schedule"]](MODEL["diffusion_steps"])
    chain = Chain(schedule, rescale_time=MODEL["rescale_timesteps"])
    denoiser = Denoiser(net, predicts_eps, learned_range)
    adam = torch.optim.AdamW(net.parameters(), lr=TRAIN["lr"], weight_decay=TRAIN["weight_decay"])
    ema = EMA(dict(net.named_parameters()), RATES, warmup=False)
    trace, micros = [], iter(enumerate(GOLDEN["microbatch_trace"]))
    for step in range(STEPS):
        adam.zero_grad()
        for x0 in image_tensor(100 + step, (BATCH, 3, MODEL["image_size"], MODEL["image_size"])).split(MICRO):
            k, drawn = next(micros)
            u = (torch.tensor(drawn["t"], dtype=torch.float64) + 0.5) / chain.steps
            terms = hybrid(denoiser, chain, x0, noise(k, tuple(x0.shape)), u)
            (terms["loss"] * torch.tensor(drawn["weights"])).sum().div(BATCH).backward()
            trace.append({name: term.detach() for name, term in terms.items()})
        adam.param_groups[0]["lr"] = TRAIN["lr"] * (1 - step / TRAIN["lr_anneal_steps"])
        adam.step()
        ema.update()
    return net, ema, trace


def digest(weights: dict[str, Tensor]) -> np.ndarray:
    """For each parameter: sum, sum of squares, sum of the first 7 elements."""
    flat = [weights[name].detach().double().flatten() for name in GOLDEN["param_names"]]
    return np.array([[w.sum().item(), w.square().sum().item(), w[:7].sum().item()] for w in flat])


def test_the_network_has_the_golden_parameters_in_their_order() -> None:
    assert [name for name, _ in network().named_parameters()] == GOLDEN["param_names"]


@pytest.mark.parametrize("k", range(len(GOLDEN["microbatch_trace"])))
def test_losses_of_each_microbatch_are_the_published_ones(k: int) -> None:
    published = {name: torch.tensor(loss) for name, loss in GOLDEN["microbatch_trace"][k]["losses"].items()}
    torch.testing.assert_close(trained()[2][k], published, rtol=1e-3, atol=0)


def weights_of(name: str) -> dict[str, Tensor]:
    net, ema, _ = trained()
    return dict(net.named_parameters()) if name == "model" else ema.averages[float(name.removeprefix("ema_"))]


@pytest.mark.parametrize("name", load("training.npz"))
def test_weights_and_their_averages_end_where_the_published_ones_do(name: str) -> None:
    ours, published = digest(weights_of(name)), load("training.npz")[name]
    sure = np.array(["qkv.bias" not in p for p in GOLDEN["param_names"]])  # Adam amplifies rounding there
    assert sure.sum() > 200
    np.testing.assert_allclose(ours[sure], published[sure], rtol=1e-2, atol=1e-2)


def test_the_steps_move_the_digests_by_more_than_the_tolerance() -> None:
    """So that the comparison above says something."""
    untrained: Any = digest(dict(network().named_parameters()))
    moved = np.abs(untrained - load("training.npz")["model"]) > 1e-2 + 1e-2 * np.abs(untrained)
    assert moved.any(axis=1).mean() > 0.5
