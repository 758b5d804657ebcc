"""The optimizer's file: by parameter, flat as under the original's fp16, or in guided-diffusion's two parts, there and back."""

import pytest
import torch
from torch import nn

from iddpm.errors import UserError
from iddpm.interop.openai.formats import files, flags
from iddpm.interop.openai.formats.optimizer import MOMENTS, flatten, groups, layout_of, optimizer_file, unflatten
from iddpm.store.checkpoint import Saved
from interop.written import FLAGS, network, write

SHAPES = {"a.weight": (3, 2, 1), "a.bias": (3,), "b.weight": (4, 3), "c": ()}
CONFIG = flags.to_config("images", FLAGS)


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def masters(params: dict[str, nn.Parameter], layout: str) -> list[nn.Parameter]:
    """What the originals give to AdamW: written out here again, by their description."""
    if layout == "each":
        return list(params.values())
    if layout == "flat":
        return [nn.Parameter(torch.cat([p.detach().reshape(-1) for p in params.values()]))]
    small = [p.detach().reshape(-1) for p in params.values() if p.ndim <= 1]
    large = [p.detach().reshape(-1) for p in params.values() if p.ndim > 1]
    return [nn.Parameter(torch.cat(small)), nn.Parameter(torch.cat(large).view(1, -1))]


def step(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, layout: str, seed: int) -> None:
    """A step with the gradient that every layout has alike: by name, then laid out as the weights are."""
    torch.manual_seed(seed)
    grads = masters({name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}, layout)
    for p, g in zip(params, grads):
        p.grad = g.detach()
    optimizer.step()


def adam(params: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("layout", ["flat", "guided"])
def test_a_step_on_the_flat_parameter_and_on_each_are_the_same_step(layout):
    """Two optimizers of torch's go side by side; at half time each goes on from the other's converted state."""
    one, other = masters(parameters(), "each"), masters(parameters(), layout)
    by_each, by_flat = adam(one), adam(other)
    for k in range(3):
        step(one, by_each, "each", k)
        step(other, by_flat, layout, k)
    ours = unflatten(by_flat.state_dict()["state"], SHAPES, layout)
    for k, name in enumerate(SHAPES):
        for slot in MOMENTS:
            torch.testing.assert_close(ours[f"{name}.{slot}"], by_each.state[one[k]][slot], rtol=1e-6, atol=0)
    theirs = flatten({f"{n}.{s}": v for n, p in zip(SHAPES, one) for s, v in by_each.state[p].items()}, SHAPES, layout)
    slots = {k: {s: ours[f"{name}.{s}"] for s in ("step", *MOMENTS)} for k, name in enumerate(SHAPES)}
    by_each.load_state_dict({"state": slots, "param_groups": by_each.state_dict()["param_groups"]})
    by_flat.load_state_dict({"state": theirs, "param_groups": by_flat.state_dict()["param_groups"]})
    for k in range(3, 6):
        step(one, by_each, "each", k)
        step(other, by_flat, layout, k)
    assert {float(s["step"]) for s in by_each.state.values()} == {6.0}
    for a, b in zip(masters(dict(zip(SHAPES, one)), layout), other):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", ["each", "flat", "guided"])
def test_a_state_comes_back_from_a_layout_bit_for_bit(layout):
    torch.manual_seed(1)
    slots = {f"{name}.{slot}": torch.randn(shape) for name, shape in SHAPES.items() for slot in MOMENTS}
    slots |= {f"{name}.step": torch.tensor(7.0) for name in SHAPES}
    state = flatten(slots, SHAPES, layout)
    assert len(state) == len(groups(SHAPES, layout)) == {"each": 4, "flat": 1, "guided": 2}[layout]
    back = unflatten(state, SHAPES, layout)
    assert set(back) == set(slots)
    assert all(torch.equal(back[name], value) for name, value in slots.items())


def test_the_flat_parameter_is_in_the_networks_order():
    slots = {f"{name}.{slot}": torch.full(shape, float(k)) for k, (name, shape) in enumerate(SHAPES.items()) for slot in MOMENTS}
    slots |= {f"{name}.step": torch.tensor(1.0) for name in SHAPES}
    assert flatten(slots, SHAPES, "flat")[0]["exp_avg"].tolist() == [0.0] * 6 + [1.0] * 3 + [2.0] * 12 + [3.0]
    vectors, others = flatten(slots, SHAPES, "guided").values()
    assert vectors["exp_avg"].tolist() == [1.0] * 3 + [3.0]
    assert others["exp_avg"].tolist() == [[0.0] * 6 + [2.0] * 12]


def test_parameters_that_were_not_stepped_together_cannot_be_one(tmp_path):
    slots = {f"{name}.{slot}": torch.zeros(shape) for name, shape in SHAPES.items() for slot in MOMENTS}
    slots |= {f"{name}.step": torch.tensor(float(k)) for k, name in enumerate(SHAPES)}
    with pytest.raises(ValueError, match="stepped together"):
        flatten(slots, SHAPES, "flat")


@pytest.mark.parametrize("fp16", [False, True])
def test_a_written_file_is_read_by_parameter_with_its_count(tmp_path, fp16):
    source = write(tmp_path, updates=3, fp16=fp16)
    slots, count = files.read_optimizer(tmp_path / "opt000010.pt", {k: tuple(v.shape) for k, v in source.weights.items()})
    assert count == 3
    held = list(source.optimizer.state.values())
    for slot in MOMENTS:
        mine = torch.cat([slots[f"{name}.{slot}"].flatten() for name in source.weights])
        assert torch.equal(mine, torch.cat([s[slot].flatten() for s in held]))


def test_a_count_that_is_a_plain_number_as_torch_1_7_wrote_it_is_read(tmp_path):
    source = write(tmp_path, updates=3)
    state = source.optimizer.state_dict()
    for slots in state["state"].values():
        slots["step"] = 3
    group = state["param_groups"][0]
    state["param_groups"] = [{k: group[k] for k in ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")}]
    torch.save(state, tmp_path / "opt000010.pt")
    slots, count = files.read_optimizer(tmp_path / "opt000010.pt", {k: tuple(v.shape) for k, v in source.weights.items()})
    assert count == 3
    assert slots["out.2.bias.step"] == torch.tensor(3.0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_torchs_own_adamw_takes_the_file_we_write(precision):
    """On the parameters that the original would give it."""
    config, net = CONFIG.updated(dict(precision=precision, lr=3e-4, weight_decay=0.01)), network(FLAGS)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    slots = {f"{name}.{slot}": torch.rand(shape) for name, shape in shapes.items() for slot in MOMENTS}
    slots |= {f"{name}.step": torch.tensor(5.0) for name in shapes}
    made = optimizer_file(Saved(5, {}, {}, slots, {}), config, shapes)
    params = list(net.parameters())
    if precision == "fp16":
        params = [nn.Parameter(torch.cat([p.detach().flatten() for p in params]))]
    optimizer = torch.optim.AdamW(params, lr=1.0)
    optimizer.load_state_dict(made)
    assert optimizer.param_groups[0]["lr"] == 3e-4
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert {float(s["step"]) for s in optimizer.state.values()} == {6.0}


@pytest.mark.parametrize(
    ("kind", "settings", "layout"),
    [
        ("images", {}, "flat"),
        ("images", {"num_head_channels": 64}, "guided"),
        ("images", {"resblock_updown": True}, "guided"),
        ("images", {"use_new_attention_order": True}, "guided"),
        ("enlarge", {}, "flat"),
        ("classify", {}, "guided"),
    ],
)
def test_under_fp16_the_layout_is_that_of_the_program_which_has_the_network(kind, settings, layout):
    program = "guided" if layout == "guided" else "improved"
    assert layout_of(flags.to_config(kind, settings | {"use_fp16": True, "classifier_use_fp16": True}, program)) == layout
    assert layout_of(flags.to_config(kind, settings, program)) == "each"


def test_an_optimizer_of_another_network_is_refused(tmp_path):
    source = write(tmp_path / "a", fp16=True)
    other = write(tmp_path / "b", settings=FLAGS | {"num_res_blocks": 2})
    shapes = {k: tuple(v.shape) for k, v in source.weights.items()}
    with pytest.raises(UserError, match="do not belong together"):
        files.read_optimizer(tmp_path / "b" / "opt000010.pt", shapes)
    with pytest.raises(UserError, match="of another network"):
        files.read_optimizer(tmp_path / "a" / "opt000010.pt", {k: tuple(v.shape) for k, v in other.weights.items()})
    with pytest.raises(UserError, match="no optimizer's state"):
        files.read_optimizer(source.model, shapes)


def test_guided_diffusions_two_parameters_are_read_from_their_file(tmp_path):
    two = masters(parameters(), "guided")
    optimizer = adam(two)
    step(two, optimizer, "guided", 0)
    torch.save(optimizer.state_dict(), tmp_path / "opt000000.pt")
    slots, count = files.read_optimizer(tmp_path / "opt000000.pt", SHAPES)
    assert count == 1
    for names, p in zip((("a.bias", "c"), ("a.weight", "b.weight")), two):
        mine = torch.cat([slots[f"{name}.exp_avg"].flatten() for name in names])
        assert torch.equal(mine, optimizer.state[p]["exp_avg"].flatten())
