"""Shards and manifests: bytes, counts, resumption and damage; webdataset is the independent reader."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mefem.files import replacing
from mefem.shards import (
    DataAbsent,
    ShardError,
    ShardWriter,
    finished_stats,
    iter_samples,
    load_images,
    open_tar,
    read_labels,
    read_manifest,
    remove_shards_from,
    tar_index,
    write_absent,
    write_manifest,
    write_shard,
)


def jpeg(seed, size=48):
    low = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(low).resize((size, size)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def make(folder, shards=2, each=5, settings=None):
    stats = []
    for index in range(shards):
        keys = [f"{index}_{number}" for number in range(each)]
        samples = [(key, jpeg(index * 100 + number), {"key": key}) for number, key in enumerate(keys)]
        rows = [
            {"key": key, "status": "success", "value": index * 100 + number}
            for number, key in enumerate(keys)
        ]
        rows.insert(2, {"key": f"{index}_x", "status": "no face", "value": -1, "error_message": "nothing"})
        stats.append(write_shard(folder, index, samples, rows, settings))
    return write_manifest(folder, "made", shards * (each + 1), stats, {"size": 48})


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_round_trip_keeps_one_order(tmp_path):
    manifest = make(tmp_path)
    assert manifest == read_manifest(tmp_path)
    assert (manifest["original"], manifest["usable"], manifest["dropped"]) == (12, 10, {"no face": 2})
    labels = read_labels(tmp_path)
    expected = [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]
    assert labels["value"].tolist() == expected and "status" not in labels
    assert [key for key, _, _ in iter_samples(tmp_path)] == labels["key"].tolist()
    assert [meta["key"] for _, _, meta in iter_samples(tmp_path)] == labels["key"].tolist()
    images = load_images(tmp_path, jobs=3)
    reference = [np.asarray(Image.open(io.BytesIO(jpeg(value)))) for value in expected]
    assert images.dtype == np.uint8 and np.array_equal(images, reference)


def test_load_images_size_and_limit(tmp_path):
    make(tmp_path)
    small = load_images(tmp_path, size=16, limit=7)
    assert small.shape == (7, 16, 16, 3)
    whole = load_images(tmp_path)[:7].reshape(7, 16, 3, 16, 3, 3).mean((2, 4))
    assert np.abs(small - whole).mean() < 6, "a smaller picture is the mean of the larger one's pixels"
    assert load_images(tmp_path, limit=0).shape == (0, 48, 48, 3)


def test_bytes_are_deterministic(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    with tarfile.open(tmp_path / "a/00000.tar") as tar:
        assert {(entry.mtime, entry.uid, entry.gid, entry.uname) for entry in tar} == {(0, 0, 0, "")}


def test_webdataset_reads_it(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    make(tmp_path, shards=1)
    samples = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == read_labels(tmp_path)["key"].tolist()
    assert samples[0]["jpg"] == jpeg(0) and json.loads(samples[0]["json"]) == {"key": "0_0"}


def test_labels_of_unequal_shards_are_joined(tmp_path):
    first = write_shard(tmp_path, 0, [("a", jpeg(0), {})], [{"key": "a", "status": "success", "age": None}])
    second = write_shard(
        tmp_path, 1, [("b", jpeg(1), {})], [{"key": "b", "status": "success", "age": 4.5, "sex": "f"}]
    )
    write_manifest(tmp_path, "made", 2, [first, second], {"size": 48})
    labels = read_labels(tmp_path)
    assert np.isnan(labels["age"][0]) and labels["age"][1] == 4.5 and labels["sex"][1] == "f"


def test_a_killed_write_leaves_nothing(tmp_path):
    write_shard(tmp_path, 0, [("a", jpeg(0), {})], [{"key": "a", "status": "success"}], {"v": 1})
    with pytest.raises(KeyboardInterrupt):
        with ShardWriter(tmp_path, 0, {"v": 2}) as shard:
            shard.add_sample("b", jpeg(1), {})
            raise KeyboardInterrupt
    assert finished_stats(tmp_path, 0, {"v": 1}) is None and finished_stats(tmp_path, 0, {"v": 2}) is None
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_replacing_keeps_the_old_file_on_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_finished_only_with_the_same_settings(tmp_path):
    settings = {"crop": {"size": 224}, "unit": "train/0"}
    make(tmp_path, shards=1, settings=settings)
    assert finished_stats(tmp_path, 0, settings)["successes"] == 5
    assert finished_stats(tmp_path, 0, {**settings, "unit": "train/1"}) is None
    assert finished_stats(tmp_path, 1, settings) is None
    (tmp_path / "00000_stats.json").write_text("{")
    assert finished_stats(tmp_path, 0, settings) is None


def test_counts_must_add_up(tmp_path):
    with pytest.raises(ShardError, match="1 pictures, but 2 rows"):
        write_shard(tmp_path, 0, [("a", jpeg(0), {})], [{"key": key, "status": "success"} for key in "ab"])
    assert not list(tmp_path.glob("0*"))
    stats = write_shard(tmp_path, 0, [("a", jpeg(0), {})], [{"key": "a", "status": "success"}])
    with pytest.raises(ShardError, match="is not the 2"):
        write_manifest(tmp_path, "made", 2, [stats], {"size": 48})
    write_manifest(tmp_path, "made", 1, [stats], {"size": 48})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "dropped": {"no face": 3}}))
    with pytest.raises(ShardError, match="manifest.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 1500, 2048, "after the last file"])
def test_truncated_tar_names_itself(tmp_path, keep):
    make(tmp_path)
    path = tmp_path / "00001.tar"
    data = path.read_bytes()
    if keep == "after the last file":  # where tarfile alone sees a complete archive
        keep = max(offset + -(-size // 512) * 512 for offset, size in tar_index(path).values())
    path.write_bytes(data[:keep])
    with pytest.raises(ShardError, match="00001.tar is truncated"):
        load_images(tmp_path)


def test_other_damage_names_the_file(tmp_path):
    make(tmp_path)
    (tmp_path / "00000.tar").write_bytes(b"\x01" * 20480)
    with pytest.raises(ShardError, match="00000.tar"):
        load_images(tmp_path)
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(ShardError, match="00000.tar is missing"):
        list(iter_samples(tmp_path))
    make(tmp_path)
    (tmp_path / "00001.parquet").write_bytes((tmp_path / "00001.parquet").read_bytes()[:-10])
    with pytest.raises(ShardError, match="00001.parquet cannot be read"):
        read_labels(tmp_path)
    pq.write_table(pa.table({"key": ["1_0"], "status": ["success"]}), tmp_path / "00001.parquet")
    with pytest.raises(ShardError, match="1 usable rows, expected 5"):
        read_labels(tmp_path)
    with pytest.raises(ShardError, match="nowhere.*missing"):
        read_manifest(tmp_path / "nowhere")


def test_a_picture_that_is_not_in_the_tar(tmp_path):
    make(tmp_path, shards=1)
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        entry = tarfile.TarInfo("0_0.jpg")
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"jpg"))
    with pytest.raises(ShardError, match=r"0_[01]\.jpg"):
        load_images(tmp_path)


def test_absent_data_say_why(tmp_path):
    write_absent(tmp_path, "celeba", "no files in data/raw/celeba", {"size": 224})
    for use in (read_labels, load_images, lambda folder: list(iter_samples(folder))):
        with pytest.raises(DataAbsent, match="celeba.*no files"):
            use(tmp_path)


def test_older_shards_are_removed(tmp_path):
    make(tmp_path, shards=3)
    remove_shards_from(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.parquet",
        "00000.tar",
        "00000_stats.json",
        "manifest.json",
    ]


def test_open_tar_reads_foreign_formats(tmp_path):
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "f.tar", "w", format=form) as tar:
            for name in ("a.jpg", "é" * 120 + ".json"):
                entry = tarfile.TarInfo(name)
                entry.size = 5
                tar.addfile(entry, io.BytesIO(name[:1].encode() * 5))
        with open_tar(tmp_path / "f.tar") as read:
            assert read("a.jpg") == b"aaaaa"
            with pytest.raises(KeyError):
                read("b.jpg")
