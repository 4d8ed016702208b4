"""Table 1, its companion, figure 1, the datasheets and the search for copies."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mefem import datasheets as D
from mefem.faces import encode_crop, read_image
from mefem.shards import SUCCESS, ShardError, leaked_keys, write_absent, write_manifest, write_shard
from mefem.tables import write_frame


def pattern(seed, size=64):
    low = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(low).resize((size, size), Image.Resampling.BICUBIC))


def make_set(faces, name, jpegs, dropped=(), simulated=True, **labels):
    keys = [f"{name}{i}" for i in range(len(jpegs))]
    rows = [
        {"key": key, "status": SUCCESS, **{k: v[i] for k, v in labels.items()}} for i, key in enumerate(keys)
    ]
    rows += [{"key": f"x{i}", "status": reason} for i, reason in enumerate(dropped)]
    stats = write_shard(
        faces / name, 0, [(key, jpeg, {}) for key, jpeg in zip(keys, jpegs, strict=True)], rows
    )
    write_manifest(faces / name, name, len(rows), [stats], {"size": 64}, simulated)


@pytest.fixture
def faces(tmp_path):
    """All seven: four training pictures of FaceCaption, one of them in BMI too; SFHQ absent."""
    pictures = {
        name: [encode_crop(pattern(100 * i + k)) for k in range(4)]
        for i, name in enumerate(source.name for source in D.SOURCES)
    }
    buffer = io.BytesIO()
    Image.fromarray(pattern(2)).save(buffer, "JPEG", quality=95)
    pictures["bmi"][1] = buffer.getvalue()
    for name, jpegs in pictures.items():
        make_set(tmp_path, name, jpegs, ["no face", "no face", "dead link"] if name == "facecaption" else [])
    write_absent(tmp_path / "sfhq", "sfhq", "nobody put it there", {})
    return tmp_path


def test_table1_counts_and_the_papers(faces):
    table = D.table1(D.accounts(faces)).set_index("Data set")
    assert table.loc["FaceCaption-15M"].tolist() == [
        "pretraining",
        "images",
        "7",
        "15,078,935",
        "4",
        "4,572,807",
    ]
    assert table.loc["SFHQ"].tolist() == [
        "pretraining",
        "images",
        "not run: data absent",
        "425,258",
        "",
        "425,258",
    ]
    assert table.loc["Total", ["Original", "Usable", "paper "]].tolist() == ["11", "8", "6,444,843"]
    assert table.loc["CelebA", "paper"] == ""


def test_companion_adds_up(faces):
    table = D.dropped_table(D.accounts(faces)).set_index("What became of it")
    assert "SFHQ" not in table and table["FaceCaption-15M"].to_dict() == {
        "usable": "4",
        "dead link": "1",
        "no face": "2",
        "listed by the publisher": "7",
    }
    numbers = table.astype(int)
    assert (numbers.drop("listed by the publisher").sum() == numbers.loc["listed by the publisher"]).all()


def test_lost_photograph_stops_the_stage(faces):
    path = faces / "celeba/manifest.json"
    path.write_text(path.read_text().replace('"original": 4', '"original": 5', 1))
    with pytest.raises(ValueError, match="celeba.*is not the"):
        D.accounts(faces)


def test_written_tables(faces, tmp_path):
    found = D.accounts(faces)
    text = write_frame(D.table1(found), tmp_path, "table1", "Table 1.", D.scale_line(found, "demo"))
    assert (
        "Simulated people" in text and "15,078,935" in text and text == (tmp_path / "table1.md").read_text()
    )
    assert pd.read_csv(tmp_path / "table1.csv").shape == (8, 7)
    latex = (tmp_path / "table1.tex").read_text()
    assert latex.count("&") == 6 * 9 and latex.count("\\\\") == 9


def test_no_real_person_is_written(faces, tmp_path):
    make_set(faces, "facecaption", [encode_crop(pattern(3))], simulated=False)
    found = D.accounts(faces)
    with pytest.raises(ValueError, match="real people"):
        D.figure_examples(faces, found, tmp_path / "f.png", real=True)
    axes = D.figure_examples(faces, found).axes
    assert [len(ax.images) for ax in axes] == [0, 1, 0] and "real people" in axes[0].texts[0].get_text()
    assert [len(ax.images) for ax in D.figure_examples(faces, found, real=True).axes] == [1, 1, 0]
    D.figure_examples(faces, found, tmp_path / "f.png")
    assert read_image(tmp_path / "f.png").std() > 10


def test_demographics_of_each_publisher():
    fairface = D.demographics(
        pd.DataFrame(
            {
                "age": [2, 0],
                "age_name": ["10-19", "0-2"],
                "gender_name": ["Male", "Female"],
                "race_name": ["Black", "White"],
            }
        )
    )
    assert list(fairface["age"].cat.categories) == ["0-2", "10-19"] and list(fairface["sex"]) == [
        "male",
        "female",
    ]
    celeba = D.demographics(pd.DataFrame({"Male": [True, False], "Young": [False, True]}))
    assert list(celeba["sex"]) == ["male", "female"] and list(celeba["age"]) == ["not young", "young"]
    bmi = D.demographics(pd.DataFrame({"bmi": [20.0, None], "age": [None, None], "sex": ["male", None]}))
    assert set(bmi) == {"bmi", "sex"} and len(bmi["bmi"]) == 1
    assert D.demographics(pd.DataFrame({"key": ["a"]})) == {}


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"A": pd.DataFrame({"key": ["a"]})},
        {"B": pd.DataFrame({"bmi": [20.0, 30.0], "sex": ["male", "female"]})},
    ],
)
def test_figure_of_datasheets(labels, tmp_path):
    one, two = (D.figure_datasheets(labels, tmp_path / f"{k}.png").read_bytes() for k in "ab")
    assert one == two and len(one) < 200_000


@pytest.mark.parametrize("distance", [0, 1, 3, 5, 8])
def test_near_pairs_equals_all_pairs(distance):
    rng = np.random.default_rng(distance)
    a = rng.integers(0, 2**64, 300, dtype=np.uint64)
    flips = np.array(
        [sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 10), replace=False)) for _ in a],
        np.uint64,
    )
    b = np.concatenate([a ^ flips, rng.integers(0, 2**64, 50, dtype=np.uint64)])
    all_pairs = np.argwhere(np.bitwise_count(a[:, None] ^ b[None]) <= distance)
    assert len(all_pairs) > 10 and (D.near_pairs(a, b, distance) == all_pairs).all()
    assert D.near_pairs(a[:0], b, distance).shape == (0, 2)


def test_coefficients_are_the_cosine_transform():
    images = np.stack([pattern(k, 32) for k in range(2)])
    grey = images @ np.array([0.299, 0.587, 0.114])
    n = np.arange(32)
    basis = np.cos(np.pi * (2 * n + 1) * n[1:9, None] / 64) / 4
    slow = np.einsum("uy,nyx,vx->nuv", basis, grey, basis).reshape(2, 64)
    assert np.allclose(D.dct_coefficients(images), slow, rtol=1e-4, atol=1e-2)


def test_copies_are_found_and_only_they(faces):
    found = D.accounts(faces)
    pairs = D.find_duplicates(faces, found)
    assert pairs[["a", "key_a", "b", "key_b"]].to_numpy().tolist() == [
        ["facecaption", "facecaption2", "bmi", "bmi1"]
    ]
    D.write_leaks(pairs, faces)
    assert leaked_keys(faces, "facecaption") == {"facecaption2"} and leaked_keys(faces, "avspeech") == set()
    with pytest.raises(ShardError, match="fairface is an evaluation set and was not compared"):
        leaked_keys(faces, "fairface")
    table = D.duplicates_table(pairs, found).set_index("Near-duplicates of")
    assert table.loc["FaceCaption-15M", ["in itself", "in BMI", "in CelebA"]].tolist() == ["0", "1", "0"]
    assert table.loc["BMI", "in BMI"] == "", "leakage is a question about pretraining sets"


def real_hashes(images):
    values = np.concatenate([D.dct_coefficients(images[k : k + 500]) for k in range(0, len(images), 500)])
    return values, np.median(values, 0)


def test_hash_on_real_faces(shared):
    """Centred real faces are alike; still nearly all copies are found and hardly any other pair."""
    import pyarrow.parquet as pq

    rows = (
        pq.ParquetFile(shared / "fairface/0.25/validation-00000-of-00001.parquet")
        .read_row_group(0)
        .slice(0, 800)["image"]
        .to_pylist()
    )
    pictures = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in rows]

    def small(picture):
        return np.asarray(picture.resize((32, 32), Image.Resampling.LANCZOS))

    def again(picture):
        buffer = io.BytesIO()
        picture.resize((160, 160)).point(lambda value: min(255, int(1.08 * value))).save(
            buffer, "JPEG", quality=70
        )
        return Image.open(buffer)

    values, median = real_hashes(np.stack([small(picture) for picture in pictures]))
    hashes = D.hash_bits(values, median)
    copies = D.hash_bits(
        D.dct_coefficients(np.stack([small(again(picture)) for picture in pictures])), median
    )
    assert (np.bitwise_count(hashes ^ copies) <= D.MAX_DISTANCE).mean() > 0.9
    pairs = D.near_pairs(hashes, hashes, D.MAX_DISTANCE)
    assert (pairs[:, 0] < pairs[:, 1]).sum() <= 3
