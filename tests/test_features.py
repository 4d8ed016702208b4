"""Embeddings in memory, in scikit-learn and on disk."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageColor
from test_faces import DISGUISES, cartoon

from mefem import crop as crop_stage
from mefem import embedding
from mefem import features as module
from mefem.embedder import FaceEmbedder
from mefem.embedding import embed
from mefem.encoders import PixelEncoder, freeze
from mefem.faces import CropError, FaceDetector
from mefem.features import (
    decode_ahead,
    extract_features,
    features_of,
    load_features,
    select_tokens,
    to_half,
)
from mefem.files import write_json
from mefem.made_from import code_hash
from mefem.models import IMAGENET_MEAN, IMAGENET_STD, create_encoder, save_encoder
from mefem.shards import ShardError, load_images, write_absent, write_manifest, write_shard


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    model = create_encoder(
        "vit_small_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3
    )
    return freeze("small", model, IMAGENET_MEAN, IMAGENET_STD, device="cpu")


CROPS = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)


def jpeg(rgb):
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "JPEG", quality=95)
    return out.getvalue()


def make_faces(folder, count=7, dataset="bmi"):
    keys = [f"{i:09d}" for i in range(count)]
    half = count // 2
    stats = [
        write_shard(
            folder,
            i,
            [(k, jpeg(CROPS[int(k)]), {}) for k in part],
            [
                {"key": k, "person": k, "bmi": 20.0 + int(k), "status": "success", "error_message": None}
                for k in part
            ],
        )
        for i, part in enumerate((keys[:half], keys[half:]))
    ]
    write_manifest(folder, dataset, count, stats, {"size": 32}, simulated=True)
    return folder


def test_select_tokens():
    tokens = np.arange(2 * 5 * 3).reshape(2, 5, 3)
    assert np.shares_memory(select_tokens(tokens, "patches", True), tokens)
    assert (select_tokens(tokens, "patches", True) == tokens[:, 1:]).all()
    for feature_set, has_cls, data, words in (
        ("mean", True, tokens, "patches"),
        ("cls", False, tokens, "no CLS"),
        ("patches+cls", False, tokens, "no CLS"),
        ("patches", True, tokens[:, :1], "one vector"),
    ):
        with pytest.raises(ValueError, match=words):
            select_tokens(data, feature_set, has_cls)


def test_one_mean_patch_token_for_features_probes_and_pictures():
    from mefem.models import mean_patch_token
    from mefem.pictures import mean_embedding
    from mefem.probing import mean_token

    tokens = np.random.default_rng(0).standard_normal((6, 10, 4)).astype(np.float32)
    tokens[:, 0] = 100  # CLS, which is not a patch
    mean = mean_patch_token(tokens, has_cls=True)
    np.testing.assert_allclose(mean, tokens[:, 1:].astype(float).mean(1), atol=1e-6)
    assert np.array_equal(module.pool_tokens(tokens, "mean", True), mean)
    assert np.array_equal(mean_patch_token(tokens[:, :1], has_cls=True), tokens[:, 0]), "one vector is itself"
    np.testing.assert_array_equal(mean_embedding(tokens[:, 1:]), mean - mean.mean(0))
    assert np.allclose(mean_token(torch.from_numpy(tokens[:, 1:])), mean, atol=1e-6)


def test_embed_takes_what_is_at_hand(encoder, tmp_path):
    Image.fromarray(CROPS[0]).save(tmp_path / "a.png")
    whole = embed(CROPS, encoder, "patches+cls", batch=3)
    assert whole.shape == (7, 17, 24) and whole.dtype == np.float32
    assert np.allclose(whole, encoder.tokens_of(CROPS), atol=1e-5)
    for one in (CROPS[0], Image.fromarray(CROPS[0]), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.allclose(embed([one], encoder, "cls")[0], whole[0, 0], atol=1e-5)
    mixed = embed([CROPS[0], CROPS[1].repeat(2, 0).repeat(2, 1)], encoder, "cls")
    assert np.allclose(mixed[0], whole[0, 0], atol=1e-5) and mixed.shape == (2, 24)
    with pytest.raises(ValueError, match="no pictures"):
        embed([], encoder)


@pytest.mark.parametrize("name", DISGUISES)
def test_an_opened_picture_gives_the_embedding_of_its_file(encoder, tmp_path, name):
    with Image.open(io.BytesIO(DISGUISES[name])) as image:
        square = [0, 0, 24, 24]
        image.crop(square).save(
            tmp_path / "photo",
            image.format,
            **{k: image.info[k] for k in ("exif", "transparency") if k in image.info},
        )
    path = tmp_path / "photo"
    by_path, opened = embed([path], encoder, "patches+cls"), embed([Image.open(path)], encoder, "patches+cls")
    assert np.array_equal(by_path, opened)
    transformer = FaceEmbedder(encoder, framing="as-is").fit(None)
    assert np.array_equal(transformer.transform([Image.open(path)]), transformer.transform([str(path)]))


def test_the_picture_that_is_not_square_is_named(encoder, tmp_path):
    Image.fromarray(CROPS[1][:20]).save(tmp_path / "wide.png")
    for wide, name in (
        (CROPS[1][:20], "picture 4 "),
        (tmp_path / "wide.png", "wide.png"),
        (Image.open(tmp_path / "wide.png"), "wide.png"),
        (Image.fromarray(CROPS[1][:20]), "picture 4 "),
    ):
        pictures = [*CROPS[:4], wide, *CROPS[5:]]
        with pytest.raises(CropError, match=f"{name}.*not square.*32 x 20 pixels"):
            embed(pictures, encoder, batch=3)
        transformer = FaceEmbedder(encoder, framing="as-is", batch=3).fit(None)
        with pytest.raises(CropError, match=f"{name}.*not square"):
            transformer.transform(pictures)
        rows = transformer.set_params(on_error="nan").transform(pictures)
        assert np.isnan(rows).any(1).tolist() == [False] * 4 + [True] + [False] * 2
    with pytest.raises(ValueError, match="picture 2 .*float64"):
        embed([CROPS[0], CROPS[1], CROPS[2] / 255], encoder)


# --- folders of photographs
# ------------------------------------------------------------------------------------------

COLOURS = {
    "a/b.jpg": "red",
    "a__b.jpg": "green",
    "x.jpg": "blue",
    "x.jpg.webp": "yellow",
    "Anna.png": "white",
    "anna.jpg": "black",
    "plain.png": "grey",
    "a/._b.jpg": "pink",
    ".thumbs/x.jpg": "pink",
}
SEEN = [name for name in COLOURS if "/." not in name and name[0] != "."]


def save_face(path, colour):
    """A face in a frame of that colour, by which its crop is known."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (700, 700), colour)
    image.paste(Image.fromarray(cartoon()).crop((140, 100, 372, 402)), (234, 194))
    image.save(path, **({"lossless": True} if path.suffix == ".webp" else {}))


@pytest.fixture
def photos(tmp_path):
    for name, colour in COLOURS.items():
        save_face(tmp_path / "photos" / name, colour)
    return tmp_path / "photos"


def crop_all(photos, out, **options):
    """Counts, and the list of crops by the photographs' names."""
    counts = crop_stage.crop_photographs(photos, out, size=64, jobs=1, progress=False, **options)
    table = pd.read_csv(out / "crops.csv", dtype=str, keep_default_na=False)
    return counts, {Path(row.file).relative_to(photos).as_posix(): row for row in table.itertuples()}


def colour_of(crop):
    """The colour of the crop's corner."""
    corner = tuple(np.asarray(Image.open(crop))[0, 0].astype(int))
    return min(
        set(COLOURS.values()),
        key=lambda name: sum(abs(a - b) for a, b in zip(ImageColor.getrgb(name), corner, strict=True)),
    )


@pytest.mark.parametrize("inside", [False, True])
def test_each_photograph_has_its_own_crop(photos, tmp_path, inside):
    out = photos / "the crops" if inside else tmp_path / "crops"
    counts, rows = crop_all(photos, out)
    assert counts == {"usable": 7} and sorted(rows) == sorted(SEEN)
    assert {name: colour_of(out / row.crop) for name, row in rows.items()} == {
        name: COLOURS[name] for name in SEEN
    }
    assert len({row.crop.lower() for row in rows.values()}) == 7 and rows["plain.png"].crop == "plain.jpg"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert crop_all(photos, out) == (counts, rows), "a second run crops no crop"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.relative_to(photos).as_posix() for path in crop_stage.photographs_in(photos)] == sorted(SEEN)


def test_a_photograph_that_is_gone_takes_its_crop_along(photos, tmp_path, encoder):
    out = tmp_path / "crops"
    _, before = crop_all(photos, out)
    Image.new("RGB", (700, 700)).save(out / "mine.png")
    (photos / "plain.png").unlink()
    Image.new("RGB", (700, 700)).save(photos / "a/b.jpg")  # and one that shows no face any more
    counts, rows = crop_all(photos, out)
    assert counts == {"usable": 5, "no face": 1} and rows["a/b.jpg"].crop == ""
    assert {path.name for path in out.iterdir()} == {
        ".photographs",
        "crops.csv",
        "mine.png",
        *(row.crop for row in rows.values() if row.crop),
    }
    assert {"plain.jpg", before["a/b.jpg"].crop}.isdisjoint(path.name for path in out.iterdir())
    table = embedding.embed_photographs(out, encoder, tmp_path / "e.parquet", framing="as-is", progress=False)
    assert len(table) == 6 and (table.status == "success").all()


def test_a_run_that_was_stopped_is_taken_up(photos, tmp_path, monkeypatch):
    out, real = tmp_path / "crops", crop_stage._crop_file
    monkeypatch.setattr(
        crop_stage,
        "_crop_file",
        lambda path, *rest: 1 / 0 if path.name == "plain.png" else real(path, *rest),
    )
    with pytest.raises(ZeroDivisionError):
        crop_all(photos, out)
    monkeypatch.undo()
    assert "unfinished" in (out / "crops.csv").read_text() and list(out.glob("*.jpg"))
    assert crop_all(photos, out)[0] == {"usable": 7}


def test_crops_never_take_the_place_of_anything_else(photos, tmp_path):
    def refused(source, out, words):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=words):
            crop_stage.crop_photographs(source, out, jobs=1, progress=False)
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    refused(photos, photos, "is the folder of the photographs")
    refused(photos / "x.jpg", photos, "is the folder of the photographs")
    refused(photos, photos / "x.jpg", "is a file")
    save_face(tmp_path / "album/plain.jpg", "red")
    refused(photos, tmp_path / "album", "album/plain.jpg is in the way")
    crop_all(photos, tmp_path / "crops")
    refused(tmp_path / "album", tmp_path / "crops", "holds crops of the photographs in .*photos")
    (tmp_path / "crops" / ".photographs").unlink()  # as 0.1.0 left it
    refused(tmp_path / "album", tmp_path / "crops", "holds crops of other photographs, such as .*photos/")
    (tmp_path / "field").mkdir()
    (tmp_path / "field/crops.csv").write_text("field,crop\n7,wheat\n")
    refused(photos, tmp_path / "field", "field/crops.csv is no list of crops")


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Photographs of which each is for another framing."""
    folder, face = tmp_path_factory.mktemp("frames"), Image.fromarray(cartoon())
    face.save(folder / "portrait.png")
    face.crop((0, 120, 512, 512)).save(folder / "low.png")
    face.crop((150, 130, 362, 380)).resize((100, 100)).save(folder / "tight.png")
    face.crop((150, 130, 362, 380)).save(folder / "upright.png")
    Image.new("RGB", (300, 300), "grey").save(folder / "grey.png")
    (folder / "page.jpg").write_bytes(b"<html>")
    return folder


FRAMED = {  # framing -> what it does with each photograph of `frames`
    "paper": {"portrait.png": "paper"},
    "shift": {"portrait.png": "paper", "low.png": "shift"},
    "pad": {"portrait.png": "paper", "low.png": "pad", "tight.png": "pad", "upright.png": "pad"},
    "as-is": {"portrait.png": "as-is", "tight.png": "as-is", "grey.png": "as-is"},
    "auto": {"portrait.png": "paper", "low.png": "shift", "tight.png": "as-is", "upright.png": "pad"},
}


@pytest.mark.parametrize("framing", FRAMED)
def test_crop_and_embed_agree_on_a_folder(frames, encoder, tmp_path, framing):
    counts = crop_stage.crop_photographs(
        frames, tmp_path / "crops", size=64, framing=framing, jobs=1, progress=False
    )
    crops = pd.read_csv(tmp_path / "crops/crops.csv", dtype=str, keep_default_na=False)
    table = embedding.embed_photographs(
        frames, encoder, tmp_path / "e.parquet", framing=framing, progress=False
    )
    assert [Path(name).name for name in crops.file] == table.file.tolist() and counts["usable"] == len(
        FRAMED[framing]
    )
    for column in ("status", "framing", "reason", "other_framings"):
        assert crops[column].tolist() == table[column].tolist(), column
    assert {row.file: row.framing for row in table.itertuples() if row.status == "success"} == FRAMED[framing]
    for row in table[table.status != "success"].itertuples():
        assert row.reason and not row.framing, "a refusal names a remedy"
        would = [other for other in FRAMED if other != framing and row.file in FRAMED[other]]
        assert (
            framing == "as-is"
            or row.other_framings.split() == would
            and all(other in row.reason for other in would)
        )
    how = {"framing": framing, "min_side": 150, "progress": False}
    few = crop_stage.crop_photographs(frames, tmp_path / "few", size=64, jobs=1, **how)
    again = embedding.embed_photographs(frames, encoder, tmp_path / "e.parquet", **how)
    small = "tight.png" in FRAMED[framing] and framing != "pad"
    assert few["usable"] == (again.status == "success").sum() == counts["usable"] - small


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """Photographs with a face too small for the first look, with a doubtful one, and with none."""
    folder = tmp_path_factory.mktemp("streets")
    street = Image.new("RGB", (1600, 1000), (150, 170, 190))
    street.save(folder / "empty.png")
    for corner, side in (((200, 300), 180), ((1100, 500), 220)):
        street.paste(Image.fromarray(cartoon()).resize((side, side)), corner)
    street.save(folder / "far.png")
    Image.fromarray(cartoon()).save(folder / "near.png")
    return folder


def test_crop_and_embed_agree_on_small_and_doubtful_faces_and_by_default(streets, frames, encoder, tmp_path):
    for number, (folder, options, usable) in enumerate(
        (
            (frames, {}, 4),
            (streets, {}, 1),
            (streets, {"small_faces": True}, 2),
            (streets, {"small_faces": True, "face": "largest"}, 2),
            (streets, {"min_score": 0.999}, 0),
        )
    ):
        out = tmp_path / str(number)
        counts = crop_stage.crop_photographs(folder, out, size=64, jobs=1, progress=False, **options)
        crops = pd.read_csv(out / "crops.csv", dtype=str, keep_default_na=False)
        table = embedding.embed_photographs(folder, encoder, out / "e.npz", progress=False, **options)
        assert counts["usable"] == (table.status == "success").sum() == usable
        for column in ("status", "framing", "reason", "other_framings"):
            assert crops[column].tolist() == table[column].tolist(), column
        if options.get("small_faces"):
            assert table.faces.tolist() == [0, 2, 1] and table.status[0] == "no face"
            x0, y0, x1, y1 = table.loc[1, ["x0", "y0", "x1", "y1"]]
            assert 1100 < x0 < x1 < 1320 and 500 < y0 < y1 < 720 or "face" not in options
    assert table.status.tolist() == ["no face", "no face", "low score"]
    assert table.faces.tolist() == [0, 0, 0] and 0.5 < table.score[2] < 0.999 and table.x0[2] > 0
    assert "at least 0.999 is asked for; --min-score 0." in table.reason[2]
    said = crop_stage.nothing_usable("streets", "auto", table)
    assert said.endswith("as-is 1; 1 have a face that a lower --min-score finds")


def test_embeddings_of_an_as_is_picture_do_not_depend_on_its_neighbours(encoder, tmp_path):
    """Pictures of equal and of different sizes go the same way to the encoder's size."""
    (tmp_path / "p").mkdir()
    for i in range(3):
        Image.fromarray(CROPS[i]).resize((90, 90)).save(tmp_path / f"p/{i}.png")

    def embedded():
        embedding.embed_photographs(
            tmp_path / "p", encoder, tmp_path / "e.parquet", framing="as-is", progress=False
        )
        return read_table(tmp_path / "e.parquet")[2]

    alone = embedded()
    Image.fromarray(CROPS[3]).resize((70, 70)).save(tmp_path / "p/3.png")
    assert np.allclose(alone, embedded()[:3], atol=1e-5)


def test_names_that_are_no_text(tmp_path, encoder):
    """A name from an old archive, in Latin-1."""
    odd = os.path.join(os.fsencode(tmp_path), b"ren\xe9.png")
    save_face(tmp_path / "a.png", "red")
    os.rename(tmp_path / "a.png", odd)
    counts = crop_stage.crop_photographs(tmp_path, tmp_path / "crops", size=64, jobs=1, progress=False)
    assert counts == {"usable": 1} and r"ren\xe9.png" in (tmp_path / "crops/crops.csv").read_text()
    table = embedding.embed_photographs(tmp_path, encoder, tmp_path / "e.parquet", progress=False)
    assert table.file.tolist() == [r"ren\xe9.png"]


# --- tables of embeddings
# --------------------------------------------------------------------------------------------


def read_table(path):
    """(files, status, embeddings float32) of a table, as somebody else would read it."""
    if path.suffix == ".npz":
        with np.load(path) as found:
            return found["file"].tolist(), found["status"].tolist(), found["embedding"]
    if path.suffix == ".csv":
        table = pd.read_csv(path, dtype={"file": str})
        return table.file.tolist(), table.status.tolist(), table.filter(regex=r"^e\d+$").to_numpy(np.float32)
    table = pd.read_parquet(path)
    width = max(len(vector) for vector in table.embedding if vector is not None)
    return (
        table.file.tolist(),
        table.status.tolist(),
        np.stack([np.full(width, np.nan) if v is None else v for v in table.embedding]),
    )


@pytest.mark.parametrize("name", ["e.parquet", "e.csv", "E.NPZ"])
@pytest.mark.parametrize("features", ["mean", "patches"])
def test_tables_are_written_as_their_ending_says(encoder, tmp_path, name, features):
    for i in range(3):
        (tmp_path / "crops").mkdir(exist_ok=True)
        Image.fromarray(CROPS[i]).save(tmp_path / f"crops/00{i}.png")
    Image.fromarray(CROPS[3][:20]).save(tmp_path / "crops/wide.png")
    (tmp_path / "crops/page.jpg").write_bytes(b"<html>")
    for _ in range(2):  # the second time over a table of ours
        out = tmp_path / name
        embedding.embed_photographs(
            tmp_path / "crops", encoder, out, features, framing="as-is", batch=2, progress=False
        )
    path = (tmp_path / name).rename(tmp_path / name.lower())
    files, status, vectors = read_table(path)
    assert files == ["000.png", "001.png", "002.png", "page.jpg", "wide.png"]
    assert status == ["success"] * 3 + ["not an image", "not square"], (
        "one picture that is not square is a row like any other"
    )
    assert np.array_equal(
        vectors[:3], embed(CROPS[:3], encoder, features).reshape(3, -1), equal_nan=True
    ) or np.allclose(vectors[:3], embed(CROPS[:3], encoder, features).reshape(3, -1), atol=1e-5)
    assert np.isnan(vectors[3:].astype(float)).all()


def test_every_ending_keeps_every_bit_over_all_parts(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((20, 7)).astype(np.float32) * np.float32(
        10.0
    ) ** np.arange(-9, 11)[:, None].astype(np.float32)
    kinds = {"string": "a", "float64": 0.1, "int64": 7}
    row = {name: kinds[kind] for name, kind in embedding._TYPES.items()}
    parts = [tmp_path / "0", tmp_path / "1"]
    for part, own in zip(parts, (vectors[:13], vectors[13:]), strict=True):
        rows = [{**row, "embedding": vector} for vector in own]
        embedding._write_part(part, [*rows, {**row, "score": None, "embedding": None}])
    for name, write in embedding._WRITERS.items():
        write(parts, tmp_path / f"t{name}", 7)
        found = read_table(tmp_path / f"t{name}")[2].astype(np.float32)
        assert np.array_equal(np.delete(found, [13, 21], 0), vectors) and np.isnan(found[[13, 21]]).all(), (
            name
        )
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 2


# --- a run that is killed
# --------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import pyarrow.parquet as pq
import torch
from mefem import crop as crop_stage, embedding

moment, source, encoder, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # as the test that compares: a last bit may depend on them
calls = []

def at(count, real, before=lambda *_: None):
    def call(*arguments, **options):
        calls.append(real)
        if len(calls) == count:
            before(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call

embedding._PART_ROWS = 4
if moment == "reading":
    crop_stage.frame_faces = at(9, crop_stage.frame_faces)  # four are read ahead of the second part
elif moment == "writing":
    pq.write_table = at(2, pq.write_table, lambda table, path: path.write_bytes(b"half a part"))
elif moment == "joining":
    ending = os.path.splitext(out)[1]
    half = lambda parts, path, _: path.write_bytes(b"half a table")
    embedding._WRITERS[ending] = at(1, embedding._WRITERS[ending], half)
else:
    embedding.shutil.rmtree = at(1, embedding.shutil.rmtree)
embedding.embed_photographs(source, encoder, out, framing="as-is", batch=2, device="cpu", progress=False)
"""


@pytest.fixture
def ten(tmp_path):
    """Ten pictures, and an encoder in a file."""
    (tmp_path / "p").mkdir()
    for i in range(10):
        Image.fromarray(CROPS[i % 7] // (i + 1)).save(tmp_path / f"p/{i}.png")
    (tmp_path / "p/3.png").write_bytes(b"no picture")
    kwargs = dict(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    encoder = save_encoder(
        tmp_path / "e.safetensors", create_encoder(**kwargs), "vit_small_patch16_224", kwargs
    )
    return tmp_path / "p", encoder


@pytest.mark.parametrize(
    "moment, ending, left",
    [("reading", ".parquet", 6), ("writing", ".csv", 6), ("joining", ".npz", 0), ("removing", ".parquet", 0)],
)
def test_a_run_killed_at_any_moment_goes_on(ten, tmp_path, monkeypatch, moment, ending, left):
    monkeypatch.setattr(embedding, "_PART_ROWS", 4)
    whole, out = tmp_path / "whole" / f"e{ending}", tmp_path / "out" / f"e{ending}"
    torch.set_num_threads(
        torch.get_num_threads()
    )  # told, as the killed process is: untold, MKL may take fewer
    embedding.embed_photographs(*ten, whole, framing="as-is", batch=2, device="cpu", progress=False)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, moment, *map(str, ten), str(out), str(torch.get_num_threads())]
    )
    assert killed.returncode == -signal.SIGKILL and out.exists() == (moment == "removing")
    seen, real = [], crop_stage.frame_faces
    monkeypatch.setattr(crop_stage, "frame_faces", lambda path, **how: seen.append(path) or real(path, **how))
    table = embedding.embed_photographs(*ten, out, framing="as-is", batch=2, device="cpu", progress=False)
    assert len(seen) == left and len(table) == 10 and (table.status == "success").sum() == 9
    assert out.read_bytes() == whole.read_bytes() and [path.name for path in out.parent.iterdir()] == [
        out.name
    ]


FLAT = """
import resource, sys
import numpy as np, torch
from mefem import embedding, encoders

class Zeros(encoders.FrozenEncoder):
    name, dim, tokens, has_cls, image_size, mean, std = "zeros", 768, 197, True, 32, (0,) * 3, (1,) * 3
    device = torch.device("cpu")
    parts = lambda self: {}
    tokens_of = lambda self, images: torch.zeros(len(images), 197, 768)

source, few, out = sys.argv[1:]
def peak(folder):
    how = {"framing": "as-is", "progress": False, "batch": 16}
    embedding.embed_photographs(folder, Zeros(), out, "patches", **how)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak(few)
print(peak(source) - before)
"""


@pytest.mark.parametrize("ending", [".parquet", ".npz"])
def test_memory_is_flat_with_patches(tmp_path, ending):
    """600 photographs, whose patches are 360 MB, in hardly more memory than 100."""
    Image.fromarray(CROPS[0]).save(tmp_path / "0.png")
    for folder, count in (("few", 100), ("many", 600)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            (tmp_path / folder / f"{number}.png").symlink_to(tmp_path / "0.png")
    out = tmp_path / f"e{ending}"
    arguments = [str(tmp_path / "many"), str(tmp_path / "few"), str(out)]
    done = subprocess.run(
        [sys.executable, "-c", FLAT, *arguments], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 100, "MB more"
    assert len(read_table(out)[0]) == 600


def test_parts_of_other_settings_photographs_or_code_are_not_taken(ten, tmp_path, monkeypatch, capsys):
    photographs, encoder = ten
    monkeypatch.setattr(embedding, "_PART_ROWS", 4)
    out, real = tmp_path / "out/e.parquet", embedding._write_part

    def stopped(**options):
        writers = iter([real])
        monkeypatch.setattr(embedding, "_write_part", lambda *rest: next(writers, lambda *_: 1 / 0)(*rest))
        options = {"framing": "as-is", "batch": 2, "progress": False, **options}
        with pytest.raises(ZeroDivisionError):
            embedding.embed_photographs(photographs, encoder, out, **options)
        return sorted(path.name for path in out.parent.iterdir())

    (first,) = stopped()
    assert stopped() == [first], "stopped again, it has one folder still"
    others = [stopped(features="cls"), stopped(min_side=5), stopped(batch=4)]
    monkeypatch.setattr(embedding, "code_hash", lambda *_: "another")
    others.append(stopped())
    monkeypatch.setattr(embedding, "code_hash", code_hash)
    (photographs / "3.png").write_bytes(b"no picture either")
    others.append(stopped())
    assert [len(names) for names in others] == [2, 3, 4, 5, 6]
    (photographs / "11.png").write_bytes(b"")
    monkeypatch.setattr(embedding, "_write_part", real)
    capsys.readouterr()
    embedding.embed_photographs(photographs, encoder, out, framing="as-is", batch=2)
    said = capsys.readouterr().out
    assert said.count("they are left alone") == 6 and "going on" not in said
    assert sorted(path.name for path in out.parent.iterdir()) == sorted([*others[-1], "e.parquet"])


def test_parts_are_small_and_whole_batches():
    for batch, width, size in (
        (32, 768, 256),
        (100, 768, 200),
        (512, 768, 512),
        (32, 150_000, 96),
        (32, 1 << 30, 32),
    ):
        assert embedding._part_size(batch, width) == size


@pytest.mark.parametrize("name", ["e.parquet", "e.csv", "e.npz"])
def test_the_table_says_what_was_seen(encoder, tmp_path, name):
    (tmp_path / "p").mkdir()
    two = np.concatenate(
        [cartoon()[:, 130:382], cartoon(unit=0.8)[:, 130:382]], axis=1
    )  # the smaller one is the surer
    Image.fromarray(two).save(tmp_path / "p/two.png")
    Image.new("RGB", (80, 80)).save(tmp_path / "p/black.png")
    (tmp_path / "p/zero.jpg").write_bytes(b"")

    def embedded(face):
        return embedding.embed_photographs(
            tmp_path / "p", encoder, tmp_path / name, "mean", progress=False, framing="shift", face=face
        )

    table = embedded("all")
    assert list(table.columns) == embedding._TABLE
    found = FaceDetector().detect(two)
    assert table.file.tolist() == ["black.png", "two.png", "two.png", "zero.jpg"] and len(found) == 2
    assert table.status.tolist() == ["no face", "success", "success", "empty file"]
    assert (
        table.faces.tolist()[:3] == [0, 2, 2]
        and np.isnan(table.faces[3])
        and table.features.unique() == ["mean"]
    )
    assert np.allclose(table.score[1:3], [face.score for face in found]) and table.score[[0, 3]].isna().all()
    assert np.allclose(table[["x0", "y0", "x1", "y1"]][1:3], [face.box for face in found])
    assert table.framing.tolist() == ["", "shift", "shift", ""]
    assert (
        table.reason[0].endswith("; --framing as-is would use it")
        and table.reason[3] == "copy it again from its source"
    )
    if name.endswith("npz"):
        with np.load(tmp_path / name) as arrays:
            written = pd.DataFrame({column: list(arrays[column]) for column in embedding._TABLE})
    else:
        written = (pd.read_csv if name.endswith("csv") else pd.read_parquet)(tmp_path / name)[
            embedding._TABLE
        ]
    for column in embedding._TABLE:
        assert written[column].fillna("").tolist() == table[column].fillna("").tolist(), column
    for face, file in (
        ("surest", found[0]),
        ("largest", max(found, key=lambda one: one.box[2] - one.box[0])),
    ):
        one = embedded(face)
        assert len(one) == 3 and one.x0[1] == file.box[0] and (face == "surest") == (file is found[0])


def test_a_table_of_an_earlier_version_is_replaced(encoder, tmp_path):
    (tmp_path / "p").mkdir()
    Image.fromarray(CROPS[0]).save(tmp_path / "p/a.png")
    (tmp_path / "e.csv").write_text("file,status,encoder,features,dim,e0\na.png,success,x,cls,1,0.5\n")
    embedding.embed_photographs(tmp_path / "p", encoder, tmp_path / "e.csv", framing="as-is", progress=False)
    assert len(pd.read_csv(tmp_path / "e.csv").filter(regex=r"^e\d+$").columns) == 24


@pytest.mark.parametrize(
    "name, words",
    [
        ("e.tsv", "expected a file ending in .parquet, .csv, .npz"),
        ("e", "expected a file ending in"),
        ("folder.csv", "is no table of embeddings"),
        ("labels.csv", "is no table of embeddings"),
        ("labels.parquet", "is no table of embeddings"),
        ("labels.npz", "is no table of embeddings"),
        ("old.csv", "is no table of embeddings"),
        ("labels.csv/e.csv", "cannot be written: (Not a directory|File exists)"),
        ("/proc/nowhere/e.csv", "/proc/nowhere/e.csv cannot be written"),
    ],
)
def test_where_no_table_can_be_written_is_said_before_the_work(tmp_path, monkeypatch, name, words):
    Image.fromarray(CROPS[0]).save(tmp_path / "a.png")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "labels.csv").write_text("file,status,age\na.png,success,31\n")
    pd.DataFrame({"file": ["a.png"], "status": ["known"]}).to_parquet(tmp_path / "labels.parquet")
    pd.DataFrame({"file": ["a.png"], "status": ["known"]}).to_parquet(tmp_path / "old.csv")
    np.savez(tmp_path / "labels.npz", ages=np.arange(3))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(embedding, "as_encoder", lambda *_: pytest.fail("the work began"))
    with pytest.raises(ValueError, match=words):
        embedding.embed_photographs(tmp_path, "mefem-s", tmp_path / name, progress=False)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_default_is_one_named_vector_per_picture(encoder):
    tokens = encoder.tokens_of(CROPS).numpy()
    embedder = FaceEmbedder(encoder, framing="as-is").fit(None)
    rows = embedder.transform(list(CROPS))
    assert np.allclose(rows, tokens[:, 1:].mean(1), atol=1e-5) and np.allclose(
        embed(CROPS, encoder, "mean"), rows, atol=1e-5
    )
    framed = FaceEmbedder(encoder, framing="as-is", features="cls").set_output(transform="pandas")
    frame = framed.fit_transform(list(CROPS))
    assert list(frame.columns) == [f"cls{i}" for i in range(24)] and np.allclose(
        frame, tokens[:, 0], atol=1e-5
    )
    assert embedder.get_feature_names_out()[-1] == "mean23"
    for wrong in ({"features": "meen"}, {"on_error": "drop"}):
        with pytest.raises(ValueError, match="{}='{}' must be one of".format(*next(iter(wrong.items())))):
            FaceEmbedder(encoder, **wrong).fit(None)
    with pytest.raises(ValueError, match="several vectors per picture"):
        embedder.set_params(features="patches").get_feature_names_out()
    assert np.array_equal(module.pool_tokens(tokens[:, :1], "mean", True), tokens[:, 0]), (
        "one vector is its own mean"
    )
    assert np.allclose(module.pool_tokens(tokens[:, 1:], "mean", False), rows, atol=1e-5)
    with pytest.raises(ValueError, match="'meen' are unknown, expected one of mean, cls"):
        module.pool_tokens(tokens, "meen", True)


def test_the_transformer_frames_as_the_command_does(encoder, frames, tmp_path):
    table = embedding.embed_photographs(frames, encoder, tmp_path / "e.parquet", progress=False)
    rows = FaceEmbedder(encoder, on_error="nan").fit(None).transform([frames / name for name in table.file])
    assert np.isnan(rows).any(1).tolist() == (table.status != "success").tolist()
    assert np.allclose(read_table(tmp_path / "e.parquet")[2], rows, atol=1e-5, equal_nan=True)
    with pytest.raises(CropError, match="grey.png: no face .*; --framing as-is would use it"):
        FaceEmbedder(encoder).fit(None).transform([frames / "grey.png"])


def test_pictures_without_a_face(encoder, tmp_path):
    Image.fromarray(CROPS[0]).save(tmp_path / "noise.png")
    with pytest.raises(ValueError, match="noise.png.*no face"):
        FaceEmbedder(encoder).fit(None).transform([tmp_path / "noise.png"])
    with pytest.raises(ValueError, match="gone.png.*missing"):
        FaceEmbedder(encoder).fit(None).transform([tmp_path / "gone.png"])
    rows = (
        FaceEmbedder(encoder, on_error="nan", features="patches")
        .fit(None)
        .transform([tmp_path / "noise.png", tmp_path / "x"])
    )
    assert rows.shape == (2, 16, 24) and np.isnan(rows).all()


def test_pixels_are_fitted_by_the_transformer():
    rows = FaceEmbedder(
        PixelEncoder(components=3, image_size=16, device="cpu"), framing="as-is"
    ).fit_transform(list(CROPS))
    assert rows.shape == (7, 3) and np.abs(rows.mean(0)).max() < 1e-3


def test_real_photographs(encoder, shared):
    paths = sorted((shared / "frll").glob("*.jpg"))
    rows = FaceEmbedder(encoder).fit(None).transform(paths)
    assert (
        rows.shape == (24, 24) and np.isfinite(rows).all() and np.unique(rows.round(3), axis=0).shape[0] == 24
    )


def test_decoding_ahead_keeps_order_and_bounds():
    drawn = []

    def samples():
        for i in range(40):
            drawn.append(i)
            yield f"{i}", jpeg(np.full((8, 8, 3), 6 * i, np.uint8))

    batches = decode_ahead(samples(), 8, batch=4, threads=3, ahead=2)
    first = next(batches)
    assert len(drawn) <= 12  # no more than the batches in flight have been read
    found = np.concatenate([first, *batches])[:, 0, 0, 0]
    assert np.abs(found.astype(int) - 6 * np.arange(40)).max() <= 2
    with pytest.raises(ShardError, match="broken"):
        list(decode_ahead([("broken", b"no jpeg")], 8, 4))


def test_extraction_and_back(encoder, tmp_path):
    faces = make_faces(tmp_path / "faces")
    meta = extract_features(encoder, faces, tmp_path / "out", batch=3, progress=False, source="here")
    loaded = load_features(tmp_path / "out", "bmi")
    assert (
        loaded.state == "present"
        and loaded.tokens.dtype == np.float16
        and isinstance(loaded.tokens, np.memmap)
    )
    assert meta == loaded.meta and meta["n"] == 7 and meta["simulated"] and meta["source"] == "here"
    assert list(loaded.labels.bmi) == [20.0 + i for i in range(7)]
    assert np.allclose(loaded.tokens, encoder.tokens_of(load_images(faces)), atol=5e-3)
    assert np.array_equal(loaded.select("cls"), loaded.tokens[:, 0])
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    extract_features(encoder, faces, tmp_path / "out", batch=3, progress=False, source="here")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


def test_features_are_kept_until_encoder_crops_or_code_change(encoder, tmp_path, monkeypatch):
    faces, out = make_faces(tmp_path / "faces"), tmp_path / "out"
    meta = extract_features(encoder, faces, out, progress=False)
    assert {"encoder_hash", "faces_hash", "made_from", "key"} <= set(meta)
    monkeypatch.setattr(module, "_write_tokens", lambda *_: pytest.fail("extracted again"))
    assert extract_features(encoder, faces, out, progress=False) == meta
    other = freeze(
        "small",
        create_encoder(
            "vit_small_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3
        ),
        IMAGENET_MEAN,
        IMAGENET_STD,
        device="cpu",
    )
    for change in (
        lambda: extract_features(other, faces, out, progress=False),
        lambda: extract_features(encoder, make_faces(tmp_path / "fewer", 6), out, progress=False),
    ):
        with pytest.raises(pytest.fail.Exception, match="again"):
            change()
        write_json(out / "bmi.json", meta)  # a failure took the account away
    monkeypatch.setattr(module, "code_hash", lambda *_: "another")
    with pytest.raises(pytest.fail.Exception, match="again"):
        extract_features(encoder, faces, out, progress=False)


def test_a_failure_leaves_nothing_that_calls_itself_finished(encoder, tmp_path, monkeypatch):
    faces, out = make_faces(tmp_path / "faces"), tmp_path / "out"
    extract_features(encoder, faces, out, progress=False)
    (out / "bmi.parquet").unlink()  # no longer whole, so it has to be made again
    calls = iter(range(10))
    monkeypatch.setattr(module, "to_half", lambda t: to_half(t) if next(calls) == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extract_features(encoder, faces, out, batch=3, progress=False)
    assert not (out / "bmi.json").exists() and not [p for p in out.iterdir() if p.name.startswith(".")]
    with pytest.raises(FileNotFoundError, match="bmi.json"):
        load_features(out, "bmi")


def test_values_beyond_half_precision_are_refused():
    assert to_half(torch.ones(2)).dtype == np.float16
    for value in (1e5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="half precision"):
            to_half(torch.tensor([1.0, value]))


def test_absence_travels(encoder, tmp_path):
    write_absent(tmp_path / "faces", "bmi", "not downloaded", {"size": 32})
    extract_features(encoder, make_faces(tmp_path / "here"), tmp_path / "out", progress=False)
    meta = extract_features(encoder, tmp_path / "faces", tmp_path / "out", progress=False)
    assert meta["state"] == "data absent" and meta["reason"] == "not downloaded"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["bmi.json"]
    assert load_features(tmp_path / "out", "bmi").state == "data absent"
    never = features_of("pixels", [tmp_path / "celeba"], tmp_path / "n", progress=False)
    assert never["celeba"]["state"] == "data absent" and "never cropped" in never["celeba"]["reason"]
    found = features_of(
        "buffalo:gone.onnx", [make_faces(tmp_path / "faces2")], tmp_path / "b", progress=False
    )
    assert (
        found["bmi"]["state"] == "weights absent"
        and "licence" in load_features(tmp_path / "b", "bmi").meta["reason"]
    )
    assert (
        features_of("pixels", [tmp_path / "here"], tmp_path / "p", [tmp_path / "faces"])["bmi"]["state"]
        == "data absent"
    )


def test_pixels_in_the_graph(tmp_path):
    faces, train = make_faces(tmp_path / "faces"), make_faces(tmp_path / "train", 5, "facecaption")
    meta = features_of("pixels", [faces], tmp_path / "out", fit_on=[train], device="cpu", progress=False)[
        "bmi"
    ]
    assert meta["tokens"] == 1 and meta["dim"] == 4 and (tmp_path / "out" / "pixels.safetensors").is_file()
    assert load_features(tmp_path / "out", "bmi").select("cls").shape == (7, 4)


def test_damaged_files_are_named(encoder, tmp_path):
    extract_features(encoder, make_faces(tmp_path / "faces"), tmp_path, progress=False)
    meta = json.loads((tmp_path / "bmi.json").read_text())
    (tmp_path / "bmi.json").write_text(json.dumps(meta | {"n": 9}))
    with pytest.raises(ValueError, match="bmi.json: 9 pictures"):
        load_features(tmp_path, "bmi")
    (tmp_path / "bmi.json").write_text(json.dumps(meta))
    whole = (tmp_path / "bmi.npy").read_bytes()
    (tmp_path / "bmi.npy").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="bmi.npy"):
        load_features(tmp_path, "bmi")


def test_detect_false_is_framing_as_is_and_a_function_keeps_cls_as_its_default(encoder):
    pictures = list(CROPS[:3])
    plain = FaceEmbedder(encoder, detect=False).fit(pictures).transform(pictures)
    assert np.array_equal(plain, FaceEmbedder(encoder, framing="as-is").fit(pictures).transform(pictures))
    assert np.array_equal(embed(CROPS[:3], encoder), embed(CROPS[:3], encoder, "cls")) and plain.shape == (
        3,
        encoder.dim,
    )
