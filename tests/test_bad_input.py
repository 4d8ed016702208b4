"""Everything the web and other people's files can hold.

Each has a named reason, nothing is lost, the rest is unharmed.
"""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_datasets import QUICK, digest, facecaption_row, make_facecaption, make_fairface, photo
from test_faces import cartoon, saved

from mefem.crop import crop_dataset
from mefem.datasets import bmi, facecaption
from mefem.datasets.core import DatasetError, get_reader
from mefem.faces import (
    CropError,
    FaceDetector,
    ImageError,
    check_square,
    crop_face,
    face_square,
    open_image,
    read_image,
)
from mefem.files import DiskFull, write_atomic
from mefem.shards import (
    SUCCESS,
    ShardError,
    ShardWriter,
    iter_samples,
    load_images,
    open_tar,
    read_labels,
    write_shard,
)

FACE = Image.fromarray(cartoon())  # 512 x 512, BlazeFace finds it


# --- pictures, through the whole stage with the detector ---------------------------------------


def png_of(width, height, size=2000):
    """A PNG of `size` bytes that declares `width` x `height` pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = zlib.compress(bytes(100_000))
    return (head + chunk(b"IDAT", body + bytes(size - len(head) - len(body) - 24)) + chunk(b"IEND", b""))[
        :size
    ]


def jpeg_of(width, height):
    """A JPEG that declares `width` x `height` pixels in its header."""
    data = bytearray(saved(Image.new("RGB", (8, 8)), "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def turned(orientation):
    """The face stored so that EXIF `orientation` brings it upright."""
    exif, T = Image.Exif(), Image.Transpose
    exif[0x0112] = orientation
    back = {
        2: T.FLIP_LEFT_RIGHT,
        3: T.ROTATE_180,
        4: T.FLIP_TOP_BOTTOM,
        5: T.TRANSPOSE,
        6: T.ROTATE_90,
        7: T.TRANSVERSE,
        8: T.ROTATE_270,
    }[orientation]
    return saved(FACE.transpose(back), "JPEG", quality=95, exif=exif)


def two_faces():
    wide = Image.new("RGB", (1024, 512))
    wide.paste(FACE.resize((400, 400)), (0, 0))
    wide.paste(FACE, (512, 0))
    return wide


def painting():
    """Canvas and coarse strokes over the face."""
    strokes = np.asarray(
        FACE.resize((128, 128)).quantize(24).convert("RGB").resize((512, 512), Image.Resampling.NEAREST)
    )
    return Image.fromarray(
        (strokes + np.random.default_rng(0).normal(0, 8, strokes.shape)).clip(0, 255).astype(np.uint8)
    )


def with_alpha():
    image = FACE.convert("RGBA")
    image.putalpha(255)
    return image


JPEG = saved(FACE, "JPEG", quality=95)
NOTHING = Image.new("RGB", (512, 512), (90, 90, 90))
GREY16 = Image.fromarray(np.asarray(FACE.convert("L")).astype(np.uint16) * 257)
PICTURES = {  # what it is -> (the file, the status it must have)
    "good": (JPEG, SUCCESS),
    "zero bytes": (b"", "empty file"),
    "zeros": (bytes(4096), "not an image"),
    "HTML": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "not an image"),
    "truncated": (JPEG[: len(JPEG) // 2], "corrupt image"),
    "last bytes lost": (JPEG[:-200], "corrupt image"),
    "progressive": (saved(FACE, "JPEG", quality=95, progressive=True), SUCCESS),
    "CMYK": (saved(FACE.convert("CMYK"), "JPEG", quality=95), SUCCESS),
    "grey JPEG": (saved(FACE.convert("L"), "JPEG", quality=95), SUCCESS),
    "16-bit PNG": (saved(GREY16), SUCCESS),
    "palette PNG": (saved(FACE.quantize(256)), SUCCESS),
    "animated GIF": (saved(FACE, "GIF", save_all=True, append_images=[NOTHING]), SUCCESS),
    "animated WebP": (saved(FACE, "WEBP", save_all=True, append_images=[NOTHING], quality=95), SUCCESS),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), "unsupported format"),
    "video": (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(500), "unsupported format"),
    "alpha": (saved(with_alpha()), SUCCESS),
    "1 x 1": (saved(Image.new("RGB", (1, 1))), "no face"),
    "1 x 5000": (saved(Image.new("RGB", (1, 5000))), "no face"),
    "huge PNG": (png_of(30_000, 30_000), "too many pixels"),
    "huge JPEG": (jpeg_of(30_000, 30_000), "too many pixels"),
    "two faces": (saved(two_faces(), "JPEG", quality=95), SUCCESS),
    "no face": (saved(NOTHING), "no face"),
    "painting": (saved(painting(), "JPEG", quality=95), SUCCESS),
    **{f"EXIF {number}": (turned(number), SUCCESS) for number in range(2, 9)},
    "good again": (JPEG, SUCCESS),
}


@pytest.fixture(scope="module")
def cropped(tmp_path_factory):
    """All of `PICTURES` as one BMI source, each named .jpg whatever it is, through the crop stage."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("faces")
    (raw / "web/images").mkdir(parents=True)
    lines = [",".join(bmi.REQUIRED)]
    for number, (data, _) in enumerate(PICTURES.values()):
        (raw / f"web/images/{number}.jpg").write_bytes(data)
        lines.append(f"{number}.jpg,170,70,,f,{number}")
    (raw / "web/labels.csv").write_text("\n".join(lines))
    manifest = crop_dataset("bmi", raw, out, jobs=1, progress=False)
    rows = pq.read_table(out / "00000.parquet").to_pylist()
    crops = dict(zip(read_labels(out)["key"], load_images(out), strict=True))
    return manifest, dict(zip(PICTURES, rows, strict=True)), crops


def test_every_picture_is_accounted_for(cropped):
    manifest, rows, crops = cropped
    assert manifest["original"] == len(PICTURES) == manifest["usable"] + sum(manifest["dropped"].values())
    assert manifest["usable"] == len(crops) == sum(status == SUCCESS for _, status in PICTURES.values())


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_all_kinds(cropped, name):
    _, rows, crops = cropped
    row, expected = rows[name], PICTURES[name][1]
    assert row["status"] == expected, row["error_message"]
    if expected != SUCCESS or name == "two faces":
        return
    reference = crops[rows["good"]["key"]].astype(float)
    found = crops[row["key"]].astype(float)
    if name in ("16-bit PNG", "grey JPEG"):
        reference = np.repeat(
            np.asarray(Image.fromarray(reference.astype(np.uint8)).convert("L"))[..., None], 3, 2
        )
    assert np.abs(found - reference).mean() < (16 if name == "painting" else 5), (
        "the same face, upright, in its colours"
    )


@pytest.mark.parametrize(
    "name, detail",
    [
        ("HTML", "an HTML page"),
        ("HEIC", "HEIC"),
        ("video", "a video"),
        ("zeros", "zeros"),
        ("huge PNG", "30000|900000000"),
    ],
)
def test_the_detail_says_what_it_was(cropped, name, detail):
    assert cropped[1][name]["error_message"] and any(
        word in cropped[1][name]["error_message"] for word in detail.split("|")
    )


def test_of_two_faces_the_surer_one_is_taken(cropped):
    _, rows, crops = cropped
    rgb = read_image(PICTURES["two faces"][0])
    surer, other = FaceDetector().detect(rgb)
    found = crops[rows["two faces"]["key"]].astype(int)
    assert surer.score > other.score and abs(surer.box[0] - other.box[0]) > 300, "two faces side by side"
    assert (
        np.abs(found - crop_face(rgb, surer.box)).mean()
        < 3
        < np.abs(found - crop_face(rgb, other.box, min_side=1)).mean()
    )


def test_a_declared_size_costs_no_memory():
    """30,000 x 30,000 pixels would be 2.7 GB; the refusal must come from the header."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (png_of(30_000, 30_000), jpeg_of(30_000, 30_000)):
        assert len(data) <= 2000
        with pytest.raises(ImageError, match="too many pixels"):
            read_image(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on broken TIFF tags
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000"])
def test_damage_never_raises_anything_but_image_error(format):
    data = saved(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)), format
    )
    rng = np.random.default_rng(1)
    outcomes = {"read": 0, "refused": 0}
    for trial in range(120):
        broken = bytearray(data[: len(data) if trial % 2 else rng.integers(1, len(data))])
        for place in rng.integers(0, min(len(broken), 400), 3):
            broken[place] = rng.integers(256)
        try:
            assert read_image(bytes(broken), max_pixels=10**7).dtype == np.uint8
            outcomes["read"] += 1
        except ImageError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 20


# --- boxes -------------------------------------------------------------------------------------

BOXES = {
    "[100, 100, 200, 200]": SUCCESS,
    "[NaN, 100, 200, 200]": "bad box",
    "[100, 100, 200, Infinity]": "bad box",
    "[200, 200, 100, 100]": "bad box",
    "[100, 200, 200, 100]": "bad box",
    "[150, 150, 150, 150]": "bad box",
    "[100, 100, 200]": "bad box",
    "[1, 2, 3, 4, 5]": "bad box",
    "100 100 200 200": "bad box",
    "": "bad box",
    "{}": "bad box",
    "[[1, 2], [3, 4]]": "bad box",
    "[null, 1, 2, 3]": "bad box",
    "[1e400, 0, 1, 1]": "bad box",
    "[0.5e308, 0.5e308, 1.7e308, 1.7e308]": "bad box",
    "[" * 5000: "bad box",
    "[400, 400, 500, 500]": "leaves the picture",
    "[-50, -50, 50, 50]": "leaves the picture",
    "[0, 0, 300, 300]": "leaves the picture",
    "[149, 149, 151, 151]": "too small",
    None: "bad box",
}


def test_boxes_of_all_kinds(tmp_path):
    rows = [facecaption_row(number, box=box) for number, box in enumerate(BOXES)]
    make_facecaption(tmp_path / "raw", rows, [[(row, SUCCESS, photo(0), {}) for row in rows]])
    manifest = crop_dataset("facecaption", tmp_path / "raw", tmp_path / "faces", **QUICK)
    found = pq.read_table(tmp_path / "faces/00000.parquet")["status"].to_pylist()
    assert dict(zip(BOXES, found, strict=True)) == BOXES
    assert manifest["original"] == len(BOXES) and manifest["usable"] == 1


numbers = st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.none(), st.booleans())


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.binary(),
        st.lists(numbers, max_size=5),
        numbers,
        st.lists(numbers, min_size=4, max_size=4).map(json.dumps),
    )
)
def test_fuzz_boxes(text):
    box = facecaption.parse_box(text)
    assert box is None or (
        len(box) == 4 and all(type(value) is float and np.isfinite(value) for value in box)
    )


@settings(max_examples=300, deadline=None)
@given(
    box=st.lists(
        st.one_of(st.floats(), st.floats(-100, 900), st.integers(-(10**400), 10**400)), min_size=4, max_size=4
    ),
    scale=st.floats(0.1, 10),
    width=st.integers(1, 800),
    height=st.integers(1, 800),
    min_side=st.integers(1, 300),
)
def test_fuzz_geometry(box, scale, width, height, min_side):
    """A square that passes is inside the picture, centred on the box and `scale` times as long."""
    try:
        x0, y0, side = check_square(face_square(box, scale), width, height, min_side)
    except CropError as error:
        assert error.reason in ("bad box", "leaves the picture", "too small")
        return
    slack = 1e-6 * max(width, height) + 1e-9
    assert (
        min_side <= side
        and x0 >= -slack
        and y0 >= -slack
        and x0 + side <= width + slack
        and y0 + side <= height + slack
    )
    assert side == pytest.approx(scale * max(box[2] - box[0], box[3] - box[1]))
    assert x0 + side / 2 == pytest.approx((box[0] + box[2]) / 2) and y0 + side / 2 == pytest.approx(
        (box[1] + box[3]) / 2
    )


@settings(max_examples=100, deadline=None)
@given(box=st.tuples(*[st.floats(-20, 120)] * 4), size=st.integers(1, 40))
def test_fuzz_crop(box, size):
    rgb = np.zeros((100, 90, 3), np.uint8)
    try:
        assert crop_face(rgb, box, size=size, min_side=1).shape == (size, size, 3)
    except CropError:
        pass


# --- tars --------------------------------------------------------------------------------------


def member(tar, name, data=b"", kind=tarfile.REGTYPE, target=""):
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.linkname = kind, len(data), target
    tar.addfile(entry, io.BytesIO(data))


REFUSED = {
    "/etc/passwd": "unsafe path",
    "../outside.jpg": "unsafe path",
    "a/../../b.jpg": "unsafe path",
    "sym.jpg": "link",
    "hard.jpg": "link",
    "twice.jpg": "duplicate key",
    "folder.jpg": "no plain file",
    "pipe.jpg": "no plain file",
}


def hostile_tar(path):
    with tarfile.open(path, "w") as tar:
        member(tar, "first.jpg", b"first")
        for name, reason in REFUSED.items():
            if reason == "link":
                member(
                    tar,
                    name,
                    kind=tarfile.SYMTYPE if name.startswith("sym") else tarfile.LNKTYPE,
                    target="first.jpg",
                )
            elif reason == "no plain file":
                member(tar, name, kind=tarfile.DIRTYPE if name.startswith("folder") else tarfile.FIFOTYPE)
            else:
                member(tar, name, name.encode())
        member(tar, "twice.jpg", b"another")
        member(tar, "last.jpg", b"last")


def test_hostile_members_are_refused_and_the_rest_is_read(tmp_path):
    hostile_tar(tmp_path / "t.tar")
    with open_tar(tmp_path / "t.tar") as read:
        assert read("first.jpg") == b"first" and read("last.jpg") == b"last"
        for name, reason in REFUSED.items():
            with pytest.raises(KeyError, match=reason):
                read(name)
    assert [path.name for path in tmp_path.iterdir()] == ["t.tar"], "nothing was unpacked"


def test_a_hostile_download_is_counted(tmp_path):
    """img2dataset's tar with a link, a duplicate name, and a photograph and a json without each other."""
    rows = [facecaption_row(number) for number in range(5)]
    make_facecaption(
        tmp_path / "raw", rows, [[(row, SUCCESS, photo(number), {}) for number, row in enumerate(rows)]]
    )
    with tarfile.open(tmp_path / "raw/images/00000.tar", "w") as tar:
        member(tar, "000000000.jpg", photo(0))  # without its json
        member(tar, "000000001.jpg", kind=tarfile.SYMTYPE, target="000000000.jpg")
        member(tar, "000000002.jpg", photo(2))
        member(tar, "000000002.jpg", photo(3))
        member(tar, "000000003.json", b"{}")  # without its photograph
        member(tar, "000000004.jpg", photo(4))
    manifest = crop_dataset("facecaption", tmp_path / "raw", tmp_path / "faces", **QUICK)
    assert manifest["dropped"] == {"link": 1, "duplicate key": 1, "missing photograph": 1}
    assert read_labels(tmp_path / "faces")["_id"].tolist() == ["id0", "id4"]


@pytest.mark.parametrize("where", [0.0, 0.2, 0.5, 0.8, "header"])
def test_a_tar_cut_or_damaged_in_the_middle_loses_only_what_lies_behind(tmp_path, where):
    rows = [facecaption_row(number) for number in range(6)]
    make_facecaption(
        tmp_path / "raw", rows, [[(row, SUCCESS, photo(number), {}) for number, row in enumerate(rows)]]
    )
    path = tmp_path / "raw/images/00000.tar"
    data = bytearray(path.read_bytes())
    if where == "header":
        start = data.index(b"000000003.jpg")
        data[start : start + 512] = b"\x55" * 512
    with tarfile.open(path) as tar:
        ends = [entry.offset_data + entry.size for entry in tar if entry.name.endswith(".jpg")]
    cut = start if where == "header" else int(len(data) * where)
    path.write_bytes(data if where == "header" else data[:cut])
    whole = sum(end <= cut for end in ends)
    manifest = crop_dataset("facecaption", tmp_path / "raw", tmp_path / "faces", **QUICK)
    assert (manifest["original"], manifest["usable"]) == (6, whole)
    assert manifest["dropped"] == {"damaged shard": 6 - whole}
    assert read_labels(tmp_path / "faces")["_id"].tolist() == [f"id{number}" for number in range(whole)]


@pytest.mark.parametrize(
    "damage, message",
    [
        ("link", "a.jpg is refused: link"),
        ("twice", "a.jpg is refused: duplicate key"),
        ("json", "has no a.json"),
        ("text", "a.json is not JSON"),
        ("header", "is damaged"),
    ],
)
def test_in_finished_crops_damage_stops_with_its_name(tmp_path, damage, message):
    from mefem.shards import write_manifest

    stats = write_shard(
        tmp_path,
        0,
        [("a", photo(0), {}), ("b", photo(1), {})],
        [{"key": key, "status": SUCCESS} for key in "ab"],
    )
    write_manifest(tmp_path, "made", 2, [stats], {"size": 300})
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        member(tar, "a.jpg", *([b"", tarfile.SYMTYPE, "b.jpg"] if damage == "link" else [photo(0)]))
        if damage != "json":
            member(tar, "a.json", b"{" if damage == "text" else b"{}")
        member(tar, "a.jpg" if damage == "twice" else "b.jpg", photo(1))
        member(tar, "b.json", b"{}")
    if damage == "header":
        data = bytearray((tmp_path / "00000.tar").read_bytes())
        data[data.index(b"b.jpg")] ^= 0xFF
        (tmp_path / "00000.tar").write_bytes(data)
    with pytest.raises(ShardError, match=message) as caught:
        list(iter_samples(tmp_path))
    assert "00000.tar" in str(caught.value)


@pytest.mark.parametrize("key", ["", "../a", "/a", "a/../b", "a.b", "a\n", "a\\b", ".", None, 3])
def test_keys_that_would_be_misread_are_not_written(tmp_path, key):
    with pytest.raises(ShardError, match="expected a relative file name"), ShardWriter(tmp_path, 0) as shard:
        shard.add_sample(key, b"", {})
    assert not list(tmp_path.iterdir())


def test_a_key_that_comes_twice_is_not_written(tmp_path):
    with pytest.raises(ShardError, match="'a' is a duplicate"), ShardWriter(tmp_path, 0) as shard:
        shard.add_sample("a", b"1", {})
        shard.add_sample("a", b"2", {})
    assert not list(tmp_path.iterdir())


# --- CSV ---------------------------------------------------------------------------------------

HEADER = "image,height,weight,bmi,sex,person,note\n"
ROW = "1.jpg,180,81,25,male,7,\n"


def read_rows(tmp_path, content):
    path = tmp_path / "labels.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [{name: value for name, value in row.items() if name != bmi.LINE} for row in bmi.read_csv(path)]


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + HEADER + ROW,
        (HEADER + ROW).replace(",", ";"),
        (HEADER + ROW).replace(",", "\t"),
        (HEADER + ROW).replace("\n", "\r\n"),
        HEADER + ROW + "\n\n",
        (HEADER + ROW).rstrip("\n"),
        HEADER.replace(",", ", ") + ROW.replace(",", ", "),
        '"' + HEADER.strip().replace(",", '","') + '"\n' + ROW,
    ],
)
def test_csv_as_spreadsheets_write_it(tmp_path, content):
    (row,) = read_rows(tmp_path, content)
    assert row == dict(
        zip(HEADER.strip().split(","), ["1.jpg", "180", "81", "25", "male", "7", ""], strict=True)
    )


def test_csv_quoted_newlines_keep_the_lines_of_the_file(tmp_path):
    (tmp_path / "raw/own/images").mkdir(parents=True)
    (tmp_path / "raw/own/images/1.jpg").write_bytes(photo(0))
    path = tmp_path / "raw/own/labels.csv"
    path.write_text(
        HEADER + '1.jpg,180,81,25,male,7,"two\nlines, and a comma"\n' + ROW.replace("180", "1.80")
    )
    assert [row[bmi.LINE] for row in bmi.read_csv(path)] == [2, 4]
    with pytest.raises(
        DatasetError, match="labels.csv, line 4: height is 1.80, expected 50 to 272.*in metres"
    ):
        crop_dataset("bmi", tmp_path / "raw", tmp_path / "faces", framing="dataset", **QUICK)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no column 'image'"),
        ("photo,cm\n1.jpg,180\n", "no column 'image', 'height'.* among photo, cm"),
        (HEADER.replace(",sex", "") + ROW, "no column 'sex' among image, height"),
        (HEADER.replace("note", "bmi") + ROW, "column 'bmi' comes twice"),
        (HEADER.replace("note", "source") + ROW, "column 'source': labels cannot be named"),
        (HEADER + ROW + "2.jpg,180,81\n", "line 3: 3 cells, expected 7"),
        (HEADER + ROW.strip() + ",extra,\n", "line 2: 9 cells, expected 7"),
        (
            HEADER + '1.jpg,180,81,25,male,7,"never closed\n' + ROW,
            "cannot be read as CSV: unexpected end of data.*after line 1",
        ),
        ((HEADER + ROW).encode() + b"M\xfcller.jpg,180,81,25,male,8,\n", "line 3: byte 0xfc is not UTF-8"),
        ((HEADER + ROW).encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    ],
)
def test_csv_that_would_be_misread_is_refused_by_line(tmp_path, content, message):
    with pytest.raises(DatasetError, match=message) as caught:
        read_rows(tmp_path, content)
    assert "labels.csv" in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda text: (HEADER + text).encode("utf-8", "replace")),
    )
)
def test_fuzz_csv(tmp_path_factory, content):
    """Any bytes are rows of the header's width, or a DatasetError."""
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    path.write_bytes(content)
    try:
        rows = bmi.read_csv(path)
    except DatasetError as error:
        assert "fuzz.csv" in str(error)
        return
    assert all(
        set(bmi.REQUIRED) <= set(row) and all(type(row[name]) is str for name in row if name != bmi.LINE)
        for row in rows
    )


LISTS = {  # data set -> (its list, how it begins)
    "folder": ("labels.csv", "image,person,age\n"),
    "avspeech": ("avspeech_train.csv", "AAAAAAAAAAA,1,3,0.5,0.5\n"),
    "mcd-rppg": (
        "db.csv",
        "patient_id,sex,weight,height,bmi,age,upper_ap,lower_ap,saturation,hemoglobin,glycated_hemoglobin,"
        "cholesterol,step,camera,video\n7,f,60,160,,30,,,,,,,before,x,7.avi\n",
    ),
    "fairface": (
        "fairface_label_train.csv",
        "file,age,gender,race,service_test\ntrain/1.jpg,3-9,Male,Black,True\n",
    ),
    "celeba": (
        "list_attr_celeba.txt",
        "1\n" + " ".join(f"A{k}" for k in range(40)) + "\n000001.jpg" + " -1" * 40 + "\n",
    ),
}


@pytest.mark.parametrize("name", LISTS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(max_size=120), st.text(max_size=120).map(lambda text: text.encode("utf-8", "replace"))
    ),
    keep=st.booleans(),
)
def test_fuzz_lists_of_all_publishers(tmp_path, name, data, keep):
    """Any bytes in the place of a publisher's list, or behind its beginning.

    Rows, or a DatasetError that names the file.
    """
    file, head = LISTS[name]
    for folder in ("clips", "video", "images", "1.25/train", "img_celeba"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "fairface_label_val.csv").write_text("file,age,gender,race\n")
    for other in ("identity_CelebA.txt", "list_eval_partition.txt"):
        (tmp_path / other).write_text("000001.jpg 1\n")
    (tmp_path / file).write_bytes(head.encode() * keep + data)
    reader = get_reader(name)
    try:
        rows = [photo for unit in reader.units(tmp_path) for photo in reader.read(tmp_path, unit)]
    except DatasetError as error:
        assert tmp_path.name in str(error) and any(
            word in str(error) for word in (file, "identity", "partition")
        )
    else:
        assert len(rows) == reader.original(tmp_path) and len({row.key for row in rows}) == len(rows)


@settings(max_examples=100, deadline=None)
@given(
    table=st.lists(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8).map(str.lstrip),
            min_size=7,
            max_size=7,
        ),
        max_size=5,
    )
)
def test_fuzz_csv_round_trip(tmp_path_factory, table):
    """What Python's own writer puts down comes back cell by cell."""
    import csv

    path = tmp_path_factory.getbasetemp() / "round.csv"
    with path.open("w", newline="", encoding="utf-8") as f:
        f.write(HEADER)
        csv.writer(f, quoting=csv.QUOTE_ALL).writerows(table)
    names = HEADER.strip().split(",")
    assert [[row[name] for name in names] for row in bmi.read_csv(path)] == table


# --- parquet -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda table: table.set_column(
                table.schema.get_field_index("_id"), "_id", pa.array(range(len(table)))
            ),
            "column '_id' is int64, expected text",
        ),
        (
            lambda table: table.set_column(
                table.schema.get_field_index("url"), "url", pa.array([["x"]] * len(table))
            ),
            "column 'url' is list<.*>, expected text",
        ),
        (
            lambda table: table.rename_columns(
                ["id" if name == "_id" else name for name in table.column_names]
            ),
            "no column '_id' among",
        ),
    ],
)
@pytest.mark.parametrize("file", ["FaceCaption-15M.parquet", "images/00000.parquet"])
def test_facecaption_of_another_schema(tmp_path, change, message, file):
    rows = [facecaption_row(number) for number in range(3)]
    make_facecaption(tmp_path / "raw", rows, [[(row, SUCCESS, photo(0), {}) for row in rows[:2]]])
    path = tmp_path / "raw" / file
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(DatasetError, match=message) as caught:
        crop_dataset("facecaption", tmp_path / "raw", tmp_path / "faces", **QUICK)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    "column, values, message",
    [
        ("image", [b"x"] * 7, "column 'image' is binary, expected a struct with 'bytes'"),
        ("age", ["3-9"] * 7, "column 'age' is string, expected whole numbers"),
    ],
)
def test_fairface_of_another_schema(tmp_path, column, values, message):
    make_fairface(tmp_path / "raw/1.25")
    path = tmp_path / "raw/1.25/train-00000-of-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, pa.array(values)), path)
    with pytest.raises(DatasetError, match=f"train-00000-of-00001.parquet: {message}"):
        crop_dataset("fairface", tmp_path / "raw", tmp_path / "faces", framing="dataset", **QUICK)


# --- a full disk, and kills --------------------------------------------------------------------


@pytest.fixture
def captions(tmp_path):
    rows = [facecaption_row(number) for number in range(7)]
    shards = [
        [(row, SUCCESS, photo(number), {}) for number, row in enumerate(rows[start : start + 2])]
        for start in (0, 2, 4)
    ]
    make_facecaption(tmp_path / "raw", rows, shards)
    crop_dataset("facecaption", tmp_path / "raw", tmp_path / "straight", **QUICK)
    return tmp_path / "raw"


def test_a_full_disk_leaves_nothing_half_written(captions, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # bytes a file may have; a tar needs 10,240
    try:
        with pytest.raises(DiskFull, match="00000.tar"):
            crop_dataset("facecaption", captions, tmp_path / "faces", **QUICK)
        with pytest.raises(DiskFull, match="large"):
            write_atomic(tmp_path / "large", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "faces").iterdir()) and not (tmp_path / "large").exists()
    crop_dataset("facecaption", captions, tmp_path / "faces", **QUICK)
    assert digest(tmp_path / "faces") == digest(tmp_path / "straight")


@pytest.mark.parametrize("nth", range(1, 13))
def test_a_disk_that_fills_up_at_any_file(captions, tmp_path, monkeypatch, nth):
    """The n-th file cannot be synced; all before it stay, and the next run ends with the same bytes."""
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == nth:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "faces"
    with pytest.raises(DiskFull):
        crop_dataset("facecaption", captions, out, **QUICK)
    assert len(list(out.iterdir())) == nth - 1 and not (out / "manifest.json").exists()
    monkeypatch.setattr(os, "fsync", real)
    crop_dataset("facecaption", captions, out, **QUICK)
    assert digest(out) == digest(tmp_path / "straight")


KILLER = """
import os, signal, sys
{imports}
after, nth = {after}, 0
while True:  # one child for each file that the stage renames into place; this process stays without threads
    nth += 1
    out = {out!r} + str(nth)
    child = os.fork()
    if child == 0:
        real, calls = os.replace, []
        def replace(*args):
            calls.append(args)
            if after or len(calls) < nth:
                real(*args)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = replace
        {work}
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
"""


def kill_everywhere(imports, work, out, after=False) -> int:
    """Run `work` into `out`1, 2, ..., killed (signal 9) at its n-th file; the number of files it had."""
    code = KILLER.format(imports=imports, work=work, out=str(out), after=after)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    return len(list(out.parent.glob(f"{out.name}[0-9]*"))) - 1


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_file_of_the_crop_stage(captions, tmp_path, after):
    files = kill_everywhere(
        "from mefem.crop import crop_dataset",
        f"crop_dataset('facecaption', {str(captions)!r}, out, **{QUICK!r})",
        tmp_path / "faces",
        after,
    )
    assert files == len(list((tmp_path / "straight").iterdir())) == 13, (
        "each file of the stage was a place to die"
    )
    for nth in range(1, files + 1):
        crop_dataset("facecaption", captions, tmp_path / f"faces{nth}", **QUICK)
        assert digest(tmp_path / f"faces{nth}") == digest(tmp_path / "straight"), f"killed at file {nth}"


FAKE_PEOPLE = """
import pickle, sys, types
import mefem.simulate.publishers as P, mefem.simulate.run as S
sys.modules["mefem.simulate.render"] = types.SimpleNamespace(load_bust=lambda: None)
S.UNIT, P._describe, P.celeba_attributes = 2, lambda row: "a face", lambda row, rng: [1] * 40
P.make_unit = lambda *args, **kwargs: pickle.load(open({people!r}, "rb"))
"""


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Two people and their photographs in place of what `make_unit` renders: here only the files count."""
    import pickle
    from types import SimpleNamespace

    import pandas as pd

    body = {
        "height_cm": 170.0,
        "weight_kg": 70.0,
        "bmi": 24.2,
        "age": 40.0,
        "race": 0,
        "haemoglobin": 9.0,
        "saturation": 98.0,
        "systolic": 120.0,
        "diastolic": 80.0,
        "glycated_haemoglobin": 5.0,
        "cholesterol": 5.0,
    }
    rows = pd.DataFrame([{**body, "person": number, "female": number} for number in range(2)])
    shots = [SimpleNamespace(jpeg=photo(number, 256), box=(80.0, 80.0, 180.0, 180.0)) for number in range(2)]
    path = tmp_path_factory.mktemp("people") / "unit.pickle"
    path.write_bytes(pickle.dumps((rows, shots)))
    return str(path)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["facecaption", "avspeech", "sfhq", "celeba", "fairface", "mcd-rppg", "bmi"])
def test_a_kill_at_any_file_of_the_simulator(people, tmp_path, name, after):
    """Killed before or after any file that it renames into place, the second run ends with the same bytes."""
    head = FAKE_PEOPLE.format(people=people)
    work = "S.simulate_dataset({name!r}, {out}, photographs=4, seed=1, size=256, jobs=1, progress=False)"
    files = kill_everywhere(head, work.format(name=name, out="out"), tmp_path / "raw", after)
    assert files >= 6
    again = [work.format(name=name, out=repr(str(tmp_path / f"raw{nth}"))) for nth in range(1, files + 2)]
    subprocess.run([sys.executable, "-c", "\n".join([head, *again])], check=True, timeout=120)

    def found(nth):
        return {
            str(path.relative_to(tmp_path / f"raw{nth}")): path.read_bytes()
            for path in (tmp_path / f"raw{nth}").rglob("*")
            if path.is_file()
        }

    straight = found(files + 1)  # the child that nothing killed
    assert straight and not [path for path in straight if ".simulating" in path]
    for nth in range(1, files + 1):
        assert found(nth) == straight, f"killed at file {nth}"


def test_reader_of_an_image_that_is_a_folder(tmp_path):
    (tmp_path / "own/images/1.jpg").mkdir(parents=True)
    (tmp_path / "own/labels.csv").write_text(HEADER + ROW)
    photos = [
        found
        for unit in get_reader("bmi").units(tmp_path)
        for found in get_reader("bmi").read(tmp_path, unit)
    ]
    assert [found.problem for found in photos] == ["missing photograph"]
    with pytest.raises(ImageError, match="unreadable file"):
        open_image(tmp_path / "own/images/1.jpg")


def same_after_a_kill(imports, work, folder, after) -> int:
    """Kill `work` (a call with `out`) at each of its files, run it again.

    Every folder then has the files of one that nothing killed.

    The hidden file that the killed process was writing may still lie there; nothing reads it."""
    files = kill_everywhere(imports, work, folder, after)
    again = "\n".join(f"out = {f'{folder}{nth}'!r}\n{work}" for nth in range(1, files + 2))
    subprocess.run([sys.executable, "-c", f"{imports}\n{again}"], check=True, timeout=200)

    def found(nth):
        return {
            path.name: path.read_bytes() for path in Path(f"{folder}{nth}").rglob("[!.]*") if path.is_file()
        }

    straight = found(files + 1)
    for nth in range(1, files + 1):
        assert found(nth) == straight, f"killed at file {nth}"
    return files


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_file_of_the_features(captions, tmp_path, after):
    from mefem.models import create_encoder, save_encoder

    kwargs = dict(img_size=112, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    encoder = save_encoder(
        tmp_path / "e.safetensors", create_encoder(**kwargs), "vit_small_patch16_224", kwargs
    )
    work = (
        f"features_of({str(encoder)!r}, [{str(tmp_path / 'straight')!r}], out, device='cpu', progress=False)"
    )
    assert (
        same_after_a_kill("from mefem.features import features_of", work, tmp_path / "features", after) == 3
    )


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_file_of_the_probes(tmp_path, after):
    rng, n = np.random.default_rng(0), 48
    labels = pd.DataFrame(
        {
            "key": np.arange(n).astype(str),
            "person": (np.arange(n) // 2).astype(str),
            "bmi": rng.standard_normal(n),
        }
    )
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "bmi.npy", rng.standard_normal((n, 5, 8)).astype(np.float16))
    labels.to_parquet(tmp_path / "a" / "bmi.parquet")
    about = {
        "state": "present",
        "n": n,
        "has_cls": True,
        "tokens": 5,
        "heads": 2,
        "encoder": "a",
        "encoder_hash": "a" * 12,
        "faces_hash": "f" * 12,
    }
    (tmp_path / "a" / "bmi.json").write_text(json.dumps(about))
    work = (
        f"evaluate_encoder({str(tmp_path / 'a')!r}, out, ('bmi',), ('cls', 'patches'), folds=2, epochs=2, "
        "lrs=(1e-2,), weight_decays=(0.1,), "
        "validation=0.2, bootstrap=100, hidden=4, progress=False)"
    )
    assert (
        same_after_a_kill("from mefem.evaluation import evaluate_encoder", work, tmp_path / "results", after)
        == 4
    )
