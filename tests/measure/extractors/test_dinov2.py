import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from iddpm.errors import UserError
from iddpm.measure import extractors
from iddpm.measure.extractors import dinov2

WIDTH, DEPTH, GRID = 128, 3, 37


def published(gated: bool = False, registers: int = 0, grid: int = GRID) -> dict[str, torch.Tensor]:
    """Weights by rule, under the names of dinov2_vit*14_pretrain.pth, of a small model."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int, scale: float = 0.3, around: float = 0.0) -> torch.Tensor:
        return around + scale * torch.randn(*shape, generator=generator)

    def linear(name: str, width: int, out: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": draw(out, width, scale=1.5 * width**-0.5), f"{name}.bias": draw(out)}

    state = {"cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, 1 + grid**2, WIDTH, scale=1.0), "mask_token": draw(1, WIDTH)}
    if registers:
        state["register_tokens"] = draw(1, registers, WIDTH)
    state |= {"patch_embed.proj.weight": draw(WIDTH, 3, 14, 14, scale=0.05), "patch_embed.proj.bias": draw(WIDTH)}
    hidden = 344 if gated else 4 * WIDTH  # two thirds of it, in eights
    for i in range(DEPTH):
        b = f"blocks.{i}."
        for part in ("norm1.weight", "norm2.weight", "ls1.gamma", "ls2.gamma"):
            state[b + part] = draw(WIDTH, around=1.0)
        state |= {b + "norm1.bias": draw(WIDTH), b + "norm2.bias": draw(WIDTH)}
        state |= linear(b + "attn.qkv", WIDTH, 3 * WIDTH) | linear(b + "attn.proj", WIDTH, WIDTH)
        first, second = ("w12", "w3") if gated else ("fc1", "fc2")
        state |= linear(f"{b}mlp.{first}", WIDTH, (2 if gated else 1) * hidden) | linear(f"{b}mlp.{second}", hidden, WIDTH)
    return state | {"norm.weight": draw(WIDTH, around=1.0), "norm.bias": draw(WIDTH)}


NAMES = {  # ours, which are the published ones, and those of transformers; the first that fits
    "blocks.": "encoder.layer.",
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm.": "layernorm.",
}
INSIDE = {"attn.proj": "attention.o_proj", "attn.": "attention.", "mlp.w3": "mlp.down_proj"} | {
    f"ls{i}.gamma": f"layer_scale{i}.lambda1" for i in (1, 2)
}
JOINED = {"qkv": ("q_proj", "k_proj", "v_proj"), "w12": ("gate_proj", "up_proj")}


def theirs(state: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same network of the transformers library: normalised images to class tokens."""
    import transformers as library  # here, for it takes as long to import as all else that is collected

    settings = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=WIDTH // 64, patch_size=14)
    settings |= dict(image_size=14 * round((state["pos_embed"].shape[1] - 1) ** 0.5), layer_norm_eps=1e-6)
    settings |= dict(use_swiglu_ffn="blocks.0.mlp.w3.weight" in state)
    if "register_tokens" in state:
        count = state["register_tokens"].shape[1]
        net = library.Dinov2WithRegistersModel(library.Dinov2WithRegistersConfig(**settings, num_register_tokens=count))
    else:
        net = library.Dinov2Model(library.Dinov2Config(**settings))
    renamed = {}
    for name, tensor in state.items():
        start = next(start for start in NAMES if name.startswith(start))
        new = NAMES[start] + name.removeprefix(start)
        for ours, other in INSIDE.items():
            new = new.replace(ours, other)
        joined = next((j for j in JOINED if f".{j}." in new), "")
        for part, t in zip(JOINED.get(joined, ("",)), tensor.chunk(len(JOINED.get(joined, ("",))))):
            renamed[new.replace(joined, part) if joined else new] = t
    net.load_state_dict(renamed)
    net.eval().requires_grad_(False)
    return lambda x: net(x).pooler_output


def resampled(square: np.ndarray, side: int, offset: float) -> np.ndarray:
    """Cubic convolution (Keys 1981, a = -0.75) of (g, g, d): output i lies at (i + 1/2) g/(side + offset) - 1/2."""
    g, a = len(square), -0.75
    matrix = np.zeros((side, g))
    for i in range(side):
        s = (i + 0.5) * g / (side + offset) - 0.5
        for j in range(int(np.floor(s)) - 1, int(np.floor(s)) + 3):
            r = abs(s - j)
            near, far = (a + 2) * r**3 - (a + 3) * r**2 + 1, a * (r**3 - 5 * r**2 + 8 * r - 4)
            matrix[i, min(max(j, 0), g - 1)] += near if r <= 1 else far
    return np.einsum("ih,jw,hwd->ijd", matrix, matrix, square)


def photographs() -> torch.Tensor:
    """Three squares of china.jpg, uint8 (3, 3, 224, 224)."""
    china = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1)
    return torch.stack([china[:, y : y + 224, x : x + 224] for y, x in ((0, 0), (100, 200), (200, 400))])


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return (images.float() / 255 - mean) / deviation


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def small(monkeypatch):
    """The small model of these tests among the published sizes, and chunks that do not divide its images."""
    monkeypatch.setitem(dinov2.SIZES, (WIDTH, DEPTH), "t")
    monkeypatch.setattr(dinov2, "CHUNK", 2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("grid", [16, 37])
def test_features_are_those_of_transformers(gated, grid, small, tmp_path):
    state = published(gated, grid=grid)
    torch.save(state, tmp_path / "weights.pth")
    extractor = extractors.open("dinov2", {"dinov2_weights": str(tmp_path / "weights.pth")})
    assert extractor.name == "dinov2-vitt14" and extractor.widths == {"pool": WIDTH}
    if grid != 16:  # transformers resamples without the 0.1 of DINOv2's own code, so it is given what that code makes
        square = resampled(state["pos_embed"][0, 1:].view(grid, grid, WIDTH).double().numpy(), 16, offset=0.1)
        place = torch.tensor(square, dtype=torch.float32).view(1, 256, WIDTH)
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], place], 1)
    expected = theirs(state)(normalised(photographs()))
    assert difference(extractor.network(photographs())["pool"], expected) < 1e-5


def test_the_command_takes_a_file_and_gives_fd_dinov2(small, tmp_path):
    """From files to the figure; the expected one from transformers' features and numpy alone."""
    from iddpm.cli.main import main

    state, images = published(grid=16), photographs()
    torch.save(state, tmp_path / "weights.pth")
    sets = {"samples": torch.cat([images, images.flip(3)]), "real": torch.cat([images.flip(2), 255 - images])}
    for name, pixels in sets.items():
        np.savez(tmp_path / f"{name}.npz", pixels.permute(0, 2, 3, 1).numpy())
    line = [str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "real.npz"), "--out", str(tmp_path / "m.json")]
    file = ["--extractor", "dinov2", "--dinov2-weights", str(tmp_path / "weights.pth")]
    assert main(["evaluate", *line, *file, "--metrics", "fd", "--device", "cpu"]) == 0
    (figure,) = json.loads((tmp_path / "m.json").read_text())["figures"]
    x, y = (theirs(state)(normalised(pixels)).double().numpy() for pixels in sets.values())
    cross = np.linalg.svd((x - x.mean(0)) @ (y - y.mean(0)).T, compute_uv=False).sum() / 5  # 6 images each: n - 1
    scatter = x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + scatter - 2 * cross
    assert figure["name"] == figure["extractor"].replace("dinov2", "FD-dinov2") == "FD-dinov2-vitt14"
    assert figure["value"] == pytest.approx(expected, rel=1e-4)


def test_features_with_registers_are_those_of_transformers_resampling_included(small, tmp_path):
    state = published(registers=4)
    torch.save(state, tmp_path / "weights.pth")
    extractor = extractors.open("dinov2", {"dinov2_weights": str(tmp_path / "weights.pth")})
    assert extractor.name == "dinov2-vitt14-reg"
    expected = theirs(state)(normalised(photographs()))
    assert difference(extractor.network(photographs())["pool"], expected) < 1e-5


@pytest.mark.parametrize("side", [16, 37, 40])
def test_places_are_resampled_by_the_published_formula(side):
    embedding = published()["pos_embed"]
    found = dinov2.positions(embedding, side, registers=False)
    square = embedding[0, 1:].view(GRID, GRID, WIDTH).double().numpy()
    expected = square if side == GRID else resampled(square, side, offset=0.1)
    assert torch.equal(found[:, :1], embedding[:, :1])
    np.testing.assert_allclose(found[0, 1:].view(side, side, WIDTH), expected, atol=2e-4)  # places of about 1, scale in float32


@pytest.mark.parametrize("shape", [(32, 32), (100, 64), (224, 300), (427, 640)])
def test_images_are_scaled_as_pillow_does_but_for_ties(shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    photograph = np.asarray(Image.fromarray(load_sample_images().images[1]).resize(shape[::-1]))
    for image in (noise, photograph):
        found = dinov2.pillow_bicubic(torch.tensor(image).permute(2, 0, 1)[None], 224)[0].permute(1, 2, 0).numpy()
        off = np.abs(found - np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)))
        assert off.max() <= 2 and np.mean(off > 0) < 0.01  # Pillow's weights are rounded too


def test_weights_of_another_network_are_refused_in_one_line(small, tmp_path):
    def refused(state: dict[str, torch.Tensor], reason: str) -> None:
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(UserError, match=reason) as error:
            extractors.open("dinov2", {"dinov2_weights": str(tmp_path / "weights.pth")})
        assert "weights.pth" in str(error.value) and "https://" in str(error.value) and "\n" not in str(error.value)

    state = published()
    refused({"fc.weight": torch.zeros(2, 2)}, "cls_token")
    refused({name: t for name, t in state.items() if name != "blocks.1.attn.proj.bias"}, "blocks.1.attn.proj.bias")
    refused(state | {"head.weight": torch.zeros(2, 2)}, "head.weight")
    refused(state | {"norm.bias": torch.zeros(2)}, "norm.bias")
    refused(state | {"pos_embed": torch.zeros(1, 200, WIDTH)}, "199")
    fewer = {name: t for name, t in state.items() if not name.startswith("blocks.2.")}
    refused(fewer, "2 blocks of width 128, which no DINOv2 has")


def test_without_a_file_the_error_tells_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("IDDPM_DINOV2_WEIGHTS", raising=False)
    with pytest.raises(UserError, match=r"https://dl\.fbaipublicfiles\.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain\.pth"):
        extractors.open("dinov2")
