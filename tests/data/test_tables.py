"""Shards, tables and arrays of the same images are those images, with the same labels."""

import gzip
import io
import json
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hostile import limited
from iddpm.data import Images
from iddpm.data.pack import pack
from iddpm.data.sources.shards import braces
from iddpm.errors import UserError

SIZE, CLASSES = (8, 8), ("cat", "dog", "emu")
PIXELS = np.random.default_rng(0).integers(0, 256, (12, *SIZE, 3), np.uint8)
LABELS = np.arange(12) % 3


def png(k: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS[k]).save(file, "PNG")
    return file.getvalue()


def tars(root: Path, told: Callable[[int], tuple[str, bytes]], same_names: bool = False) -> None:
    for shard in range(3):
        with tarfile.open(root / f"set-{shard:02d}.tar", "w") as held:
            for k in range(4 * shard, 4 * shard + 4):
                stem = f"{k % 4 if same_names else k:04d}"
                ending, label = told(k)
                for name, content in ((f"{stem}.png", png(k)), (f"{stem}.{ending}", label)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    held.addfile(info, io.BytesIO(content))


def webdataset(root: Path) -> Path:
    tars(root, lambda k: ("cls", CLASSES[LABELS[k]].encode()))
    return root / "set-{00..02}.tar"


def webdataset_of_json(root: Path) -> Path:
    tars(root, lambda k: ("json", json.dumps({"caption": "x", "class": CLASSES[LABELS[k]]}).encode()))
    return root / "set-*.tar"


def webdataset_of_same_names(root: Path) -> Path:
    tars(root, lambda k: ("cls", CLASSES[LABELS[k]].encode()), same_names=True)
    return root


def webdataset_packed(root: Path) -> Path:
    """A folder of shards packed by gzip."""
    webdataset(root)
    for shard in root.glob("*.tar"):
        shard.with_name(f"{shard.name}.gz").write_bytes(gzip.compress(shard.read_bytes()))
        shard.unlink()
    return root


def table(k: int, n: int) -> pa.Table:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    image = pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in range(k, k + n)], kind)
    features = {"image": {"_type": "Image"}, "y": {"_type": "ClassLabel", "names": CLASSES}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema({"image": kind, "y": pa.int64()}, metadata=about)
    return pa.table([image, pa.array(LABELS[k : k + n])], schema)


def parquet(root: Path) -> Path:
    (root / "data").mkdir()
    for k in (0, 6):
        pq.write_table(table(k, 6), root / "data" / f"train-0000{k // 6}-of-00002.parquet", row_group_size=4)
    return root


def one_parquet(root: Path) -> Path:
    plain = pa.table({"image": [png(k) for k in range(12)], "label": [CLASSES[k] for k in LABELS]})
    pq.write_table(plain, root / "set.parquet", row_group_size=5)
    return root / "set.parquet"


def datasets_folder(root: Path) -> Path:
    for part in range(2):
        with pa.OSFile(str(root / f"data-{part}.arrow"), "wb") as file, pa.ipc.new_stream(file, table(0, 1).schema) as out:
            out.write_table(table(6 * part, 6))
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": f"data-{part}.arrow"} for part in range(2)]}))
    return root


def npz(root: Path) -> Path:
    np.savez(root / "set.npz", arr_0=PIXELS, arr_1=LABELS, classes=np.array(CLASSES))
    return root / "set.npz"


def imagenet(root: Path) -> Path:
    for k in (0, 6):
        flat = PIXELS[k : k + 6].transpose(0, 3, 1, 2).reshape(6, -1)
        np.savez(root / f"train_data_batch_{1 + k // 6}.npz", data=flat, labels=LABELS[k : k + 6] + 1, mean=np.zeros(3))
    return root


def lsun(root: Path) -> Path:
    with lmdb.open(str(root / "set.lmdb"), map_size=1 << 22) as env, env.begin(write=True) as writing:
        for k in range(12):
            writing.put(f"{k:04d}".encode(), png(k))
    return root / "set.lmdb"


def npy(root: Path) -> Path:
    np.save(root / "set.npy", PIXELS)
    return root / "set.npy"


def a_pack(root: Path) -> Path:
    (root / "files").mkdir()
    for k in range(12):
        (root / "files" / f"{k:02d}.png").write_bytes(png(k))
    pack(root / "files", root / "pack", SIZE)
    return root / "pack"


NAMED = [webdataset, webdataset_packed, webdataset_of_json, webdataset_of_same_names, parquet, one_parquet, datasets_folder, npz]
FORMS = [*NAMED, imagenet, lsun, npy, a_pack]
ROWS = {form: np.arange(12) for form in FORMS}
ROWS[webdataset_of_same_names] = np.arange(12).reshape(3, 4).T.ravel()  # by name: 0000~0, 0000~1, ...


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_images_and_classes_of_the_folder(form, tmp_path):
    data = Images.open(form(tmp_path), SIZE)
    rows = ROWS[form]
    assert (data.batch(range(12)).transpose(0, 2, 3, 1) == PIXELS[rows]).all()
    again = Images.open(data.source.path, SIZE, cache_bytes=0)
    shuffled = np.random.default_rng(1).permutation(12)  # not kept in memory, and out of order
    assert (again.batch(shuffled) == data.batch(shuffled)).all()
    if form in NAMED:
        assert data.classes == CLASSES and (data.labels == LABELS[rows]).all()
    elif form is imagenet:
        assert data.classes == ("0", "1", "2") and (data.labels == LABELS).all()
    else:
        assert data.labels is None
    assert "12 images" in data.describe() and data.identity() == again.identity()


@pytest.mark.parametrize("form", FORMS)
def test_whatever_is_cut_off_or_overwritten_is_one_line(form, tmp_path):
    path = form(tmp_path)
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock.mdb" and p.suffix != ".json")
    victim, rng = files[-1], np.random.default_rng(2)
    whole = victim.read_bytes()
    for trial in range(12):
        cut = int(rng.integers(0, len(whole)))
        damaged = bytearray(whole[:cut] if trial % 2 or form is lsun else whole)
        if not trial % 2 and form is not lsun:  # LMDB trusts its own pages; that is said in the guide
            damaged[cut : cut + 16] = rng.bytes(min(16, len(whole) - cut))
        victim.write_bytes(damaged)
        with limited(10):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # broken images, for which others stand in
                    data = Images.open(path, SIZE)
                    assert data.batch(range(len(data))).shape[1:] == (3, *SIZE)
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017


def test_a_pattern_names_shards_and_one_that_is_missing_is_told(tmp_path):
    assert list(braces("a-{08..10}.{x,y}")) == ["a-08.x", "a-08.y", "a-09.x", "a-09.y", "a-10.x", "a-10.y"]
    webdataset(tmp_path)
    with pytest.raises(UserError, match=r"set-03.tar, which set-\{00..03\}.tar names, does not exist"):
        Images.open(tmp_path / "set-{00..03}.tar", SIZE)
    with pytest.raises(UserError, match="may be named"):
        Images.open(tmp_path / "set-{0..999999999}.tar", SIZE)


def test_names_that_lead_out_of_a_shard_are_left(tmp_path):
    with tarfile.open(tmp_path / "a-0.tar", "w") as held:
        for name in ("../../out.png", "/abs.png", "in.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png(0))
            held.addfile(info, io.BytesIO(png(0)))
    assert list(Images.open(tmp_path / "a-*.tar", SIZE).names) == ["abs.png", "in.png"]


def test_labels_that_do_not_fit_are_refused(tmp_path):
    np.savez(tmp_path / "train_data_batch_1.npz", data=np.zeros((2, 192), np.uint8), labels=[0, 1])
    with pytest.raises(UserError, match="count from 1"):
        Images.open(tmp_path, SIZE)
    broken = table(0, 4).set_column(1, "y", pa.array([0, 1, 2, 3]))
    pq.write_table(broken.replace_schema_metadata(table(0, 1).schema.metadata), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="the label 3 of 3 classes"):
        Images.open(tmp_path / "a.parquet", SIZE)
    tars(tmp_path, lambda k: ("cls", b"x") if k != 7 else ("txt", b""))
    with pytest.raises(UserError, match=r"0007\.cls is missing"):
        Images.open(tmp_path / "set-*.tar", SIZE)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "../../etc/passwd"}]}')
    with pytest.raises(UserError, match="none but its own"):
        Images.open(tmp_path, SIZE)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, 1, None, 1], "no y in 1 of 4 rows"),
        ([0, 1, -1, 1], "the label -1 of 3 classes"),
        ([[0], [1], [2], [0]], "its y is list<.*, and an image has one"),
        (["cat", "dog", "emu", "cat"], "the label cat of 3 classes"),
        ([0.0, 1.0, 2.0, 0.0], "not 0.0"),
    ],
    ids=["missing", "minus one", "lists", "texts", "floats"],
)
def test_labels_of_a_column_that_are_none_are_refused_and_in_nobodys_way_who_wants_none(tmp_path, labels, says):
    odd = table(0, 4).set_column(1, "y", pa.array(labels)).replace_schema_metadata(table(0, 1).schema.metadata)
    pq.write_table(odd, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=says):
        Images.open(tmp_path / "a.parquet", SIZE)
    assert Images.open(tmp_path / "a.parquet", SIZE, labels="none").labels is None


def test_labels_that_all_miss_are_none_and_asking_for_them_is_refused(tmp_path):
    pq.write_table(table(0, 4).set_column(1, "y", pa.array([-1] * 4)), tmp_path / "a.parquet")
    assert Images.open(tmp_path / "a.parquet", SIZE).labels is None
    with pytest.raises(UserError, match="labels='file' does not fit"):
        Images.open(tmp_path / "a.parquet", SIZE, labels="file")
    pq.write_table(table(0, 4).drop_columns(["y"]), tmp_path / "a.parquet")
    assert Images.open(tmp_path / "a.parquet", SIZE).labels is None


def test_files_of_one_table_that_are_not_alike_are_refused(tmp_path):
    pq.write_table(table(0, 4), tmp_path / "a.parquet")
    whole = table(4, 4)
    numbers = whole.set_column(1, "y", pa.array([str(k) for k in range(4)]))
    for other in (whole.rename_columns(["picture", "y"]), whole.drop_columns(["y"]), numbers):
        pq.write_table(other, tmp_path / "b.parquet")
        with pytest.raises(UserError, match=r"b\.parquet keeps its images or labels otherwise than a\.parquet"):
            Images.open(tmp_path, SIZE)


def test_parts_of_one_set_are_told_where_they_are_files_as_where_they_are_folders(tmp_path):
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        pq.write_table(table(0, 6), tmp_path / f"{name}.parquet")
    told = Images.open(tmp_path, SIZE).describe()
    assert "test and train look like parts of one set" in told and f"give '{tmp_path}/test*.parquet' to use one" in told
    assert len(Images.open(tmp_path / "test*.parquet", SIZE)) == 6
    (sets := tmp_path / "sets").mkdir()
    for name in ("test", "train"):
        (sets / name).mkdir()
        datasets_folder(sets / name)
    (sets / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"holds several sets of datasets: give one of them, .*test or .*train"):
        Images.open(sets, SIZE)
    state = sets / "test" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_indices_data_files": [{"filename": "x.arrow"}]}))
    with pytest.raises(UserError, match="a selection of rows, which is not read"):
        Images.open(sets / "test", SIZE)


def test_a_label_of_an_npz_between_two_classes_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=PIXELS, arr_1=LABELS + 0.5)
    with pytest.raises(UserError, match="a whole number from 0"):
        Images.open(tmp_path / "a.npz", SIZE)


def test_what_an_lmdb_holds_beside_images_is_told(tmp_path):
    path = lsun(tmp_path)
    with lmdb.open(str(path)) as env, env.begin(write=True) as writing:
        writing.put(b"num-samples", b"12")
    assert "left out: 1 too short for an image" in Images.open(path, SIZE).describe()


def test_of_a_table_of_attributes_the_column_called_label_is_taken_and_none_at_a_guess(tmp_path):
    for k in range(3):
        (tmp_path / f"{k:06d}.png").write_bytes(png(k))
    rows = "000000.png,1,-1\n000001.png,-1,1\n000002.png,1,1\n"
    (tmp_path / "labels.csv").write_text("image_id,Bald,label\n" + rows)
    data = Images.open(tmp_path, SIZE)
    assert data.classes == ("-1", "1") and data.labels.tolist() == [0, 1, 1]
    (tmp_path / "labels.csv").write_text("image_id,Bald,Male\n" + rows)
    with pytest.raises(UserError, match="of its 3 columns none is called label"):
        Images.open(tmp_path, SIZE)


def test_pixels_that_fit_are_what_decoding_and_preparing_would_make_of_them(tmp_path):
    for channels in (1, 3, 4):
        np.save(tmp_path / f"{channels}.npy", np.random.default_rng(3).integers(0, 256, (5, *SIZE, channels), np.uint8))
        data = Images.open(tmp_path / f"{channels}.npy", SIZE, channels, cache_bytes=0)
        straight = data.batch(range(5))
        assert all((straight[k].transpose(1, 2, 0) == np.asarray(data.picture(k)).reshape(*SIZE, -1)).all() for k in range(5))


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("name,Male\n0.png,1\n1.png,-1\n0.png,-1\n", "says Male and not_Male of 0.png"),
        (f"name,Male\n0.png,{'x' * 200_000}\n", "is no table"),
        ("name,Male\n0.png,{0.x}\n1.png,{}\n", ""),
    ],
    ids=["two values of one image", "an endless cell", "braces"],
)
def test_an_odd_table_of_attributes_is_read_as_it_is_or_refused_in_a_line(tmp_path, table, says):
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(png(k))
    (tmp_path / "attributes.csv").write_text(table)
    if says:
        with pytest.raises(UserError, match=says):
            Images.open(tmp_path, SIZE, labels="attributes:Male")
    else:
        assert Images.open(tmp_path, SIZE, labels="attributes:Male").classes == ("Male={0.x}", "Male={}")
