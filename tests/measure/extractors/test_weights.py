"""Files of weights are found where other tools keep them, and read without executing anything."""

import hashlib
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from iddpm.errors import UserError
from iddpm.measure.extractors import weights

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
ADDRESS = "https://example.org/net.pth"


def find(given: str = "") -> object:
    return weights.find(given, "IDDPM_NET_WEIGHTS", "net.pth", ADDRESS, "Net", "other.pth")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch's hub cache, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("IDDPM_NET_WEIGHTS", raising=False)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_what_the_user_gave_goes_before_the_environment_and_that_before_the_cache(cache, tmp_path, monkeypatch):
    for name in ("given", "named"):
        (tmp_path / name).touch()
    (cache / "other.pth").touch()
    assert find() == cache / "other.pth"
    (cache / "net.pth").touch()
    assert find() == cache / "net.pth"
    monkeypatch.setenv("IDDPM_NET_WEIGHTS", str(tmp_path / "named"))
    assert find() == tmp_path / "named"
    assert find(str(tmp_path / "given")) == tmp_path / "given"


def test_an_address_of_another_storage_is_copied_here(cache):
    import fsspec

    with fsspec.open("memory://bucket/net.pth", "wb") as file:
        file.write(b"weights")
    assert find("memory://bucket/net.pth").read_bytes() == b"weights"


def test_missing_weights_are_one_line_with_their_address_and_flag(cache):
    with pytest.raises(UserError) as missing:
        find()
    message = str(missing.value)
    assert "\n" not in message and all(s in message for s in (ADDRESS, "--net-weights", str(cache / "net.pth")))


def test_a_file_that_was_named_and_is_not_there_is_never_replaced_by_another(cache, monkeypatch):
    (cache / "net.pth").touch()
    with pytest.raises(UserError, match=r"--net-weights nowhere\.pth: no such file.*example\.org"):
        find("nowhere.pth")
    monkeypatch.setenv("IDDPM_NET_WEIGHTS", "gone.pth")
    with pytest.raises(UserError, match=r"IDDPM_NET_WEIGHTS gone\.pth: no such file"):
        find()


@pytest.mark.parametrize("kind", ["new.pth", "old.pth", "x.safetensors"])
def test_tensors_come_back_from_every_kind_of_file(tmp_path, kind):
    path = tmp_path / kind
    if kind == "x.safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "new.pth")
    found = weights.read(path)
    assert found.keys() == STATE.keys() and all(torch.equal(found[k], STATE[k]) for k in STATE)
    assert weights.digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


class Planted:
    """What executes code when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def test_a_file_that_would_execute_something_is_refused_and_executes_nothing(tmp_path):
    torch.save({"a": Planted(tmp_path / "trace")}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad\.pth holds a \S*open, which is never loaded"):
        weights.read(tmp_path / "bad.pth")
    assert not (tmp_path / "trace").exists()


def whole(path, state=STATE) -> bytes:
    torch.save(state, path)
    return path.read_bytes()


DAMAGED = {
    "empty.pth": lambda p: b"",
    "cut.pth": lambda p: whole(p)[:-40],
    "page.pth": lambda p: b"<html>404 not found</html>",
    "cut.safetensors": lambda p: save_file(STATE, p) or p.read_bytes()[:-3],
    "list.pth": lambda p: whole(p, [1, 2]),
    "nested.pth": lambda p: whole(p, {"state_dict": STATE}),
    "module.pth": lambda p: whole(p, torch.nn.Linear(2, 2)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_or_foreign_file_is_one_line_that_names_it(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(DAMAGED[name](path))
    with pytest.raises(UserError) as refused:
        weights.read(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_archives_of_other_kinds_are_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as file:
        file.writestr("picture.png", b"...")
    for path in (tmp_path / "archive.pth", tmp_path):
        with pytest.raises(UserError, match=r"is damaged, or is no file|Is a directory"):
            weights.read(path)


def test_a_bit_that_flipped_shows_where_the_name_tells_the_digest(tmp_path):
    content = bytearray(whole(tmp_path / "net.pth"))
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (tmp_path / name).write_bytes(content)
    assert torch.equal(weights.read(tmp_path / name)["a"], STATE["a"])
    content[bytes(content).index(STATE["a"].numpy().tobytes())] ^= 1  # neither torch nor the archive looks at its checksum
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="its sha256 does not begin with"):
        weights.read(tmp_path / name)
