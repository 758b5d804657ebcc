"""Super-resolution: what is enlarged, how it is measured, and whole runs of it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY, flags
from golden_rules import Stub, image_tensor, noise
from iddpm import build
from iddpm.cli.main import main
from iddpm.data import Images, Order
from iddpm.data.batches import make_batch
from iddpm.data.super_res import consistent, shrink
from iddpm.diffusion.solvers import Ddim, ancestral, run
from iddpm.measure.fidelity import psnr, ssim

SMALL = dict(TINY, task="enlarge", image_size="16", small_size="8", sampling_steps="3", learn_sigma=False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """12 colourful 16x16 pictures in two folders."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    for k in range(12):
        kind = ("a", "b")[k % 2]
        (root / kind).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(root / kind / f"{k:02d}.png")
    return root


def trained(photos, run, **settings) -> str:
    assert main(["train", str(photos), "--run", str(run), *flags(**dict(SMALL, **settings))]) == 0
    return str(run)


@pytest.fixture(scope="module")
def upsampler(photos, tmp_path_factory) -> str:
    return trained(photos, tmp_path_factory.mktemp("up") / "run")


def test_small_images_are_area_means_of_eight_bits():
    x0 = image_tensor(0, (2, 3, 8, 12))
    small = shrink(x0, (4, 4))
    levels = (small.double() + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-4
    means = x0.reshape(2, 3, 4, 2, 4, 3).mean((3, 5))
    assert (small - means).abs().max() <= 1 / 255 + 1e-6


def test_psnr_and_ssim_are_those_of_other_code():
    from scipy.ndimage import gaussian_filter

    x = image_tensor(1, (2, 3, 24, 20)).double()
    y = (0.9 * x + 0.1 * image_tensor(2, (2, 3, 24, 20))).clamp(-1, 1)
    levels = [((z + 1) * 127.5).numpy() for z in (x, y)]
    expected = [10 * np.log10(255**2 / np.mean((a - b) ** 2)) for a, b in zip(*levels)]
    assert psnr(x, y).numpy() == pytest.approx(expected)

    def blur(z):
        return gaussian_filter(z, 1.5, radius=5)[5:-5, 5:-5]

    values = []
    for a, b in zip(*(z.reshape(6, 24, 20) for z in levels)):  # Wang et al. 2004, in levels of 0..255
        ma, mb = blur(a), blur(b)
        va, vb, ab = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
        c1, c2 = 2.55**2, 7.65**2
        values.append(np.mean((2 * ma * mb + c1) * (2 * ab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))))
    assert ssim(x, y).numpy() == pytest.approx(np.reshape(values, (2, 3)).mean(1))
    assert ssim(x, x).numpy() == pytest.approx([1, 1])


@pytest.mark.parametrize("solver", [ancestral, Ddim()])
def test_consistent_images_have_the_means_of_the_small_ones(config, solver):
    """A projection: idempotent, it moves nothing else; and the images a solver ends at shrink to what they were made from."""
    x, low = image_tensor(3, (2, 3, 8, 8)), image_tensor(4, (2, 3, 4, 4))
    project = consistent(low)
    once = project(x)
    torch.testing.assert_close(once.reshape(2, 3, 4, 2, 4, 2).mean((3, 5)), low)
    torch.testing.assert_close(project(once), once)
    moved = (once - x).reshape(2, 3, 4, 2, 4, 2)
    torch.testing.assert_close(moved, moved.mean((3, 5), keepdim=True).expand_as(moved))
    config = config.updated(dict(learn_sigma=False, sampling_steps="5"))
    ends = []
    for known in ((), (project,)):
        denoiser = build.sampling_denoiser(config, Stub(3), *known)
        ends.append(run(solver(denoiser, x, build.grid(config), lambda k: noise(k, x.shape))))
    errors = [(end.reshape(2, 3, 4, 2, 4, 2).mean((3, 5)) - low).abs().max().item() for end in ends]
    assert errors[1] < 1e-5 < 0.1 < errors[0]


def test_a_network_that_sees_the_noise_level_uses_it(config):
    net = build.network(config.updated(dict(SMALL, class_cond=False, low_res_noise=0.5)))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, low, t = image_tensor(0, (2, 1, 16, 16)), image_tensor(1, (2, 1, 8, 8)), torch.tensor([3.0, 500.0])
    one, other = (net(x, t, low, low_res_level=torch.full((2,), level)) for level in (0.0, 0.4))
    assert not torch.allclose(one, other)
    with pytest.raises(ValueError, match="low_res_level"):
        net(x, t, low)


def test_noise_on_the_small_image_has_its_level(config, photos):
    config = config.updated(dict(SMALL, class_cond=False, low_res_noise=0.5, batch_size=200))
    data = Images.open(photos, (16, 16), 1)
    batch = make_batch(config, data, Order(12, 0), 0, 0)
    noise = batch.cond["given"] - shrink(batch.x0, (8, 8))
    level = batch.cond["low_res_level"]
    assert 0 <= level.min() < 0.05 and 0.45 < level.max() < 0.5
    assert (noise.flatten(1).std(1) / level)[level > 0.05].mean().item() == pytest.approx(1, abs=0.02)


def test_full_size_images_are_shrunk_enlarged_and_compared(photos, upsampler, tmp_path, capsys):
    out = tmp_path / "x.npz"
    assert main(["sample", upsampler, "--high_res", str(photos), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "PSNR" in said and "bicubic" in said
    result = json.loads((tmp_path / "x_compared.json").read_text())
    with np.load(out) as file:
        drawn = file["arr_0"]
    data = Images.open(photos, (16, 16), 1)
    x = torch.from_numpy(drawn.astype(np.float64)).permute(0, 3, 1, 2)
    mse = ((x - torch.from_numpy(data.batch(range(12)))) ** 2).flatten(1).mean(1)
    assert result["psnr_model"] == pytest.approx((10 * torch.log10(255**2 / mse)).mean().item(), rel=1e-5)
    assert result["images"] == 12 and 0 < result["ssim_bicubic"] < 1
    with Image.open(tmp_path / "x_compared.png") as sheet:
        assert sheet.size[0] > 4 * 96


def test_small_images_from_a_folder_and_an_npz_give_the_same(photos, upsampler, tmp_path):
    data = Images.open(photos, (16, 16), 1)
    small = shrink(torch.from_numpy(data.batch(range(12))).float() / 127.5 - 1, (8, 8))
    levels = ((small + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    (tmp_path / "small").mkdir()
    for k, image in enumerate(levels):
        Image.fromarray(image[..., 0]).save(tmp_path / "small" / f"{k:02d}.png")
    np.savez(tmp_path / "small.npz", levels)
    arrays = []
    for source in ("small", "small.npz"):
        out = tmp_path / f"{source}_out.npz"
        assert main(["sample", upsampler, "--low_res", str(tmp_path / source), "--out", str(out), "--seeds", "3-6"]) == 0
        arrays.append(np.load(out)["arr_0"])
    assert arrays[0].shape == (4, 16, 16, 1)
    assert np.array_equal(*arrays)


def test_a_base_and_an_upsampler_draw_in_one_command(run, upsampler, photos, tmp_path):
    """The base's images, given as small images, are enlarged to the very images of the one command; a batch is no matter."""
    one, base, two = (tmp_path / f"{name}.npz" for name in ("one", "base", "two"))
    assert main(["sample", str(run), "--then", upsampler, "--num_samples", "5", "--out", str(one), "--batch_size", "2"]) == 0
    assert main(["sample", str(run), "--num_samples", "5", "--out", str(base)]) == 0
    assert main(["sample", upsampler, "--low_res", str(base), "--out", str(two)]) == 0
    a, b = (np.load(path)["arr_0"].astype(int) for path in (one, two))
    assert a.shape == (5, 16, 16, 1)
    assert abs(a - b).max() <= 1


def test_a_class_conditional_upsampler_needs_labels_and_takes_them(photos, tmp_path, capsys):
    run = trained(photos, tmp_path / "r", class_cond=True, low_res_noise=0.3)
    small = np.zeros((3, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "bare.npz", small)
    np.savez(tmp_path / "labelled.npz", small, np.array([0, 1, 1]))
    np.savez(tmp_path / "outside.npz", small, np.array([0, 1, 2]))
    capsys.readouterr()
    assert main(["sample", run, "--low_res", str(tmp_path / "bare.npz"), "--out", str(tmp_path / "a.npz")]) == 2
    assert "give --labels" in capsys.readouterr().err
    assert main(["sample", run, "--low_res", str(tmp_path / "outside.npz"), "--out", str(tmp_path / "a.npz")]) == 2
    assert "label 2" in capsys.readouterr().err
    out = tmp_path / "b.npz"
    wanted = ["--low_res", str(tmp_path / "labelled.npz"), "--low_res_noise", "0.1", "--out", str(out)]
    assert main(["sample", run, *wanted]) == 0
    assert np.load(out)["arr_1"].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "DATA", "--task", "enlarge", "--steps", "1"], "from which --small_size"),
        (["train", "DATA", "--small_size", "8", "--steps", "1"], "belongs to --task enlarge"),
        (["train", "DATA", "--task", "enlarge", "--small_size", "7", "--steps", "1"], "whole multiple"),
        (["sample", "UP"], "--low_res SMALL_IMAGES"),
        (["sample", "UP", "--low_res", "a", "--high_res", "b"], "give one"),
        (["sample", "RUN", "--low_res", "DATA"], "--then RUN"),
        (["sample", "RUN", "--then", "RUN"], "does not enlarge"),
        (["sample", "UP", "--low_res", "DATA"], "16x16 pixels: 8x8 are needed"),
        (["sample", "UP", "--low_res", "WRONG"], "N x 8 x 8 x 1"),
        (["sample", "UP", "--low_res", "TEXT"], "not a readable .npz"),
        (["sample", "UP", "--high_res", "DATA", "--seeds", "0-12"], "there are 12 images"),
        (["sample", "RUN", "--low_res_noise", "0.1"], "no effect"),
        (["sample", "RUN", "--consistent"], "belongs to --task enlarge"),
    ],
)
def test_what_cannot_be_enlarged_is_one_clear_line(argv, words, photos, run, upsampler, tmp_path, capsys):
    np.savez(tmp_path / "wrong.npz", np.zeros((2, 9, 9, 1), np.uint8))
    (tmp_path / "text.npz").write_text("no array")
    places = dict(DATA=photos, UP=upsampler, RUN=run, WRONG=tmp_path / "wrong.npz", TEXT=tmp_path / "text.npz")
    capsys.readouterr()
    assert main([str(places.get(a, a)) for a in argv]) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and len(err.splitlines()) == 1
