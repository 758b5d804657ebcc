"""What `--objective path` learns in the place of images: the paths from noise to images of the network that a run began with."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iddpm import build, rng
from iddpm.config import Config, image_size
from iddpm.data.batches import Batch
from iddpm.diffusion.denoiser import wide
from iddpm.nn.unet import CHANGES
from iddpm.parallel import processes, shard


class Paths:
    """Points of a frozen network's paths, each with the image at the end of its path (CMT, Hu et al. 2025, section 4).

    Each place in the global batch has a path of its own for as many steps as a path has levels, and comes to each of them once,
    in an order drawn for it. So a step costs about one call of the frozen network, without a gradient, and its points are of as
    many paths as there are images in the batch. All of it depends on the seed, the step and the place alone. The paths are
    those of `dpmpp_2m`, without guidance, towards classes drawn evenly, with --class_dropout sometimes towards none; in memory
    lie batch x (levels + 1) images.
    """

    def __init__(self, config: Config, device: torch.device, levels: int):
        walks = dict(solver="dpmpp_2m", sampling_steps=str(levels), grid="respaced", guidance=1.0, skip_first=False)
        self.config, self.device, self.levels = config.updated(walks), device, levels
        self.net = build.network(config).to(device).requires_grad_(False).eval()
        self.grid, schedule = build.grid(self.config), build.schedule(config)
        self.u = schedule.u_of(self.grid.table.sigma / self.grid.table.alpha).flip(0)  # of the levels, noisiest first
        self.schedule, self.block = schedule, -1

    def begin(self, params: Mapping[str, Tensor]) -> None:
        """Walk from now on by these weights of the network, perhaps sharded: those that the run begins with."""
        with torch.no_grad():
            for name, p in self.net.named_parameters():
                p.copy_(shard.whole(params[name]))

    def state_dict(self) -> dict[str, Tensor]:
        return self.net.state_dict()

    def load_state_dict(self, kept: Mapping[str, Tensor]) -> None:
        self.net.load_state_dict(kept)
        self.block = -1

    def __call__(self, step: int) -> tuple[Batch, Tensor]:
        """This process's share of a step: ends of paths as x0, with such eps that x_t is the point at u (b,)."""
        block, turn = divmod(step, self.levels)
        if block != self.block:
            self._walk(block)
        k, rows = self.turns[:, turn], torch.arange(len(self.turns))
        u, xt, end = self.u[k], self.points[rows, k], self.points[rows, -1]
        level = self.schedule(u)
        alpha, sigma = wide((level.alpha, level.sigma), xt)
        return Batch(end, (xt - alpha * end) / sigma, {name: value.to(self.device) for name, value in self.cond.items()}), u

    @torch.no_grad()
    def _walk(self, block: int) -> None:
        """The paths of a block of steps: `points` (b, levels + 1, C, H, W), and the `turns` (b, levels) in which they come."""
        m, t = self.config.model, self.config.train
        mine, shape = processes.share(t.batch_size), (m.image_channels, *image_size(m))
        noise, turns, ys, classes = [], [], [], len(self.config.data.classes) or m.num_classes or 1
        for place in mine:
            stream = rng.stream(t.seed, rng.PATH, block, place)
            noise.append(stream.standard_normal(shape, dtype=np.float32))
            turns.append(stream.permutation(self.levels))
            y = int(stream.integers(classes))
            ys.append(m.num_classes if stream.random() < m.class_dropout else y)
        self.cond: dict[str, Tensor] = {"y": torch.tensor(ys)} if m.class_cond else {}
        if m.augment:  # zeros: nothing was changed
            self.cond["augment"] = torch.zeros(len(mine), CHANGES)
        net, solver = build.in_precision(self.net, self.device, t.precision), build.solver(self.config)
        parts = list[Tensor]()
        size = t.microbatch if t.microbatch > 0 else len(mine)
        for a in range(0, len(mine), size):
            cond = {name: value[a : a + size].to(self.device) for name, value in self.cond.items()}
            x = torch.from_numpy(np.stack(noise[a : a + size])).to(self.device) * self.grid.start
            walked = solver(build.drawing(self.config, net, cond), x, self.grid, _no_noise)
            parts.append(torch.stack([x, *(state.x for state in walked)], dim=1))
        self.points, self.turns, self.block = torch.cat(parts), torch.from_numpy(np.stack(turns)), block


def _no_noise(k: int) -> Any:
    raise AssertionError("dpmpp_2m draws nothing")
