"""Muon: its step by the singular value decomposition, what it moves, and that a run with it goes on bit for bit."""

import pytest
import torch

from iddpm.config import check
from iddpm.errors import UserError
from iddpm.store import checkpoint
from iddpm.training.loop import train
from iddpm.training.muon import RMS, Muon, orthogonal
from iddpm.training.state import TrainState

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 8, 8)])
def test_what_is_orthogonal_has_the_directions_of_the_matrix_and_singular_values_near_1(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonal(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.diagonal(u.mT @ made @ v.mT, dim1=1, dim2=2)
    assert torch.allclose(u * values[:, None] @ v, made, atol=1e-4)  # its singular vectors are the matrix's
    assert values.min() > 0.65 and values.max() < 1.25


def test_a_first_step_is_the_gradients_orthogonal_part_of_adams_size_and_decays_the_weights():
    torch.manual_seed(0)
    kernel, bias = torch.nn.Parameter(torch.randn(6, 4, 3, 3)), torch.nn.Parameter(torch.randn(6))
    before, optimizer = kernel.detach().clone(), Muon(dict(k=kernel, b=bias), {"k"}, lr=0.1, weight_decay=0.5)
    kernel.grad, bias.grad = torch.randn_like(kernel), torch.ones(6)
    u, _, v = torch.linalg.svd(kernel.grad.reshape(6, 36), full_matrices=False)
    optimizer.step()
    moved = (before * (1 - 0.1 * 0.5) - kernel.detach()).reshape(6, 36) / 0.1
    assert torch.nn.functional.cosine_similarity(moved.flatten(), (u @ v).flatten(), dim=0) > 0.98
    assert moved.square().mean().sqrt() == pytest.approx(RMS, rel=0.2)


def test_gradients_of_matrices_do_not_add_up_from_step_to_step():
    kernel, bias = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))
    optimizer = Muon(dict(k=kernel, b=bias), {"k"}, lr=0.1)
    (kernel.sum() + bias.sum()).backward()
    optimizer.zero_grad()
    assert kernel.grad is None and bias.grad is None


def test_embeddings_biases_and_the_ends_of_the_network_are_no_matrices(config):
    state = TrainState(config.updated(dict(optimizer="muon")), CPU)
    moved = {id(p) for p in state.optimizer.matrices}
    names = {name for name, p in state.params.items() if id(p) in moved}
    assert {"input_blocks.1.0.in_layers.2.weight", "middle_block.1.qkv.weight", "time_embed.0.weight"} <= names
    assert not {"label_emb.weight", "input_blocks.0.0.weight", "out.2.weight", "out.2.bias", "time_embed.0.bias"} & names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_gradients_have_a_direction_in_half_precisions_too(dtype):
    matrices = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(0))
    exact, made = orthogonal(matrices), orthogonal(1e-9 * matrices, dtype)
    assert (made - exact).norm() < 0.1 * exact.norm()


def test_a_transformer_has_ends_as_well(config):
    state = TrainState(config.updated(dict(optimizer="muon", network="dit", patch_size=2, width=16, depth=1, heads=2)), CPU)
    names = {name for name, p in state.params.items() if id(p) in {id(m) for m in state.optimizer.matrices}}
    assert any(name.startswith("blocks.0.") for name in names)
    assert not {"embed_patches.weight", "out.weight", "label_emb.weight"} & names


def test_a_run_with_it_goes_on_bit_for_bit(config, data, tmp_path):
    config = config.updated(dict(optimizer="muon", steps=4, save_interval=2))
    whole = checkpoint.load(train(config, data, tmp_path / "whole"))
    train(config.updated(dict(steps=2)), data, tmp_path / "parts")
    parts = checkpoint.load(train(config, data, tmp_path / "parts"))
    for kind in ("weights", "optimizer"):
        a, b = getattr(whole, kind), getattr(parts, kind)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.endswith(".momentum") for name in whole.optimizer)


def test_it_needs_whole_matrices(config):
    with pytest.raises(UserError, match="--optimizer muon needs whole matrices"):
        check(config.updated(dict(optimizer="muon", shard=-1)))
