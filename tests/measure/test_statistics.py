"""Files of statistics, ours and other tools', come back as what was put in, or are refused in one line."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from iddpm.errors import UserError
from iddpm.measure import statistics
from iddpm.measure.extractors import Extractor
from iddpm.measure.metrics.moments import Gaussian

MU, SIGMA = np.arange(3.0), np.diag([1.0, 2, 3])
OURS = Extractor("net", "net v1 abc", {"pool": 3}, lambda images: {}, torch.device("cpu"))
ABOUT = dict(extractor="net", identity="net v1 abc", n=120, of="data")


def assert_ours(held: dict[str, Gaussian] | None, n: int | None) -> None:
    assert held and list(held) == ["pool"] and held["pool"].n == n
    np.testing.assert_array_equal(held["pool"].mean, MU)
    np.testing.assert_array_equal(held["pool"].covariance, SIGMA)


def test_what_was_written_comes_back_with_its_number_of_images(tmp_path):
    statistics.write(tmp_path / "s.npz", {"pool": Gaussian(MU, SIGMA)}, ABOUT)
    assert_ours(statistics.read(tmp_path / "s.npz", OURS), 120)


def test_other_tools_files_say_no_number_and_their_further_taps_are_passed_over(tmp_path):
    np.savez(tmp_path / "pytorch_fid.npz", mu=MU, sigma=SIGMA)
    np.savez(tmp_path / "guided.npz", mu=MU, sigma=SIGMA, mu_s=np.zeros(5), sigma_s=np.eye(5))
    torch.save({"mu": MU, "sigma": SIGMA}, tmp_path / "torch_fidelity.pt")
    for path in tmp_path.iterdir():
        assert_ours(statistics.read(path, OURS), None)


def test_a_spatial_tap_is_read_where_the_extractor_has_it(tmp_path):
    np.savez(tmp_path / "guided.npz", mu=MU, sigma=SIGMA, mu_s=np.zeros(5), sigma_s=np.eye(5))
    held = statistics.read(tmp_path / "guided.npz", OURS._replace(widths={"pool": 3, "spatial": 5}))
    assert held and held["spatial"].covariance.shape == (5, 5)


def test_a_file_without_statistics_is_none(tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((2, 4, 4, 3), np.uint8))
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pt")
    assert [statistics.read(path, OURS) for path in tmp_path.iterdir()] == [None, None]


def as_numpy_1(saved: bytes) -> bytes:
    """A file of torch.save whose pickle names numpy's modules as numpy 1 did."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            assert not info.filename.endswith("data.pkl") or b"cnumpy._core.multiarray\n" in content
            new.writestr(info.filename, content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    return out.getvalue()


def test_torch_fidelitys_file_of_the_days_of_numpy_1_is_read(tmp_path):
    now = io.BytesIO()
    torch.save({"mu": MU, "sigma": SIGMA}, now)
    (tmp_path / "old.pt").write_bytes(as_numpy_1(now.getvalue()))
    assert_ours(statistics.read(tmp_path / "old.pt", OURS), None)


def npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def saved(path: Path, held: object) -> Path:
    torch.save(held, path)
    return path


def raw(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def ours(path: Path, **about: object) -> Path:
    return npz(path, mu=MU, sigma=SIGMA, iddpm=np.array(json.dumps({**ABOUT, **about})))


REFUSED = {
    "s.npz holds statistics of elsewhere, not of net: give its own --extractor": lambda p: ours(
        p / "s.npz", extractor="elsewhere"
    ),
    r"other weights or another version \(net v1 xyz, here net v1 abc\)": lambda p: ours(p / "s.npz", identity="net v1 xyz"),
    "holds statistics of 4 features, and net has 3": lambda p: npz(p / "s.npz", mu=np.zeros(4), sigma=np.eye(4)),
    r"holds a covariance of shape \(4, 4\) beside a mean of 3": lambda p: npz(p / "s.npz", mu=MU, sigma=np.eye(4)),
    "holds statistics that are not finite": lambda p: npz(p / "s.npz", mu=MU * np.nan, sigma=SIGMA),
    r"s\.npz is not a readable \.npz": lambda p: npz(p / "s.npz", mu=MU, sigma=SIGMA, iddpm=np.array("{cut")),
    r"cut\.npz is not a readable \.npz": lambda p: raw(p / "cut.npz", b"PK\x03\x04 no more"),
    r"s\.pt holds a \S*Linear, which is never loaded: give a file of statistics": lambda p: saved(
        p / "s.pt", {"mu": torch.nn.Linear(1, 1)}
    ),
    r"s\.pt is damaged, or is no file that torch": lambda p: raw(p / "s.pt", b"<html>404 not found</html>"),
    "cannot be read: Is a directory": lambda p: (p / "d.pt").mkdir() or p / "d.pt",
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_are_no_statistics_of_this_extractor_is_one_line(tmp_path, said):
    with pytest.raises(UserError, match=said) as refused:
        statistics.read(REFUSED[said](tmp_path), OURS)
    assert not set(str(refused.value)) & {"\n", "\x1b"} and len(str(refused.value)) < 400
