"""The readers on files in the publishers' layouts, and the crop stage: counts, resumption, determinism."""

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
from test_faces import cartoon, saved

from mefem import crop as crop_stage
from mefem.crop import Cropping, crop_dataset, crop_one, crop_photographs
from mefem.datasets import core, facecaption, fairface
from mefem.datasets.core import READERS, DatasetError, get_reader, iter_rows
from mefem.faces import encode_crop, read_image
from mefem.labels import FAIRFACE_CLASSES
from mefem.shards import (
    SUCCESS,
    ShardError,
    ShardWriter,
    leaked_keys,
    load_images,
    read_labels,
    read_manifest,
    write_shard,
)

QUICK = {"size": 64, "min_side": 64, "jobs": 1, "progress": False}


def photo(seed, size=300):
    """A JPEG with a smooth random pattern."""
    low = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return encode_crop(np.asarray(Image.fromarray(low).resize((size, size), Image.Resampling.BICUBIC)))


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# --- FaceCaption -------------------------------------------------------------------------------


def facecaption_row(number, url=None, box="[100, 100, 200, 200]"):
    return {
        "_id": f"id{number}",
        "caption": ["a face"],
        "url": url or f"https://x.org/{number}.jpg",
        "laion_caption": "",
        "box": box,
    }


def make_facecaption(root, rows, shards):
    """`shards`: for each shard, a list of (row, status, JPEG or None, changes to img2dataset's row)."""
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "FaceCaption-15M.parquet")
    for index, entries in enumerate(shards):
        samples, table = [], []
        for number, (row, status, data, change) in enumerate(entries):
            key = f"{index:05d}{number:04d}"
            table.append(
                {
                    "url": row["url"],
                    "key": key,
                    "status": status,
                    "error_message": None,
                    "width": 300,
                    "height": 300,
                    "original_width": 300,
                    "original_height": 300,
                    "_id": row["_id"],
                    "box": row["box"],
                    **change,
                }
            )
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
    shards = [
        [
            (rows[0], SUCCESS, photo(0), {}),
            (rows[1], "failed_to_download", None, {}),
            (rows[2], "failed_to_resize", None, {}),
            (rows[4], SUCCESS, photo(4), {}),
            (rows[5], SUCCESS, photo(5), {}),
        ],
        [
            (rows[6], SUCCESS, photo(6), {}),
            (rows[7], SUCCESS, photo(7), {}),
            (rows[8], SUCCESS, None, {}),
            (rows[9], SUCCESS, whole[: len(whole) // 2], {}),
            (rows[10], SUCCESS, photo(10, 600), {}),
        ],
    ]
    make_facecaption(tmp_path / "raw", rows, shards)
    return tmp_path / "raw"


REASONS = {
    "dead link": 1,
    "not an image": 1,
    "no link": 1,
    "bad box": 1,
    "leaves the picture": 1,
    "too small": 1,
    "missing photograph": 1,
    "corrupt image": 1,
    "not downloaded": 1,
}


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
    expected = np.asarray(source.crop((50, 50, 250, 250)).resize((64, 64), Image.Resampling.LANCZOS)).astype(
        int
    )
    assert np.abs(images[1] - expected).mean() < 2
    assert np.abs(images[0] - expected).mean() > 20


@pytest.mark.parametrize(
    "stored, original", [((300, 300), (600, 600)), ((300, 200), (900, 600)), ((300, 300), (0, None))]
)
def test_facecaption_box_follows_the_stored_size(stored, original):
    row = {
        "box": "[120, 60, 240, 180]",
        "width": stored[0],
        "height": stored[1],
        "original_width": original[0],
        "original_height": original[1],
    }
    scale = stored[0] / (original[0] or stored[0])
    assert facecaption.stored_box(row) == pytest.approx([120 * scale, 60 * scale, 240 * scale, 180 * scale])


def test_facecaption_unfinished_shard_does_not_count(captions, tmp_path):
    (captions / "images/00001_stats.json").unlink()
    reader = get_reader("facecaption")
    found = [photo for unit in reader.units(captions) for photo in reader.read(captions, unit)]
    assert sorted(photo.labels["_id"] for photo in found) == sorted(f"id{number}" for number in range(12))
    assert Counter(photo.problem for photo in found)["not downloaded"] == 6


def test_facecaption_truncated_shard_is_counted_and_made_anew_when_it_is_whole(captions, tmp_path):
    crop_dataset("facecaption", captions, tmp_path / "whole", **QUICK)
    path = captions / "images/00001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:2500])
    manifest = crop_dataset("facecaption", captions, tmp_path / "faces", **QUICK)
    assert manifest["dropped"]["damaged shard"] == 5 and manifest["original"] == 12
    assert read_labels(tmp_path / "faces")["_id"].tolist() == ["id0", "id4"], "the other shard is not harmed"
    path.write_bytes(data)
    crop_dataset("facecaption", captions, tmp_path / "faces", **QUICK)
    assert digest(tmp_path / "faces") == digest(tmp_path / "whole")


def test_facecaption_truncated_list_stops_with_its_name(captions, tmp_path):
    path = captions / "FaceCaption-15M.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="FaceCaption-15M.parquet cannot be read"):
        crop_dataset("facecaption", captions, tmp_path / "faces", **QUICK)
    assert not (tmp_path / "faces/manifest.json").exists()


def test_facecaption_without_the_additional_columns(captions):
    path = captions / "images/00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["_id", "box"]), path)
    with pytest.raises(
        DatasetError, match="(?s)00000.parquet: no column '_id', 'box'.*save_additional_columns"
    ):
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


# --- FairFace ----------------------------------------------------------------------------------


def make_fairface(folder, train=7, validation=3, **changes):
    folder.mkdir(parents=True)
    features = {
        "age": {"names": ["0-2", "3-9"]},
        "gender": {"names": ["Male", "Female"]},
        "race": {"names": ["Black"]},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for split, count in (("train", train), ("validation", validation)):
        rows = [
            {
                "image": {"bytes": photo(number), "path": f"{number}.jpg"},
                "age": number % 2,
                "gender": number % 2,
                "race": 0,
                "service_test": False,
                **changes,
            }
            for number in range(count)
        ]
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
    assert photos[8].labels == {
        "split": "validation",
        "person": "validation_000001",
        "age": 1,
        "age_name": "3-9",
        "gender": 1,
        "gender_name": "Female",
        "race": 0,
        "race_name": "Black",
    }


def test_fairface_takes_the_wide_release_first(tmp_path):
    make_fairface(tmp_path / "0.25")
    assert get_reader("fairface").state(tmp_path) == ("present", "padding 0.25")
    make_fairface(tmp_path / "1.25")
    assert get_reader("fairface").state(tmp_path) == ("present", "padding 1.25")
    assert get_reader("fairface", padding="0.25").folder(tmp_path).name == "0.25"
    with pytest.raises(DatasetError, match="padding '2'"):
        get_reader("fairface", padding="2")


def fairface_as_lists(release, out):
    """A release in parquet once more as FairFace's authors publish it.

    Pictures as files, two lists with words.
    """
    for split, short in (("train", "train"), ("validation", "val")):
        rows = pq.read_table(release / f"1.25/{split}-00000-of-00001.parquet").to_pylist()
        (out / f"1.25/{short}").mkdir(parents=True)
        for number, row in enumerate(rows, 1):
            (out / f"1.25/{short}/{number}.jpg").write_bytes(row["image"]["bytes"])
        words = {name: [names[row[name]] for row in rows] for name, names in FAIRFACE_CLASSES.items()}
        files = [f"{short}/{number}.jpg" for number in range(1, len(rows) + 1)]
        pd.DataFrame({"file": files, **words}).to_csv(out / f"fairface_label_{short}.csv", index=False)


def test_fairface_of_its_authors_gives_the_crops_of_the_hugging_face_release(tmp_path, monkeypatch):
    """The same photographs in both layouts: the same crops, labels, keys; one missing is counted."""
    from mefem.simulate.run import simulate_dataset

    simulate_dataset("fairface", tmp_path / "hub", photographs=9, seed=3, jobs=1, progress=False)
    fairface_as_lists(tmp_path / "hub", tmp_path / "lists")
    monkeypatch.setattr(fairface, "UNIT_ROWS", 3)
    for name in ("hub", "lists"):
        crop_dataset("fairface", tmp_path / name, tmp_path / f"faces-{name}", framing="dataset", **QUICK)
    hub, lists = tmp_path / "faces-hub", tmp_path / "faces-lists"
    pd.testing.assert_frame_equal(read_labels(hub), read_labels(lists))
    assert len(read_labels(hub)) == 9 and set(read_labels(hub)["split"]) == {"train", "validation"}
    assert np.array_equal(load_images(hub), load_images(lists))
    (tmp_path / "lists/1.25/train/2.jpg").unlink()
    manifest = crop_dataset("fairface", tmp_path / "lists", lists, framing="dataset", **QUICK)
    assert (manifest["original"], manifest["dropped"]) == (9, {"missing photograph": 1})


def test_fairface_class_names_are_those_of_the_real_release(shared):
    real = fairface.class_names(shared / "fairface/0.25/train-00000-of-00001.parquet")
    assert real == FAIRFACE_CLASSES


@pytest.mark.parametrize(
    "line, message",
    [
        ("train/1.jpg,9-Mar,Male,Black,True", "line 2: age is '9-Mar', expected one of 0-2, 3-9"),
        (
            "train/1.jpg,03-Sep,Male,Black,True",
            "more than 70. A spreadsheet read the age class 3-9 as a date and saved that",
        ),
        ("train/1.jpg,Oct-19,Male,Black,True", "age is 'Oct-19', expected"),
        ("train/1.jpg,2019-10-01,Male,Black,True", "put 10-19 in place of 2019-10-01"),
        ("train/1.jpg,3-9,male,Black,True", "line 2: gender is 'male', expected one of Male, Female"),
        ("../1.jpg,3-9,Male,Black,True", "line 2: file is '../1.jpg'"),
        ("train/1.jpg,3-9,Male", "line 2: 3 cells, expected 5"),
    ],
)
def test_fairface_broken_lists_are_named(tmp_path, line, message):
    (tmp_path / "0.25/train").mkdir(parents=True)
    for short in ("train", "val"):
        (tmp_path / f"fairface_label_{short}.csv").write_text(f"file,age,gender,race,service_test\n{line}\n")
    with pytest.raises(DatasetError, match="fairface_label_train.csv") as caught:
        get_reader("fairface").original(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "age, dates",
    [
        (
            "3-9",
            [
                "03-Sep",
                "3-Sep",
                "9-Mar",
                "Mar-09",
                "9. Mar",
                "3. Sep.",
                "09.03.2026",
                "3/9/2024",
                "2026-09-03",
            ],
        ),
        ("10-19", ["Oct-19", "19-Oct", "Okt 19", "01.10.2019", "10/1/2019", "2019-10-01"]),
        (None, ["21-29", "3 to 9", "10 - 19", "70+", "more than 80", "1-Jan", "2026-01-01", "Mar", "9", ""]),
    ],
)
def test_what_a_spreadsheet_did_to_an_age_class(age, dates):
    for date in dates:
        found = fairface.what_happened("age", date)
        assert (
            (f"the age class {age} as a date" in found and f"put {age} in place of {date}" in found)
            if age
            else found == ""
        ), date
        assert fairface.what_happened("race", date) == ""


def test_a_spreadsheets_fairface_of_the_real_lists(shared, tmp_path):
    """The authors' list with its two damaged classes, as a spreadsheet leaves it.

    Line and remedy, at the first of them.
    """
    (tmp_path / "0.25/train").mkdir(parents=True)
    for split in ("train", "val"):
        text = (shared / f"fairface/lists/fairface_label_{split}.csv").read_text()
        (tmp_path / f"fairface_label_{split}.csv").write_text(
            text.replace(",3-9,", ",03-Sep,").replace(",10-19,", ",Oct-19,")
        )
    with pytest.raises(
        DatasetError,
        match=r"fairface_label_train.csv, line \d+: age is '(03-Sep|Oct-19)'.*A spreadsheet read",
    ):
        get_reader("fairface").original(tmp_path)


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
    """FairFace's tight crops: the paper's square does not fit, the publisher's own framing does."""
    raw = tmp_path / "raw/0.25"
    raw.mkdir(parents=True)
    for split, count in (("train", 300), ("validation", 100)):
        name = f"{split}-00000-of-00001.parquet"
        pq.write_table(
            pq.ParquetFile(shared / "fairface/0.25" / name).read_row_group(0).slice(0, count), raw / name
        )
    paper = crop_dataset("fairface", raw.parent, tmp_path / "paper", jobs=1, progress=False)
    assert paper["original"] == 400 and paper["usable"] == 0, (
        "as measured by the project's owner: none of 400 fits"
    )
    assert set(paper["dropped"]) == {"leaves the picture", "no face"} and paper["dropped"]["no face"] < 40
    own = crop_dataset("fairface", raw.parent, tmp_path / "own", framing="dataset", jobs=1, progress=False)
    assert own["usable"] == 400
    labels = read_labels(tmp_path / "own")
    table = pd.concat([pd.read_parquet(path) for path in sorted(raw.glob("*.parquet"))], ignore_index=True)
    for name in ("age", "gender", "race"):
        assert labels[name].tolist() == table[name].tolist()
    assert labels["split"].value_counts().to_dict() == {"train": 300, "validation": 100}
    first = read_image(table["image"][0]["bytes"]).astype(int)
    assert np.abs(load_images(tmp_path / "own", limit=1)[0] - first).mean() < 2, (
        "224 x 224 stays as it was published"
    )


# --- BMI ---------------------------------------------------------------------------------------

HEADER = "image,height,weight,bmi,sex,person,haemoglobin\n"


def make_bmi(root, source, lines, images=("1.jpg", "2.jpg")):
    (root / source / "images").mkdir(parents=True)
    (root / source / "labels.csv").write_text(HEADER + "\n".join(lines) + "\n")
    for number, name in enumerate(images):
        (root / source / "images" / name).write_bytes(photo(number))


def test_bmi_accounts_for_all_rows_of_all_sources(tmp_path):
    make_bmi(
        tmp_path / "raw",
        "fiw-bmi",
        ["1.jpg,180,81,25,male,7,8.9", "2.jpg,160,60,,F,8,", "3.jpg,170,70,,m,9,"],
    )
    make_bmi(tmp_path / "raw", "own", ["1.jpg,175,,,f,7,", "2.jpg,,,31.5,f,7,"])
    manifest = crop_dataset("bmi", tmp_path / "raw", tmp_path / "faces", framing="dataset", **QUICK)
    assert manifest["original"] == 5 and manifest["dropped"] == {"missing photograph": 1, "no label": 1}
    labels = read_labels(tmp_path / "faces")
    assert labels["bmi"].tolist() == pytest.approx([25, 60 / 1.6**2, 31.5])
    assert labels["person"].tolist() == ["fiw-bmi/7", "fiw-bmi/8", "own/7"], (
        "one number, two people in two sources"
    )
    assert labels["sex"].tolist() == ["male", "female", "female"]
    assert labels["haemoglobin"][0] == 8.9 and np.isnan(labels["haemoglobin"][1])


@pytest.mark.parametrize(
    "line, message",
    [
        ("1.jpg,1.80,81,25,male,7,", "line 2: height is 1.80, expected 50 to 272"),
        ('1.jpg,"180,5",81,25,male,7,', "line 2: height is '180,5', expected a number; a decimal comma?"),
        ("1.jpg,1_80,81,25,male,7,", "line 2: height is '1_80', expected a number"),
        ("1.jpg,180,nan,,male,7,", "line 2: weight is nan"),
        ("1.jpg,180,x,25,male,7,", "line 2: weight is 'x'"),
        ("1.jpg,180,81,31,male,7,", "line 2: bmi is 31, but 81 kg at 180 cm give 25.0"),
        ("1.jpg,180,81,25,man,7,", "line 2: sex is 'man'"),
        ("1.jpg,180,81,25,male,,", "line 2: person is empty"),
        ("../1.jpg,180,81,25,male,7,", "line 2: image is '../1.jpg'"),
        (",180,81,25,male,7,", "line 2: image is ''"),
    ],
)
def test_bmi_impossible_values_name_file_line_and_value(tmp_path, line, message):
    make_bmi(tmp_path / "raw", "own", [line])
    with pytest.raises(DatasetError) as caught:
        crop_dataset("bmi", tmp_path / "raw", tmp_path / "faces", framing="dataset", **QUICK)
    assert message in str(caught.value) and "own/labels.csv" in str(caught.value)


def test_bmi_ids_stay_text_and_codes_are_no_numbers(tmp_path):
    lines = [
        "1.jpg,180,81,25,male,007,007",
        "2.jpg,160,60,,f,7,1e5",
        "1.jpg,180,81,25,m,1e5,nan",
        "2.jpg,160,60,,f,NA,8.5",
    ]
    make_bmi(tmp_path, "own", lines)
    found = [photo.labels for photo in get_reader("bmi").read(tmp_path, "own/0")]
    assert [labels["person"] for labels in found] == ["own/007", "own/7", "own/1e5", "own/NA"]
    assert [labels["haemoglobin"] for labels in found] == [None, None, None, 8.5]


def test_bmi_missing_column(tmp_path):
    make_bmi(tmp_path, "own", [])
    (tmp_path / "own/labels.csv").write_text("image,height,weight,bmi,gender,person\n1.jpg,180,81,25,m,7\n")
    with pytest.raises(DatasetError, match="own/labels.csv: no column 'sex' among image, height"):
        get_reader("bmi").original(tmp_path)


def test_bmi_portraits_through_the_detector(shared, tmp_path):
    """Real portraits in the BMI layout: detector, paper's framing, all kept.

    One with its face cut off is not.
    """
    names = sorted(path.name for path in (shared / "frll").glob("*.jpg"))[:4]
    lines = [f"{name},170,70,,f,{number}," for number, name in enumerate([*names, "cut.jpg"])]
    make_bmi(tmp_path / "raw", "own", lines, images=())
    for name in names:
        os.symlink(shared / "frll" / name, tmp_path / "raw/own/images" / name)
    Image.open(shared / "frll" / names[0]).crop((0, 0, 1350, 900)).save(tmp_path / "raw/own/images/cut.jpg")
    manifest = crop_dataset("bmi", tmp_path / "raw", tmp_path / "faces", jobs=1, progress=False)
    assert manifest["usable"] == 4 and manifest["dropped"] == {"leaves the picture": 1}


# --- AVSpeech and other videos -----------------------------------------------------------------


def clip_of(seed, frames=8, kind="mp4"):
    """A clip of two seconds whose k-th frame is the pattern moved by k pixels."""
    from mefem.simulate.publishers import encode_clip, moved

    return encode_clip(moved(read_image(photo(seed, 256)))[:frames], kind)


@pytest.fixture
def clips(tmp_path):
    rows = [
        "AAAAAAAAAAA,1.000000,3.000000,0.5,0.5",
        "AAAAAAAAAAA,7.500000,9.500000,0.5,0.5",
        "-_BBBBBBBB0,30.080000,33.0,0.1,0.9",
        "CCCCCCCCCCC,0.000000,2.0,0.5,0.5",
        "DDDDDDDDDDD,0.000000,2.0,0.5,0.5",
        "0000000000E,5.000000,6.0,0.5,0.5",
    ]
    (tmp_path / "clips").mkdir()
    (tmp_path / "avspeech_train.csv").write_text("\n".join(rows) + "\n")
    whole = clip_of(1)
    for name, data in (
        ("AAAAAAAAAAA_001.000000-003.000000.mp4", whole),
        ("AAAAAAAAAAA_7.5_9.5.mp4", clip_of(2)),
        ("-_BBBBBBBB0_030.080000-033.000000.mp4", whole[: len(whole) // 2]),
        ("CCCCCCCCCCC_0.00-2.00.mp4", b""),
        ("DDDDDDDDDDD_000.000000-002.000000.mp4", b"<html>gone</html>"),
        ("notes.txt", b""),
    ):
        (tmp_path / "clips" / name).write_bytes(data)
    return tmp_path


def test_avspeech_every_row_comes_back(clips):
    photos = list(get_reader("avspeech").read(clips, "0"))
    assert [found.problem for found in photos] == [
        None,
        None,
        "unreadable clip",
        "unreadable clip",
        "unreadable clip",
        "missing clip",
    ]
    assert [found.key for found in photos][:2] == ["00000000", "00000001"] and photos[2].labels[
        "video"
    ] == "-_BBBBBBBB0"
    assert photos[2].centre == pytest.approx((0.1, 0.9))
    assert get_reader("avspeech").original(clips) == 6


def test_avspeech_takes_the_frame_that_the_row_says(clips):
    from mefem.datasets.avspeech import frame_time

    first, again = (next(iter(get_reader("avspeech").read(clips, "0"))) for _ in range(2))
    assert first.data == again.data
    taken, start = read_image(first.data).astype(int), read_image(photo(1, 256)).astype(int)
    shift = int(np.ceil(frame_time("AAAAAAAAAAA", 1.0) * 4))  # four frames a second, one pixel a frame
    errors = [np.abs(taken[:, 8:] - np.roll(start, k, axis=1)[:, 8:]).mean() for k in range(8)]
    assert int(np.argmin(errors)) == shift


@pytest.mark.parametrize("kind", ["mp4", "avi"])
def test_video_shorter_than_the_moment_asked_for(tmp_path, kind):
    path = tmp_path / f"short.{kind}"
    path.write_bytes(clip_of(1, frames=2, kind=kind))
    assert read_image(core.video_frame(path, 0.2)).shape == (256, 256, 3)
    with pytest.raises(core.VideoError) as caught:
        core.video_frame(path, 1.0)
    assert caught.value.reason == "clip cut short"


def test_without_pyav_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(DatasetError, match="pip install av"):
        core.video_frame(tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    "line, number",
    [
        ("AAAAAAAAAAA,3,1,0.5,0.5", 2),
        ("AAAAAAAAAAA,1,3,1.5,0.5", 2),
        ("AAAAAAAAAAA,1,3,,0.5", 2),
        ("AAAAAAAAAAA;1;3;0.5;0.5", 2),
        ("AAAAAAAAAAA", 2),
    ],
)
def test_avspeech_impossible_row_is_named(tmp_path, line, number):
    (tmp_path / "clips").mkdir()
    (tmp_path / "avspeech_train.csv").write_text(f"NANANANANAN,1,3,0.5,0.5\n{line}\n")
    with pytest.raises(DatasetError, match=f"avspeech_train.csv, line {number}: AAAAAAAAAAA"):
        get_reader("avspeech").original(tmp_path)


def test_avspeech_list_with_a_byte_order_mark(clips):
    path = clips / "avspeech_train.csv"
    before = [found.problem for found in get_reader("avspeech").read(clips, "0")]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [found.problem for found in get_reader("avspeech").read(clips, "0")] == before


@pytest.mark.parametrize(
    "line, message",
    [
        ("video,start,end,x,y", "expected five columns without a header"),
        ("short,1,3,0.5,0.5", "line 1: short,1.0.*YouTube id"),
        ("AAAAAAAAAAA,1,3,0.5,0.5,7", "expected five columns"),
    ],
)
def test_avspeech_another_table_is_refused(tmp_path, line, message):
    (tmp_path / "clips").mkdir()
    (tmp_path / "avspeech_train.csv").write_text(f"{line}\n")
    with pytest.raises(DatasetError, match=message):
        get_reader("avspeech").original(tmp_path)


def test_the_face_that_the_publisher_means(shared):
    """Two real portraits side by side.

    The centre decides whose face is cropped, and a centre between walls gives none.
    """
    names = sorted((shared / "frll").glob("*.jpg"))[:2]
    portraits = [Image.open(name).convert("RGB").resize((600, 600)) for name in names]
    both = Image.new("RGB", (1200, 600))
    for i, portrait in enumerate(portraits):
        both.paste(portrait, (600 * i, 0))
    crop = Cropping(framing="paper", size=64, min_side=64)

    def cropped(picture, centre):
        photo = core.Photograph("k", encode_crop(np.asarray(picture)), centre=centre)
        jpeg, status, _ = crop_one(photo, crop)
        return (read_image(jpeg).astype(int) if jpeg else None), status

    for i, portrait in enumerate(portraits):
        alone, _ = cropped(portrait, None)
        ours, other = (cropped(both, ((0.5 + k) / 2, 0.5))[0] for k in (i, 1 - i))
        assert np.abs(ours - alone).mean() < 0.7 * np.abs(other - alone).mean()
    assert cropped(both, (0.5, 0.02)) == (None, "no face")


# --- SFHQ --------------------------------------------------------------------------------------


def test_sfhq_is_only_made_smaller(tmp_path):
    for part, seed in ((1, 3), (4, 5)):
        folder = tmp_path / f"raw/SFHQ_part{part}/images"
        folder.mkdir(parents=True)
        (folder / "a.b.jpg").write_bytes(photo(seed, 1024))
    manifest = crop_dataset("sfhq", tmp_path / "raw", tmp_path / "faces", **QUICK)
    assert (manifest["original"], manifest["usable"], manifest["crop"]["framing"]) == (2, 2, "dataset")
    labels = read_labels(tmp_path / "faces")
    assert labels.part.tolist() == [1, 4] and labels.key.tolist() == ["1_a_b", "4_a_b"]
    whole = np.asarray(
        Image.fromarray(read_image(photo(5, 1024))).resize((64, 64), Image.Resampling.LANCZOS)
    ).astype(int)
    assert np.abs(load_images(tmp_path / "faces")[1] - whole).mean() < 2


def test_sfhq_keys_are_those_of_the_published_names_and_never_two_alike(tmp_path):
    names = ["SFHQ_pt1_00000001.jpg", "a.b.jpg", "a_b.jpg", "x.jpg", "x.jpeg", "Y.JPG", "y.jpg"]
    (tmp_path / "SFHQ_part1/images").mkdir(parents=True)
    for number, name in enumerate(names):
        (tmp_path / "SFHQ_part1/images" / name).write_bytes(photo(number))
    found = {found.key: found.data for found in get_reader("sfhq").read(tmp_path, "SFHQ_part1/0")}
    assert len(found) == len(names) and found["1_SFHQ_pt1_00000001"] == photo(0)
    assert len({key.lower() for key in found}) == len(names)
    manifest = crop_dataset("sfhq", tmp_path, tmp_path / "faces", **QUICK)
    assert manifest["usable"] == len(names)


# --- CelebA ------------------------------------------------------------------------------------


def make_celeba(root, rows=3, flat=False, value=None, count=None, partition=None, name="000003.jpg"):
    """Attribute k of photograph i is 1 where (i + k) % 3 == 0; the second photograph has no file."""
    names = [f"A{k}" for k in range(40)]
    values = [[1 if (i + k) % 3 == 0 else -1 for k in range(40)] for i in range(rows)]
    if value is not None:
        values[1][2] = value
    lists = {
        "Anno/list_attr_celeba.txt": "\n".join(
            [
                str(count or rows),
                " ".join(names) + " ",
                *(
                    f"{f'{i + 1:06d}.jpg' if i != 2 else name} " + " ".join(f"{v:2d}" for v in line)
                    for i, line in enumerate(values)
                ),
                "",
            ]
        ),
        "Anno/identity_CelebA.txt": "".join(f"{i + 1:06d}.jpg {2880 + i // 2}\n" for i in range(rows)),
        "Eval/list_eval_partition.txt": partition
        or "".join(f"{i + 1:06d}.jpg {i // 2}\n" for i in range(rows)),
    }
    for path, text in lists.items():
        path = root / (path.split("/")[1] if flat else path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    images = root / ("img_celeba" if flat else "Img/img_celeba")
    images.mkdir(parents=True)
    for i in (0, *range(2, rows)):
        (images / f"{i + 1:06d}.jpg").write_bytes(photo(i))


@pytest.mark.parametrize("flat", [False, True])
def test_celeba_labels_person_and_official_part(tmp_path, flat):
    make_celeba(tmp_path / "raw", flat=flat)
    manifest = crop_dataset("celeba", tmp_path / "raw", tmp_path / "faces", framing="dataset", **QUICK)
    assert (manifest["original"], manifest["dropped"]) == (3, {"missing photograph": 1})
    labels = read_labels(tmp_path / "faces")
    assert labels.key.tolist() == ["000001", "000003"] and labels.person.tolist() == ["2880", "2881"]
    assert labels.split.tolist() == ["train", "validation"]
    assert [labels[f"A{k}"].tolist() for k in range(3)] == [[True, False], [False, True], [False, False]]
    assert labels[[f"A{k}" for k in range(40)]].dtypes.eq(bool).all()


def test_celeba_identities_are_names_not_numbers(tmp_path):
    make_celeba(tmp_path)
    (tmp_path / "Anno/identity_CelebA.txt").write_text(
        "000001.jpg 007\n000002.jpg 7\n000003.jpg 12345678901234567890\n"
    )
    assert [found.labels["person"] for found in get_reader("celeba").read(tmp_path, "0")] == [
        "007",
        "7",
        "12345678901234567890",
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"value": 0}, "list_attr_celeba.txt, line 4: A2 is 0, expected -1 or 1"),
        ({"count": 7}, "line 1 says '7'"),
        ({"partition": "000001.jpg 0\n"}, "list_eval_partition.txt has no line for 000002.jpg"),
        (
            {"partition": "000001.jpg 0\n000001.jpg 0\n"},
            "list_eval_partition.txt, line 2: duplicate row for 000001.jpg",
        ),
        ({"partition": "000001.jpg 0\n000002.jpg 3\n000003.jpg 0\n"}, "a part is 3"),
        ({"partition": "000001.jpg train\n"}, "line 1: split is 'train'; expected a file name and a number"),
        ({"partition": "000001.jpg 0\n000002.jpg\n"}, "expected a file name and a number"),
        ({"name": "000002.png"}, "list_attr_celeba.txt, line 5: duplicate row for 000002.png"),
        ({"name": "../000003.jpg"}, "line 5: '../000003.jpg', expected a file name"),
    ],
)
def test_celeba_broken_lists_are_named(tmp_path, change, message):
    make_celeba(tmp_path, **change)
    with pytest.raises(DatasetError) as caught:
        get_reader("celeba").original(tmp_path)
    assert message in str(caught.value)


# --- MCD-rPPG ----------------------------------------------------------------------------------

PATIENTS = """patient_id,weight,height,bmi,age,sex,upper_ap,lower_ap,saturation,hemoglobin,\
glycated_hemoglobin,cholesterol,step,camera,view,video
1020,80,180,,40,male,120,80,98,15.0,5.5,5.1,before,FullHDwebcam,front,data/video/1020_FullHDwebcam_before.avi
1020,80,180,,40,male,120,80,98,15.0,5.5,5.1,before,USBVideo,side,video/1020_USBVideo_before.avi
1020,80,180,,40,male,120,80,98,15.0,5.5,5.1,after,FullHDwebcam,front,video/1020_FullHDwebcam_after.avi
1021,60,160,23.4,30,F,110,70,,,5.0,4.0,before,FullHDwebcam,front,video/1021_FullHDwebcam_before.avi
"""


@pytest.fixture
def patients(tmp_path):
    (tmp_path / "video").mkdir()
    (tmp_path / "db.csv").write_text(PATIENTS)
    for name in ("1020_FullHDwebcam_before", "1021_FullHDwebcam_before"):
        (tmp_path / f"video/{name}.avi").write_bytes(clip_of(4, kind="avi"))
    return tmp_path


def test_mcd_rppg_values_units_and_reasons(patients):
    photos = list(get_reader("mcd-rppg").read(patients, "0"))
    assert [found.problem for found in photos] == [None, "other camera", "missing clip", None]
    first, last = photos[0].labels, photos[3].labels
    assert first["hemoglobin"] == pytest.approx(15.0 * 0.6206) and first["bmi"] == pytest.approx(80 / 1.8**2)
    assert (last["hemoglobin"], last["saturation"], last["sex"], last["bmi"]) == (None, None, "female", 23.4)
    assert first["person"] == photos[2].labels["person"] == "mcd-rppg/1020" and first["step"] == "before"
    assert read_image(photos[0].data).shape == (256, 256, 3)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("15.0", "9.3", "expected g/dl"),
        (",180,", ",1.80,", "line 2: height is '1.80', expected 50 to 272"),
        (",F,", ",W,", "line 5: sex is 'W'"),
        ("1021,", ",", "line 5: patient_id is empty"),
        ("cholesterol,", "chol,", "no column 'cholesterol'"),
        (",98,", ",n/a,", "saturation is 'n/a'"),
    ],
)
def test_mcd_rppg_impossible_tables_are_named(patients, old, new, message):
    (patients / "db.csv").write_text(PATIENTS.replace(old, new))
    with pytest.raises(DatasetError) as caught:
        get_reader("mcd-rppg").original(patients)
    assert message in str(caught.value) and "db.csv" in str(caught.value)


# --- any folder --------------------------------------------------------------------------------


def test_folder_with_and_without_a_table(tmp_path):
    for name in ("b/2.PNG", "a/1.jpg", ".hidden/3.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(photo(1))
    (tmp_path / "notes.txt").write_text("no picture")
    reader = get_reader("folder")
    photos = list(reader.read(tmp_path, "0"))
    assert [found.labels for found in photos] == [
        {"file": name, "person": name} for name in ("a/1.jpg", "b/2.PNG")
    ]
    (tmp_path / "labels.csv").write_bytes(
        b"\xef\xbb\xbfimage,person,age,note\r\nb\\2.PNG,007,31,x\r\ngone.jpg,8,,\r\n"
    )
    photos = list(reader.read(tmp_path, "0"))
    assert [found.problem for found in photos] == [None, "missing photograph", None] and reader.original(
        tmp_path
    ) == 3
    assert photos[0].labels == {"file": "b/2.PNG", "person": "007", "age": 31.0, "note": "x"}
    assert photos[1].labels == {"file": "gone.jpg", "person": "8", "age": None, "note": None}


def test_folder_leaves_crops_and_hidden_folders_alone(tmp_path):
    for name in ("a.jpg", "b/a.jpg", ".thumbs/a.jpg", "b/.x/a.jpg", "b/._a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(saved(Image.fromarray(cartoon()), "JPEG"))
    crop_photographs(tmp_path, tmp_path / "crops", jobs=1, progress=False, size=64, min_side=64)
    assert len(list((tmp_path / "crops").glob("*.jpg"))) == 2
    reader = get_reader("folder")
    assert [found.labels["file"] for found in reader.read(tmp_path, "0")] == [
        "a.jpg",
        "b/a.jpg",
    ] and reader.original(tmp_path) == 2
    (tmp_path / "labels.csv").write_text("image,person\ncrops/a.jpg,7\n./b//a.jpg,8\n")
    assert [found.labels["file"] for found in reader.read(tmp_path, "0")] == [
        "crops/a.jpg",
        "b/a.jpg",
        "a.jpg",
    ], "what a table names is meant"


def test_folder_cells_are_guessed_by_nobody(tmp_path):
    rows = {
        "image": ["a.jpg", "b.jpg", "c.jpg", "d.jpg"],
        "person": ["007", "7", " 7 ", "NA"],
        "site": ["007", "7", "08", "1"],
        "code": ["1e5", "100000", "2e7", "1"],
        "nick": ["NA", "nan", "None", "inf"],
        "long": ["12345678901234567", "12345678901234568", "1", "2"],
        "age": ["31", "NA", "", "-0.5"],
        "tiny": ["1e-05", "2.5", "nan", "1e+05"],
        "size": ["1_000", "1", "2", "3"],
        "comma": ["1,5", "2", "3", "4"],
    }
    for name in rows["image"]:
        (tmp_path / name).write_bytes(photo(1))
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False, sep=";")
    crop_dataset("folder", tmp_path, tmp_path / ".faces", framing="dataset", **QUICK)
    labels = read_labels(tmp_path / ".faces")
    assert labels.person.tolist() == ["007", "7", "7", "NA"]
    for name in ("site", "code", "nick", "long", "size", "comma"):
        assert labels[name].tolist() == rows[name], name
    np.testing.assert_array_equal(labels.age, [31, np.nan, np.nan, -0.5])
    np.testing.assert_array_equal(labels.tiny, [1e-5, 2.5, np.nan, 1e5])


@pytest.mark.parametrize("mark", [";", "\t"])
def test_folder_table_of_another_delimiter(tmp_path, mark):
    (tmp_path / "a.jpg").write_bytes(photo(1))
    (tmp_path / "labels.csv").write_text(f'image{mark}person{mark}note\na.jpg{mark}7{mark}"two\nlines"\n')
    assert [found.labels for found in get_reader("folder").read(tmp_path, "0")] == [
        {"file": "a.jpg", "person": "7", "note": "two\nlines"}
    ]


@pytest.mark.parametrize(
    "table, message",
    [
        ("image,age\na.jpg\n", "line 2: 1 cells, expected 2"),
        ("image,age\na.jpg,3,4\n", "line 2: 3 cells, expected 2"),
        ('image,age\na.jpg,"3\n\nb.jpg,4\n', "cannot be read as CSV"),
        ("image,image\na.jpg,b\n", "column 'image' comes twice"),
        ("image,status\na.jpg,ill\n", "column 'status': labels cannot be named key, status"),
        ('image,note\na.jpg,"x\ny"\na.jpg,z\n', "line 4: duplicate row for a.jpg"),
        ("file,age\na.jpg,3\n", "no column 'image'"),
        ("image\n../a.jpg\n", "image is '../a.jpg'"),
        ("image\na.jpg\na.jpg\n", "line 3: duplicate row for a.jpg"),
    ],
)
def test_folder_bad_tables_are_named(tmp_path, table, message):
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(DatasetError) as caught:
        get_reader("folder").original(tmp_path)
    assert message in str(caught.value) and "labels.csv" in str(caught.value)


# --- across data sets --------------------------------------------------------------------------


def test_leaked_keys(tmp_path):
    with pytest.raises(ShardError, match="leaks.json is missing"):
        leaked_keys(tmp_path, "sfhq")
    (tmp_path / "leaks.json").write_text('{"leaked": {"sfhq": ["1", "2"]}}')
    assert leaked_keys(tmp_path, "sfhq") == {"1", "2"} and leaked_keys(tmp_path, "avspeech") == set()
    (tmp_path / "leaks.json").write_text("[]")
    with pytest.raises(ShardError, match="not a list of leaked"):
        leaked_keys(tmp_path, "sfhq")


# --- the crop stage ----------------------------------------------------------------------------


def test_result_does_not_depend_on_jobs_or_interruption(captions, tmp_path, monkeypatch):
    options = {**QUICK, "jobs": 2}
    crop_dataset("facecaption", captions, tmp_path / "two", **options)
    crop_dataset("facecaption", captions, tmp_path / "one", **QUICK)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")

    done = []
    real = crop_stage.crop_unit

    def killed_in_the_second(task):
        if task.index == 1 and 1 not in done:
            done.append(task.index)
            raise KeyboardInterrupt
        done.append(task.index)
        return real(task)

    monkeypatch.setattr(crop_stage, "crop_unit", killed_in_the_second)
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
    assert (manifest["state"], manifest["original"], manifest["usable"], manifest["shards"]) == (
        "absent",
        0,
        0,
        [],
    )
    assert f"data/raw/{name}" in manifest["reason"] and str(tmp_path) not in manifest["reason"]
    assert not list((tmp_path / "faces").glob("*.tar")), "shards of an earlier state do not stay"


@pytest.mark.parametrize("name", READERS)
def test_readme_and_error_say_how_to_obtain_it(name, tmp_path):
    from mefem.files import find_root

    reader = get_reader(name)
    assert reader.how_to_obtain in (find_root() / "data/README.md").read_text(encoding="utf-8")
    assert reader.how_to_obtain in reader.state(tmp_path)[1]
    assert (f"--fetch {name}" in reader.how_to_obtain) == (reader.hub is not None)


def test_only_what_is_asked_for_is_fetched_and_where_it_is_read(tmp_path, monkeypatch):
    import fnmatch
    import inspect

    import huggingface_hub

    signature, calls = inspect.signature(huggingface_hub.snapshot_download), []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: calls.append(signature.bind(*a, **k).arguments)
    )
    core.fetch_dataset("mcd-rppg", tmp_path / "mcd-rppg")
    (call,) = calls
    assert (call["repo_id"], call["repo_type"], call["local_dir"]) == (
        "kyegorov/mcd_rppg",
        "dataset",
        tmp_path / "mcd-rppg",
    )
    names = ["db.csv", "video/1020_FullHDwebcam_before.avi", "video/1020_USBVideo_before.avi", "ppg/1020.csv"]
    wanted = [
        name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in call["allow_patterns"])
    ]
    assert wanted == names[:2], "the frontal camera's videos and the table"
    with pytest.raises(DatasetError, match="celeba is not at Hugging Face.*\n.*mmlab"):
        core.fetch_dataset("celeba", tmp_path)
    (tmp_path / "SIMULATED.json").write_text("{}")
    with pytest.raises(DatasetError, match="simulated people"):
        core.fetch_dataset("fairface", tmp_path)
    assert len(calls) == 1


def test_a_fetch_that_breaks_off_says_how_to_go_on(tmp_path, monkeypatch):
    import huggingface_hub

    def broken(*args, **kwargs):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(
        DatasetError, match="fairface .*HuggingFaceM4.*reset by peer.*the same command goes on"
    ):
        core.fetch_dataset("fairface", tmp_path)


def test_disk_use(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_bytes(bytes(700))
    (tmp_path / "d").write_bytes(bytes(30))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert core.disk_use(tmp_path / "a") == (1, 700) and core.disk_use(tmp_path / "gone") == (0, 0)
    assert core.disk_use(tmp_path)[0] == 3


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

    from mefem.datasets.core import NOTE
    from mefem.provide import provide_dataset
    from mefem.simulate.run import MARKER, remove_simulated

    root = tmp_path / "bmi"
    assert provide_dataset("bmi", root)["state"] == "absent"  # nothing there: a note, which is no data
    assert [p.name for p in root.iterdir()] == [NOTE]
    images = root / "own" / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (300, 300)).save(images / "a.jpg")
    (root / "own" / "labels.csv").write_text(
        "image,height,weight,bmi,sex,person\na.jpg,170,70,24.2,female,p1\n"
    )
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != NOTE}
    for photographs in (0, 20):  # the publisher's files win over a profile that would simulate
        assert provide_dataset("bmi", root, photographs=photographs)["state"] == "publisher"
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    remove_simulated("bmi", root)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    (root / MARKER).write_text("{}")  # now it counts as simulated: a profile without simulation empties it
    assert provide_dataset("bmi", root)["state"] == "absent"
    assert [p.name for p in root.iterdir()] == [NOTE]
