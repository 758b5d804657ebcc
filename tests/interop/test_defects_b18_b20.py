"""Defects B18 to B20: networks and schedules."""

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import TINY as NATIVE
from iddpm.config import Config
from iddpm.diffusion import grid
from iddpm.diffusion.grid import Chain, respace
from iddpm.diffusion.schedule import Linear
from iddpm.interop.openai.python import fp16_util, logger, script_util, unet
from iddpm.nn import UNet, layers, networks
from interop.test_defects import TINY, TRAIN, command, one_step, red_with

# ---- B18


def three_sizes(patch):
    table = {256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}

    def old(side: int) -> tuple[float, ...]:
        if side not in table:
            raise ValueError(f"unsupported image size: {side}")
        return table[side]

    patch.setattr(networks, "channel_mult_for", old)


def first_width_is_num_channels(patch):
    class Old(UNet):
        def __init__(self, *args: Any, **settings: Any):
            super().__init__(*args, **settings)
            self.out[0] = layers.GroupNorm(self.num_channels)

    patch.setattr(networks, "UNet", Old)


def resolutions_are_divided(patch):
    patch.setattr(networks, "attention_rates", lambda resolutions, side, levels: tuple(side // r for r in resolutions))


@red_with(three_sizes)
def test_b18_any_size_can_be_trained(pictures, tmp_path):
    assert command(tmp_path, "image_train", data_dir=pictures, **TINY | dict(image_size=24), **TRAIN | dict(steps=1)) == 0


@red_with(first_width_is_num_channels, raises=RuntimeError)
def test_b18_the_first_level_may_have_any_width(pictures, tmp_path):
    settings = TINY | TRAIN | dict(channel_mult="2,1", steps=1)
    assert command(tmp_path, "image_train", data_dir=pictures, **settings) == 0


@red_with(resolutions_are_divided)
def test_b18_attention_at_a_size_that_no_level_has_is_refused(pictures, tmp_path, capsys):
    settings = TINY | TRAIN | dict(image_size=16, attention_resolutions="5", steps=1)
    assert command(tmp_path, "image_train", data_dir=pictures, **settings) == 2
    assert "attention at 5 pixels: no level has that size" in capsys.readouterr().err


# ---- B19


def random_state_is_not_kept(patch):
    recompute = layers.checkpoint
    patch.setattr(layers, "checkpoint", lambda *args, **kwargs: recompute(*args, **kwargs | {"preserve_rng_state": False}))


@red_with(random_state_is_not_kept)
def test_b19_recomputed_activations_see_the_same_dropout(pictures, data):
    config = Config().updated(NATIVE | dict(path=str(pictures), dropout=0.5))
    states = [one_step(config.updated({"use_checkpoint": on}), data)[1] for on in (False, True)]
    a, b = (torch.cat([p.grad.flatten() for p in state.params.values()]) for state in states)
    assert ((a - b).norm() / a.norm()).item() < 1e-6


# ---- B20


def stride_without_size(patch):
    pool = unet.avg_pool_nd
    patch.setattr(unet, "avg_pool_nd", lambda dims, stride, size: pool(stride))


def channels_last_shape(patch):
    def old(self: Any, x: Tensor, timesteps: Tensor, low_res: Tensor, **kwargs: Any) -> dict[str, Any]:
        _, height, width, _ = x.shape
        low_res = F.interpolate(low_res, (height, width), mode="bilinear")
        return super(unet.SuperResModel, self).get_feature_vectors(torch.cat([x, low_res], dim=1), timesteps, **kwargs)

    patch.setattr(unet.SuperResModel, "get_feature_vectors", old)


def step_1_is_looked_up(patch):
    made = Chain.__init__

    def old(self: Chain, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if self.steps < self.schedule_steps:  # the process that is sampled, not the one that is trained
            self.table.log_min[1]

    patch.setattr(Chain, "__init__", old)


def betas_as_they_come(patch):
    def old(self: Linear) -> Tensor:
        return torch.linspace(0.1 / self.steps, 20 / self.steps, self.steps, dtype=torch.float64)

    patch.setattr(Linear, "betas", old)


def strides_below_the_chain(patch):
    def old(steps: int, count: int) -> list[int]:
        for stride in range(1, steps):
            if len(kept := range(0, steps, stride)) == count:
                return list(kept)
        raise ValueError(f"cannot create exactly {steps} steps with an integer stride")

    patch.setattr(grid, "_strided", old)


def gradients_are_all_there(patch):
    patch.setattr(fp16_util, "grad_norm", lambda params: sum((p.grad**2).sum() for p in params) ** 0.5)


def biases_are_all_there(patch):
    def old(module: nn.Module) -> None:
        module.weight.data, module.bias.data = module.weight.data.half(), module.bias.data.half()

    patch.setattr(fp16_util, "convert_module_to_f16", old)


def tensorflow_1(patch):
    class Old:
        def __init__(self, dir: str):
            import tensorflow  # noqa: F401

    patch.setattr(logger, "TensorBoardOutputFormat", Old)


@red_with(stride_without_size, raises=TypeError, says="kernel_size")
def test_b20_pixels_are_halved_without_a_convolution():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    expected = [[2.5, 4.5], [10.5, 12.5]]
    assert unet.Downsample(1, use_conv=False)(x)[0, 0].tolist() == layers.Downsample(1, False)(x)[0, 0].tolist() == expected


@red_with(channels_last_shape, raises=RuntimeError)
def test_b20_a_super_resolution_model_gives_its_features():
    sizes = dict(large_size=16, small_size=8, num_channels=16, num_res_blocks=1)
    net = script_util.called(script_util.sr_create_model, script_util.sr_model_and_diffusion_defaults() | sizes)
    found = net.get_feature_vectors(torch.zeros(1, 3, 16, 16), torch.zeros(1), low_res=torch.zeros(1, 3, 8, 8))
    assert found["up"][-1].shape == (1, 16, 16, 16)


@red_with(step_1_is_looked_up, raises=IndexError)
def test_b20_one_step_can_be_sampled(pictures, tmp_path):
    assert command(tmp_path, "image_train", data_dir=pictures, **TINY, **TRAIN | dict(steps=1)) == 0
    settings = dict(model_path=tmp_path / "model000001.pt", num_samples=2, timestep_respacing="1")
    assert command(tmp_path, "image_sample", **TINY, **settings) == 0
    assert (tmp_path / "samples_2x8x8x3.npz").exists()


@pytest.mark.parametrize("steps", [10, 20])
@red_with(betas_as_they_come)
def test_b20_a_linear_schedule_may_have_few_steps(steps):
    chain = Chain(Linear(steps))
    assert chain.betas.max() < 1
    assert all(column.isfinite().all() for column in chain.table)


@red_with(strides_below_the_chain, raises=ValueError)
def test_b20_ddim_may_take_one_step():
    assert respace(1000, "ddim1") == [0]


@red_with(strides_below_the_chain)
def test_b20_a_ddim_count_that_no_stride_gives_is_named_with_its_neighbours():
    with pytest.raises(ValueError, match="steps") as caught:
        respace(1000, "ddim300")
    assert str(caught.value) == "ddim300: no whole stride takes 300 of 1000 steps; possible near it: [200, 250, 334]"


@red_with(gradients_are_all_there, raises=TypeError)
def test_b20_a_parameter_without_a_gradient_is_no_fault():
    with_one, without = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    with_one.grad = torch.tensor([3.0, 4.0])
    assert fp16_util.grad_norm([with_one, without]).item() == 5


@red_with(biases_are_all_there, raises=AttributeError)
def test_b20_a_convolution_without_bias_becomes_float16():
    layer = nn.Conv2d(2, 2, 3, bias=False)
    fp16_util.convert_module_to_f16(layer)
    assert layer.weight.dtype == torch.float16


@red_with(tensorflow_1, raises=ImportError)
def test_b20_tensorboard_needs_no_tensorflow(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "tensorboard")
    assert command(tmp_path, "image_train", data_dir=pictures, **TINY, **TRAIN | dict(steps=1)) == 0
    assert any(name.startswith("events.") for name in os.listdir(tmp_path / "tb"))
