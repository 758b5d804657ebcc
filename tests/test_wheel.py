"""A built wheel holds the code, and its command answers."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_installed_in_a_fresh_environment_answers_help(tmp_path):
    source = tmp_path / "source"  # setuptools writes beside the source: build from a copy
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "src"):
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", source, "--no-deps", "--no-build-isolation", "-w", tmp_path], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("iddpm-*.whl")
    venv.create(tmp_path / "fresh", with_pip=False)
    site = next((tmp_path / "fresh" / "lib").glob("python*")) / "site-packages"
    (site / "seen.pth").write_text(sysconfig.get_paths()["purelib"])
    python = tmp_path / "fresh" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel], check=True, capture_output=True
    )
    out = subprocess.run([tmp_path / "fresh" / "bin" / "iddpm", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "usage: iddpm" in out.stdout
    where = subprocess.run([python, "-c", "import iddpm.nn; print(iddpm.__file__)"], capture_output=True, text=True, cwd=tmp_path)
    assert str(site) in where.stdout, where
    assert {p.name for p in (site / "iddpm" / "look" / "page").iterdir()} == {
        p.name for p in (ROOT / "src/iddpm/look/page").iterdir()
    }
