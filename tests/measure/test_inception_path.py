"""`iddpm evaluate --extractor inception` from files to figures, against torch-fidelity's network and arithmetic."""

import json

import numpy as np
import pytest
import torch

from conftest import flags
from iddpm.cli.main import main
from inception_oracles import fidelity, torch_fidelity, weights_by_rule
from measure.extractors.test_inception import pictures, published

N = 20


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The figures of the command, and torch-fidelity's features of the same images."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save(weights_by_rule(published()), folder / "weights.pth")
    sets = {name: pictures(N, 32, 32, seed) for seed, name in enumerate(("samples", "real"))}
    for name, images in sets.items():
        np.savez(folder / f"{name}.npz", images.permute(0, 2, 3, 1).numpy())
    theirs = fidelity(folder / "weights.pth", "2048", "logits_unbiased")
    features = {name: [f.double() for f in theirs(images)] for name, images in sets.items()}
    command = ["evaluate", str(folder / "samples.npz"), "--reference", str(folder / "real.npz"), "--extractor", "inception"]
    assert main([*command, "--inception-weights", str(folder / "weights.pth"), *flags(device="cpu", out=folder / "m.json")]) == 0
    figures = json.loads((folder / "m.json").read_text())["figures"]
    return {row["name"]: row for row in figures}, features


def test_the_names_are_the_fields(measured):
    figures, _ = measured
    assert {"FID", "sFID", "IS", "KID", "precision", "recall", "density", "coverage"} <= figures.keys()
    assert all(row["extractor"] == "inception" and row["n"] == N for row in figures.values())


def test_the_figures_are_torch_fidelitys(measured):
    figures, features = measured
    (ours, logits), (theirs, _) = features["samples"], features["real"]
    kid = torch_fidelity("metric_kid").kid_features_to_metric(
        ours, theirs, kid_subsets=1, kid_subset_size=N, verbose=False, rng_seed=0,
        kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1,
    )["kernel_inception_distance_mean"]  # fmt: skip
    assert figures["KID"]["value"] == pytest.approx(kid, rel=1e-4)
    score = torch_fidelity("metric_isc").isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    assert figures["IS of all at once"]["value"] == pytest.approx(score, rel=1e-4)


@pytest.mark.slow  # the other takes the root of a matrix of 2048 x 2048; of few features it is metrics/test_frechet.py's
def test_fid_is_torch_fidelitys(measured):
    figures, features = measured
    metric = torch_fidelity("metric_fid")
    statistics = [metric.fid_features_to_statistics(features[name][0]) for name in ("samples", "real")]
    fid = metric.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert figures["FID"]["value"] == pytest.approx(fid, rel=1e-3)  # n <= d, where the other takes roots of rounding
