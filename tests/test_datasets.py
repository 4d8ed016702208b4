"The readers on files in the publishers' layouts, and the crop stage: counts, resumption, determinism."
import hashlib
import json
import os
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mefem.datasets import core, facecaption, fairface
from mefem.datasets.core import READERS, DatasetError, crop_dataset, get_reader, iter_rows
from mefem.faces import encode_crop, read_image
from mefem.shards import SUCCESS, ShardError, ShardWriter, load_images, read_labels, read_manifest, write_shard

QUICK = {"size": 64, "min_side": 64, "jobs": 1, "progress": False}


def photo(seed, size=300):
    "A JPEG with a smooth random pattern."
    low = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return encode_crop(np.asarray(Image.fromarray(low).resize((size, size), Image.Resampling.BICUBIC)))


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# --- FaceCaption -----------------------------------------------------------------------------------------------------

def facecaption_row(number, url=None, box="[100, 100, 200, 200]"):
    return {"_id": f"id{number}", "caption": ["a face"], "url": url or f"https://x.org/{number}.jpg",
            "laion_caption": "", "box": box}


def make_facecaption(root, rows, shards):
    "`shards`: for each shard, a list of (row, status, JPEG or None, changes to img2dataset's row)."
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "FaceCaption-15M.parquet")
    for index, entries in enumerate(shards):
        samples, table = [], []
        for number, (row, status, data, change) in enumerate(entries):
            key = f"{index:05d}{number:04d}"
            table.append({"url": row["url"], "key": key, "status": status, "error_message": None, "width": 300,
                          "height": 300, "original_width": 300, "original_height": 300, "_id": row["_id"],
                          "box": row["box"], **change})
            if data is not None:
                samples.append((key, data, {"key": key}))
        with ShardWriter(root / "images", index) as shard:
            for sample in samples:
                shard.add_sample(*sample)
            shard.rows = table
            shard.samples = sum(row["status"] == SUCCESS for row in table)


@pytest.fixture
def captions(tmp_path):
    rows = [facecaption_row(number) for number in range(12)]
    rows[3] = facecaption_row(3, url="UNKNOWN")
    rows[4] = facecaption_row(4, url="https://x.org/4.jpg, https://y.org/4.jpg")
    rows[5] = facecaption_row(5, box="[1, 2, 3")
    rows[6] = facecaption_row(6, box="[0, 0, 160, 160]")
    rows[7] = facecaption_row(7, box="[140, 140, 150, 150]")
    whole = photo(9)
    shards = [[(rows[0], SUCCESS, photo(0), {}), (rows[1], "failed_to_download", None, {}),
               (rows[2], "failed_to_resize", None, {}), (rows[4], SUCCESS, photo(4), {}),
               (rows[5], SUCCESS, photo(5), {})],
              [(rows[6], SUCCESS, photo(6), {}), (rows[7], SUCCESS, photo(7), {}), (rows[8], SUCCESS, None, {}),
               (rows[9], SUCCESS, whole[: len(whole) // 2], {}), (rows[10], SUCCESS, photo(10, 600), {})]]
    make_facecaption(tmp_path / "raw", rows, shards)
    return tmp_path / "raw"


REASONS = {"dead link": 1, "not an image": 1, "no link": 1, "bad box": 1, "leaves the picture": 1, "too small": 1,
           "missing photograph": 1, "corrupt image": 1, "not downloaded": 1}


def test_facecaption_counts_every_row_under_its_reason(captions, tmp_path):
    manifest = crop_dataset("facecaption", captions, tmp_path / "faces", **QUICK)
    assert manifest["dropped"] == REASONS
    assert (manifest["original"], manifest["usable"]) == (12, 3)
    assert manifest["state"] == "present" and manifest["simulated"] is False
    assert read_labels(tmp_path / "faces")["_id"].tolist() == ["id0", "id4", "id10"]


def test_facecaption_crops_are_where_the_boxes_are(captions, tmp_path):
    crop_dataset("facecaption", captions, tmp_path / "faces", **QUICK)
    images = load_images(tmp_path / "faces")
    source = Image.fromarray(read_image(photo(4)))
    expected = np.asarray(source.crop((50, 50, 250, 250)).resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(images[1] - expected).mean() < 2
    assert np.abs(images[0] - expected).mean() > 20


@pytest.mark.parametrize("stored, original", [
    ((300, 300), (600, 600)), ((300, 200), (900, 600)), ((300, 300), (0, None))])
def test_facecaption_box_follows_the_stored_size(stored, original):
    row = {"box": "[120, 60, 240, 180]", "width": stored[0], "height": stored[1], "original_width": original[0],
           "original_height": original[1]}
    scale = stored[0] / (original[0] or stored[0])
    assert facecaption.stored_box(row) == pytest.approx([120 * scale, 60 * scale, 240 * scale, 180 * scale])


def test_facecaption_unfinished_shard_does_not_count(captions, tmp_path):
    (captions / "images/00001_stats.json").unlink()
    reader = get_reader("facecaption")
    found = [photo for unit in reader.units(captions) for photo in reader.read(captions, unit)]
    assert sorted(photo.labels["_id"] for photo in found) == sorted(f"id{number}" for number in range(12))
    assert Counter(photo.problem for photo in found)["not downloaded"] == 6


def test_facecaption_truncated_download_stops_with_its_name(captions, tmp_path):
    path = captions / "images/00001.tar"
    path.write_bytes(path.read_bytes()[:2500])
    with pytest.raises(ShardError, match="images/00001.tar is truncated"):
        crop_dataset("facecaption", captions, tmp_path / "faces", **QUICK)
    assert not (tmp_path / "faces/manifest.json").exists()
    path = captions / "FaceCaption-15M.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="FaceCaption-15M.parquet cannot be read"):
        crop_dataset("facecaption", captions, tmp_path / "faces", **QUICK)


def test_facecaption_without_the_additional_columns(captions):
    path = captions / "images/00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["_id", "box"]), path)
    with pytest.raises(DatasetError, match="(?s)00000.parquet: no column '_id', 'box'.*save_additional_columns"):
        get_reader("facecaption").units(captions)


def test_facecaption_row_downloaded_twice(captions):
    table = pq.read_table(captions / "images/00000.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), captions / "images/00000.parquet")
    with pytest.raises(DatasetError, match="1 rows .* twice"):
        get_reader("facecaption").units(captions)


def test_facecaption_links_for_img2dataset(captions):
    links = pq.read_table(facecaption.write_links(captions)).to_pylist()
    assert len(links) == 11 and "id3" not in [row["_id"] for row in links]
    assert links[3] == {"url": "https://x.org/4.jpg", "_id": "id4", "box": "[100, 100, 200, 200]"}


# --- FairFace --------------------------------------------------------------------------------------------------------

def make_fairface(folder, train=7, validation=3, **changes):
    folder.mkdir(parents=True)
    features = {"age": {"names": ["0-2", "3-9"]}, "gender": {"names": ["Male", "Female"]}, "race": {"names": ["Black"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for split, count in (("train", train), ("validation", validation)):
        rows = [{"image": {"bytes": photo(number), "path": f"{number}.jpg"}, "age": number % 2, "gender": number % 2,
                 "race": 0, "service_test": False, **changes} for number in range(count)]
        table = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", row_group_size=2)


def test_fairface_units_cover_every_row_once(tmp_path, monkeypatch):
    make_fairface(tmp_path / "1.25")
    monkeypatch.setattr(fairface, "UNIT_ROWS", 3)
    reader = get_reader("fairface")
    assert len(reader.units(tmp_path)) == 4
    photos = [found for unit in reader.units(tmp_path) for found in reader.read(tmp_path, unit)]
    expected = [("train", number) for number in range(7)] + [("validation", number) for number in range(3)]
    assert [found.key for found in photos] == [f"{split}_{number:06d}" for split, number in expected]
    assert [found.data for found in photos] == [photo(number) for _, number in expected]
    assert photos[8].labels == {"split": "validation", "person": "validation_000001", "age": 1, "age_name": "3-9",
                                "gender": 1, "gender_name": "Female", "race": 0, "race_name": "Black"}


def test_fairface_takes_the_wide_release_first(tmp_path):
    make_fairface(tmp_path / "0.25")
    assert get_reader("fairface").state(tmp_path) == ("present", "padding 0.25")
    make_fairface(tmp_path / "1.25")
    assert get_reader("fairface").state(tmp_path) == ("present", "padding 1.25")
    assert get_reader("fairface", padding="0.25").folder(tmp_path).name == "0.25"
    with pytest.raises(DatasetError, match="padding '2'"):
        get_reader("fairface", padding="2")


def test_fairface_bad_files(tmp_path):
    make_fairface(tmp_path / "1.25", age=2)
    with pytest.raises(DatasetError, match="row 0: age is 2, expected a class number 0..1"):
        crop_dataset("fairface", tmp_path, tmp_path / "faces", framing="dataset", **QUICK)
    path = tmp_path / "1.25/train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    with pytest.raises(DatasetError, match="no class names"):
        crop_dataset("fairface", tmp_path, tmp_path / "faces", framing="dataset", **QUICK)
    pq.write_table(pq.read_table(path).drop_columns(["race"]), path)
    with pytest.raises(DatasetError, match="train-00000-of-00001.parquet: no column 'race'"):
        crop_dataset("fairface", tmp_path, tmp_path / "faces", framing="dataset", **QUICK)


def test_real_fairface_through_the_real_reader(shared, tmp_path):
    "FairFace's tight crops: the paper's square does not fit, the publisher's own framing does, and both are counted."
    raw = tmp_path / "raw/0.25"
    raw.mkdir(parents=True)
    for split, count in (("train", 300), ("validation", 100)):
        name = f"{split}-00000-of-00001.parquet"
        pq.write_table(pq.ParquetFile(shared / "fairface/0.25" / name).read_row_group(0).slice(0, count), raw / name)
    paper = crop_dataset("fairface", raw.parent, tmp_path / "paper", jobs=1, progress=False)
    assert paper["original"] == 400 and paper["usable"] == 0, "as measured by the project's owner: none of 400 fits"
    assert set(paper["dropped"]) == {"leaves the picture", "no face"} and paper["dropped"]["no face"] < 40
    own = crop_dataset("fairface", raw.parent, tmp_path / "own", framing="dataset", jobs=1, progress=False)
    assert own["usable"] == 400
    labels = read_labels(tmp_path / "own")
    table = pd.concat([pd.read_parquet(path) for path in sorted(raw.glob("*.parquet"))], ignore_index=True)
    for name in ("age", "gender", "race"):
        assert labels[name].tolist() == table[name].tolist()
    assert labels["split"].value_counts().to_dict() == {"train": 300, "validation": 100}
    first = read_image(table["image"][0]["bytes"]).astype(int)
    assert np.abs(load_images(tmp_path / "own", limit=1)[0] - first).mean() < 2, "224 x 224 stays as it was published"


# --- BMI -------------------------------------------------------------------------------------------------------------

HEADER = "image,height,weight,bmi,sex,person,haemoglobin\n"


def make_bmi(root, source, lines, images=("1.jpg", "2.jpg")):
    (root / source / "images").mkdir(parents=True)
    (root / source / "labels.csv").write_text(HEADER + "\n".join(lines) + "\n")
    for number, name in enumerate(images):
        (root / source / "images" / name).write_bytes(photo(number))


def test_bmi_accounts_for_all_rows_of_all_sources(tmp_path):
    make_bmi(tmp_path / "raw", "fiw-bmi", ["1.jpg,180,81,25,male,7,8.9", "2.jpg,160,60,,F,8,", "3.jpg,170,70,,m,9,"])
    make_bmi(tmp_path / "raw", "own", ["1.jpg,175,,,f,7,", "2.jpg,,,31.5,f,7,"])
    manifest = crop_dataset("bmi", tmp_path / "raw", tmp_path / "faces", framing="dataset", **QUICK)
    assert manifest["original"] == 5 and manifest["dropped"] == {"missing photograph": 1, "no label": 1}
    labels = read_labels(tmp_path / "faces")
    assert labels["bmi"].tolist() == pytest.approx([25, 60 / 1.6**2, 31.5])
    assert labels["person"].tolist() == ["fiw-bmi/7", "fiw-bmi/8", "own/7"], "one number, two people in two sources"
    assert labels["sex"].tolist() == ["male", "female", "female"]
    assert labels["haemoglobin"][0] == 8.9 and np.isnan(labels["haemoglobin"][1])


@pytest.mark.parametrize("line, message", [
    ("1.jpg,1.80,81,25,male,7,", "line 2: height is 1.80, expected 50 to 272"),
    ("1.jpg,180,nan,,male,7,", "line 2: weight is nan"), ("1.jpg,180,x,25,male,7,", "line 2: weight is 'x'"),
    ("1.jpg,180,81,31,male,7,", "line 2: bmi is 31, but 81 kg at 180 cm give 25.0"),
    ("1.jpg,180,81,25,man,7,", "line 2: sex is 'man'"), ("1.jpg,180,81,25,male,,", "line 2: person is empty"),
    ("../1.jpg,180,81,25,male,7,", "line 2: image is '../1.jpg'"), (",180,81,25,male,7,", "line 2: image is ''")])
def test_bmi_impossible_values_name_file_line_and_value(tmp_path, line, message):
    make_bmi(tmp_path / "raw", "own", [line])
    with pytest.raises(DatasetError) as caught:
        crop_dataset("bmi", tmp_path / "raw", tmp_path / "faces", framing="dataset", **QUICK)
    assert message in str(caught.value) and "own/labels.csv" in str(caught.value)


def test_bmi_missing_column(tmp_path):
    make_bmi(tmp_path, "own", [])
    (tmp_path / "own/labels.csv").write_text("image,height,weight,bmi,gender,person\n1.jpg,180,81,25,m,7\n")
    with pytest.raises(DatasetError, match="own/labels.csv: no column 'sex' among image, height"):
        get_reader("bmi").original(tmp_path)


def test_bmi_portraits_through_the_detector(shared, tmp_path):
    "Real portraits in the BMI layout: detector, paper's framing, all kept; one with its face cut off is not."
    names = sorted(path.name for path in (shared / "frll").glob("*.jpg"))[:4]
    lines = [f"{name},170,70,,f,{number}," for number, name in enumerate([*names, "cut.jpg"])]
    make_bmi(tmp_path / "raw", "own", lines, images=())
    for name in names:
        os.symlink(shared / "frll" / name, tmp_path / "raw/own/images" / name)
    Image.open(shared / "frll" / names[0]).crop((0, 0, 1350, 900)).save(tmp_path / "raw/own/images/cut.jpg")
    manifest = crop_dataset("bmi", tmp_path / "raw", tmp_path / "faces", jobs=1, progress=False)
    assert manifest["usable"] == 4 and manifest["dropped"] == {"leaves the picture": 1}


# --- the crop stage --------------------------------------------------------------------------------------------------

def test_result_does_not_depend_on_jobs_or_interruption(captions, tmp_path, monkeypatch):
    options = {**QUICK, "jobs": 2}
    crop_dataset("facecaption", captions, tmp_path / "two", **options)
    crop_dataset("facecaption", captions, tmp_path / "one", **QUICK)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")

    done = []
    real = core.crop_unit
    def killed_in_the_second(name, options, raw, out, index, *rest):
        if index == 1 and 1 not in done:
            done.append(index)
            raise KeyboardInterrupt
        done.append(index)
        return real(name, options, raw, out, index, *rest)
    monkeypatch.setattr(core, "crop_unit", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        crop_dataset("facecaption", captions, tmp_path / "again", **QUICK)
    assert not (tmp_path / "again/manifest.json").exists()
    assert not [path for path in (tmp_path / "again").iterdir() if path.name.startswith(".")]
    crop_dataset("facecaption", captions, tmp_path / "again", **QUICK)
    assert done == [0, 1, 1, 2], "the finished shard is kept, the interrupted one made anew"
    assert digest(tmp_path / "again") == digest(tmp_path / "one")


def test_finished_shards_are_kept_only_while_they_are_true(captions, tmp_path):
    out = tmp_path / "faces"
    crop_dataset("facecaption", captions, out, **QUICK)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("0*")}
    crop_dataset("facecaption", captions, out, **QUICK)
    assert before == {path.name: path.stat().st_mtime_ns for path in out.glob("0*")}
    crop_dataset("facecaption", captions, out, **{**QUICK, "size": 32})
    assert load_images(out).shape[1] == 32
    rows = [facecaption_row(number) for number in range(2)]
    for path in captions.rglob("*.*"):
        path.unlink()
    make_facecaption(captions, rows, [[(row, SUCCESS, photo(50), {}) for row in rows]])
    manifest = crop_dataset("facecaption", captions, out, **QUICK)
    assert manifest["usable"] == 2 and len(list(out.glob("*.tar"))) == 1, "other photographs, other crops"


@pytest.mark.parametrize("name", READERS)
def test_absent_data_are_a_state_not_an_error(name, tmp_path):
    write_shard(tmp_path / "faces", 0, [], [])
    manifest = crop_dataset(name, tmp_path / "raw", tmp_path / "faces", **QUICK)
    assert manifest == read_manifest(tmp_path / "faces")
    assert (manifest["state"], manifest["original"], manifest["usable"], manifest["shards"]) == ("absent", 0, 0, [])
    assert f"data/raw/{name}" in manifest["reason"] and str(tmp_path) not in manifest["reason"]
    assert not list((tmp_path / "faces").glob("*.tar")), "shards of an earlier state do not stay"


def test_a_row_lost_by_a_reader_is_noticed(captions, tmp_path, monkeypatch):
    whole = facecaption.read_images
    monkeypatch.setattr(facecaption, "read_images", lambda *args: list(whole(*args))[1:])
    with pytest.raises(ShardError, match="is not the 12"):
        crop_dataset("facecaption", captions, tmp_path / "faces", **QUICK)


def test_simulated_data_are_marked(captions, tmp_path):
    (captions / "SIMULATED.json").write_text("{}")
    assert crop_dataset("facecaption", captions, tmp_path / "faces", **QUICK)["simulated"] is True


def test_wrong_names(tmp_path):
    assert set(READERS) >= {"facecaption", "fairface", "bmi"}
    with pytest.raises(DatasetError, match="'celebb'.*facecaption"):
        get_reader("celebb")
    with pytest.raises(DatasetError, match="framing 'tight'"):
        crop_dataset("bmi", tmp_path, tmp_path, framing="tight")


@pytest.mark.parametrize("start, stop", [(0, 10), (3, 7), (4, 5), (9, 30), (10, 20), (0, 1)])
def test_iter_rows_is_a_slice(tmp_path, start, stop):
    pq.write_table(pa.table({"n": list(range(10))}), tmp_path / "t.parquet", row_group_size=3)
    found = list(iter_rows(tmp_path / "t.parquet", start, stop, batch=2))
    assert found == [(number, {"n": number}) for number in range(10)[start:stop]]


def test_provide_never_touches_files_it_did_not_write(tmp_path):
    from PIL import Image

    from mefem.datasets.core import NOTE, provide_dataset
    from mefem.simulate.publishers import MARKER, remove_simulated

    root = tmp_path / "bmi"
    assert provide_dataset("bmi", root)["state"] == "absent"  # nothing there: a note, which is no data
    assert [p.name for p in root.iterdir()] == [NOTE]
    images = root / "own" / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (300, 300)).save(images / "a.jpg")
    (root / "own" / "labels.csv").write_text("image,height,weight,bmi,sex,person\na.jpg,170,70,24.2,female,p1\n")
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != NOTE}
    for photographs in (0, 20):  # the publisher's files win over a profile that would simulate
        assert provide_dataset("bmi", root, photographs=photographs)["state"] == "publisher"
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    remove_simulated("bmi", root)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    (root / MARKER).write_text("{}")  # now it counts as simulated: a profile without simulation empties it
    assert provide_dataset("bmi", root)["state"] == "absent"
    assert [p.name for p in root.iterdir()] == [NOTE]
