"""What `iddpm plan` says, held against what really happens: the allocator's own count, the real network, torch's counters."""

import gc
import json
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from conftest import SLOW
from iddpm import build
from iddpm.cli import main as cli
from iddpm.cli.plan import VERB
from iddpm.config import Config
from iddpm.errors import UserError
from iddpm.parallel.shard import Layout
from iddpm.store.log import Meter
from iddpm.training import plan as planning
from iddpm.training.plan import Live, communication, pretended, watch
from iddpm.training.state import TrainState
from iddpm.training.step import method_of, train_step
from iddpm.training.trial import example

MIB = 2**20
SMALL = dict(
    image_size="16", num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="8", num_heads=2,
    diffusion_steps=100, learn_sigma=True, noise_schedule="cosine", batch_size=32, ema_rate="0.9,0.99", device="cpu",
    sampling_steps="all",
)  # fmt: skip
KINDS = {
    "learn_sigma": SMALL,
    "bf16 in microbatches": dict(SMALL, precision="bf16", microbatch=12, learn_sigma=False, dropout=0.1),
    "super_res, recomputed": dict(
        SMALL, task="enlarge", small_size="8", low_res_noise=0.1, use_checkpoint=True, image_size="32", resblock_updown=True
    ),
    "classifier": dict(
        SMALL, task="classify", class_cond=True, num_classes=10, learn_sigma=False, image_size="32", batch_size=24
    ),
}


@pytest.fixture(autouse=True)
def _verb(monkeypatch):
    monkeypatch.setitem(cli.VERBS, "plan", VERB)


def allocated(config: Config, images: int, ddp: bool = False) -> int:
    """The most bytes that torch's CPU allocator had given out at once, by its own count, in two steps of training on `images`."""
    device = torch.device("cpu")
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        state, meter, batch = TrainState(config, device), Meter(), example(config, images)
        net = state.parallel
        if ddp:  # as distributed.parallel does; gloo's threads would keep what init_sync sends for a while
            net = nn.parallel.DistributedDataParallel(state.net, gradient_as_bucket_view=True, init_sync=False)
        method = method_of(config, net)
        for _ in range(2):
            train_step(state, config, method, batch, meter)
    assert state.step == 2 and not state.skipped
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


@cache
def plan(config: Config, processes: int = 1, cuda: bool = False) -> planning.Plan:
    return planning.plan(config, processes, cuda)


def planned(config: Config, processes: int = 1) -> int:
    found = plan(config, processes)
    return found.need[config.model.use_checkpoint].peak(found.micro)


# ---- memory


@pytest.mark.parametrize("kind", [kind if kind == "classifier" else SLOW(kind) for kind in KINDS])
def test_planned_memory_is_what_training_allocates(kind):
    config = Config().updated(KINDS[kind])
    real = allocated(config, config.train.batch_size)
    assert real > 10 * MIB
    assert planned(config) == pytest.approx(real, rel=0.15)


def test_with_shards_it_is_what_one_of_four_processes_allocates():
    config = Config().updated(SMALL | dict(num_channels=64, shard=2, microbatch=3, batch_size=24, ema_rate="0.9"))
    with pretended(4):
        real = allocated(config, 6)
    assert planned(config, 4) == pytest.approx(real, rel=0.15)
    assert planned(config.updated({"shard": 0}), 4) > 1.3 * real  # so the test can tell


@pytest.mark.parametrize("micro", [SLOW(-1), 2])
def test_with_ddp_it_counts_buckets_and_the_gradients_outside_of_them(micro):
    config = Config().updated(SMALL | dict(num_channels=64, batch_size=6, microbatch=micro, ema_rate="0.9"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        real = allocated(config, 6, ddp=True)
    finally:
        dist.destroy_process_group()
        gc.collect()
    two = planned(config.updated({"batch_size": 12}), 2)
    assert two == pytest.approx(real, rel=0.08)
    gradients = 4 * plan(config).parameters
    assert gradients > 0.1 * real  # leaving them out would fail


def test_the_bytes_of_a_batch_do_not_depend_on_which_was_watched(monkeypatch):
    config = Config().updated(SMALL)
    one = plan(config).need[False].profile
    monkeypatch.setattr(planning, "IMAGES", 32)  # what is constant is not told from what grows; all is right for 32 images
    other = planning.plan(config, cuda=False).need[False].profile
    assert one.first_pass(32) == other.first_pass(32) and one.later_pass(32) == other.later_pass(32)


def test_the_largest_microbatch_is_the_last_that_fits():
    need = plan(Config().updated(SMALL)).need[False]
    room = 50 * MIB
    largest = need.largest(room)
    assert largest > 1
    assert need.peak(largest) <= room < need.peak(largest + 1)
    assert need.largest(need.peak(1) - 1) == 0


def test_cuda_keeps_norms_in_float32_under_autocast_and_masks_in_bytes():
    def kept(cuda: bool, **flags: object) -> int:
        return plan(Config().updated(SMALL | flags), 1, cuda).need[False].profile.most(planning.ACTIVATION, 32)

    assert kept(False, precision="bf16") < kept(True, precision="bf16") < kept(False)
    # masks for the second convolution of each residual block: 3 blocks of 32x16x16, 5 of 64x8x8; as floats, and as bytes
    elements = 32 * (3 * 32 * 16 * 16 + 5 * 64 * 8 * 8)
    assert kept(False, dropout=0.1) - kept(True, dropout=0.1) == (4 - 1) * elements


@pytest.mark.slow
def test_a_thousand_processes_are_planned_in_seconds_and_allocate_nothing(capsys):
    planning.plan(Config().updated(SMALL | dict(shard=2)), 4)  # what is imported on the way
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = _resident("VmRSS"), time.process_time()
    assert cli.main(["plan", "--preset=imagenet64", "--batch_size=2048", "--processes=1024", "--shard=8", "--json"]) == 0
    assert time.process_time() - began < 40
    grown, facts = _resident("VmHWM") - before, spoken(capsys)["plan"]
    assert facts["parameters"] == 121_063_942  # 0.5 GB
    assert grown < 100 * MIB < facts["memory"]["use_checkpoint=False"]["peak"] / 5


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


# ---- parameters and operations


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_real_network(kind):
    config = Config().updated(KINDS[kind])
    assert plan(config).parameters == sum(p.numel() for p in build.network(config).parameters())


def test_operations_of_a_convolution_and_a_linear_layer_are_those_of_a_hand_count():
    with FakeTensorMode():
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 10 * 10, 5))
        live = Live()
        with live.watching():
            out = net(torch.zeros(4, 3, 10, 10))
            forward = live.flops
            out.sum().backward()
    conv, linear = 2 * 4 * 8 * 10 * 10 * 3 * 9, 2 * 4 * 8 * 10 * 10 * 5
    assert forward == conv + linear
    assert live.flops == forward + conv + 2 * linear  # the images need no gradient


def test_operations_are_those_torch_counts_in_the_real_network():
    config = Config().updated(SMALL)
    net, counted = build.network(config), []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the kernels it knows
        out = net(torch.zeros(2, 3, 16, 16), torch.zeros(2))
        counted.append(counter.get_total_flops() / 2)
        out.sum().backward()
        counted.append(counter.get_total_flops() / 2)
    found = plan(config).passes[False]
    assert found.forward == counted[0]
    # the fused kernel works its scores out again in the backward pass: 8x8 tokens of 64 channels, in 4 blocks
    assert found.both == counted[1] + 4 * 2 * 64 * 64 * 64
    assert plan(config).passes[True].both > found.both


# ---- communication


def test_ddp_sends_the_gradients_twice_around_the_ring():
    (traffic,) = communication([[(6, 5)], [(10,)]], Layout(4), microbatches=3)
    assert traffic == ("all-reduce", 4 * 40, 4 * 40 * 2 * 3 // 4)
    assert communication([[(6, 5)], [(10,)]], Layout(1), microbatches=3) == []


def test_fsdp_gathers_stages_twice_and_the_root_once_in_whole_rows():
    # of 4 parts of (6, 5) the largest has 2 rows: 8 rows are sent; of (10,), 3: 12
    gather, reduce, share = communication([[(6, 5)], [(10,)]], Layout(8, 4), microbatches=3)
    assert gather == ("all-gather", 4 * 3 * (2 * 40 + 12), 4 * 3 * (2 * 40 + 12) * 3 // 4)
    assert reduce == ("reduce-scatter", 4 * (40 + 12), 4 * (40 + 12) * 3 // 4)
    assert share == ("all-reduce", 52, 52 * 2 * 1 // 2)  # a quarter of it, between two copies


@pytest.mark.parametrize(("processes", "shard"), [SLOW(48, 48), (6, 2)])
def test_communication_is_what_fsdp_asks_of_the_process_group(processes, shard):
    config = Config().updated(SMALL | dict(batch_size=48, shard=shard))
    groups, passes = watch(config, Layout(processes, shard), cuda=False)
    asked: dict[str, int] = {}
    for name, size in passes[True].calls:
        kind = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}[name]
        asked[kind] = asked.get(kind, 0) + size
    expected = communication(groups, Layout(processes, shard), microbatches=1)
    assert {t.what: t.payload for t in expected} == asked


# ---- the command


def spoken(capsys) -> dict[str, dict]:
    """The objects of --json by their events, and all text under ""."""
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {o["event"]: o for o in objects} | {"": "\n".join(o["text"] for o in objects)}


def test_the_plan_ends_with_numbers_and_the_command_that_runs_it(capsys, tmp_path):
    flags = ["--preset=cifar10-tiny", "--processes=4", "--memory_gb=0.08", "--device_tflops=10", "--bandwidth_gbs=1"]
    assert cli.main(["plan", *flags, "--json"]) == 0
    said = spoken(capsys)
    said, facts = said[""], said["plan"]
    seconds = facts["flops_per_image"]["forward_backward"] * 8 / (10e12 * 0.4)
    talk = sum(t["sent"] for t in facts["communication"]) / 1e9
    assert facts["speed"]["images_per_second"]["not_hidden"] == pytest.approx(32 / (seconds + talk))
    assert facts["speed"]["days"]["hidden"] == pytest.approx(1500 * max(seconds, talk) / 86400)
    fits = facts["memory"]["use_checkpoint=False"]["largest_microbatch"]
    assert 0 < fits < 8 == facts["microbatch"]
    last = said.splitlines()[-1]
    command = f"torchrun --nproc-per-node 4 -m -- iddpm train DATA --preset cifar10-tiny --microbatch {fits}"
    assert last == f"next: {command}"


def test_a_run_is_planned_from_its_folder(run, capsys):
    assert cli.main(["plan", "--run", str(run), "--processes", "16", "--batch_size", "64"]) == 0
    said = capsys.readouterr().out
    assert "unet for 8x8" in said and "communication not counted" not in said and "--device_tflops" in said
    assert f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --nproc-per-node 8 -m -- iddpm train --run {run}" in said
    assert cli.main(["plan", "--run", str(run), "--num_channels", "64"]) == 2
    assert "was trained with 16, which cannot change" in capsys.readouterr().err


def test_speed_is_measured_on_real_steps(capsys, tmp_path):
    flags = dict(SMALL, batch_size=2, num_channels=16, steps=10)
    assert cli.main(["plan", "--measure", "--json", *(f"--{k}={v}" for k, v in flags.items())]) == 0
    said = spoken(capsys)
    speed = said["plan"]["speed"]
    config, device = Config().updated(flags), torch.device("cpu")
    state, meter, batch = TrainState(config, device), Meter(), example(config, 2)
    method = method_of(config, state.net)
    began = time.perf_counter()
    for _ in range(5):
        train_step(state, config, method, batch, meter)
    seconds = (time.perf_counter() - began) / 5
    assert seconds / 4 < speed["compute_seconds"] < 4 * seconds  # the machine may be busy
    assert speed["days"]["hidden"] == pytest.approx(10 * speed["compute_seconds"] / 86400)
    assert "from real steps of 2 on cpu" in said[""]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "plan what? iddpm plan --preset NAME"),
        (["--processes=8"], "plan what?"),
        (["--preset=imagenet"], "--preset imagenet is not one of: auto, none, digits"),
        (["--steps=1", "--class_cond=True"], "of how many classes? add --num_classes N"),
        (["--preset=cifar10-tiny", "--num_classes=10"], "has no effect without --class_cond"),
        (["--preset=cifar10-tiny", "--memory_gb=0.03"], "cannot take one image at a time, which needs 0.0"),
        (["--preset=cifar10-tiny", "--processes=33"], "at least one image for each of the 33 processes"),
        (["--preset=cifar10-tiny", "--processes=8", "--shard=3"], "--shard 3 does not divide the 8 processes"),
        (["--preset=cifar10-tiny", "--bandwidth_gbs=9"], "no effect with one process"),
        (["--preset=cifar10-tiny", "--efficiency=0.5"], "no effect without --device_tflops"),
        (["--preset=cifar10-tiny", "--measure", "--device_tflops=9"], "give one"),
        (["--preset=cifar10-tiny", "--image_size=33"], "--image_size 33"),
        (["--run=nowhere"], "nowhere is no run of iddpm"),
        (["--preset=cifar10-tiny", "--run=nowhere"], "both name a config"),
    ],
)
def test_what_cannot_be_planned_is_one_line(flags, said, capsys):
    assert cli.main(["plan", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_nothing_is_left_behind():
    torch_resize, norm = torch.UntypedStorage.resize_, nn.functional.group_norm
    with pytest.raises(UserError):
        planning.plan(Config().updated(SMALL | dict(image_size="17", shard=2)), 4)
    planning.plan(Config().updated(SMALL | dict(shard=2, precision="bf16")), 4)
    assert torch.UntypedStorage.resize_ is torch_resize and nn.functional.group_norm is norm
    assert gc.isenabled() and not dist.is_initialized()
