"""Own labels on embeddings: which row is which photograph, numbers that scikit-learn gives too, and every bad
table."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import RidgeCV
from sklearn.metrics import balanced_accuracy_score, mean_absolute_error, r2_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

import mefem.own_labels as own
from mefem.cli import app
from mefem.datasets.core import DatasetError
from mefem.models import create_encoder, save_encoder
from mefem.own_labels import (
    Embeddings,
    LabelModel,
    Question,
    match_names,
    predict_labels,
    probe_labels,
    read_embeddings,
)

N = 120


def planted(n=N, noise=1.0, seed=0):
    """Vectors [n, 6] of which the first holds, in noise, the labels [n] of n / 2 people."""
    rng = np.random.default_rng(seed)
    label = rng.standard_normal(n // 2).repeat(2)
    vectors = rng.standard_normal((n, 6))
    vectors[:, 0] = label + noise * vectors[:, 0]
    return vectors.astype(np.float32), label


def table_of(vectors, files, **about):
    return pd.DataFrame(
        {
            "file": files,
            "status": "success",
            "encoder": "toy",
            "features": "cls",
            "dim": vectors.shape[1],
            "embedding": list(vectors),
        }
    ).assign(**about)


@pytest.fixture
def tables(tmp_path):
    """A table of embeddings with one refused photograph, and its labels, as files."""
    vectors, label = planted()
    files = [f"P{n:03}.JPG" for n in range(N)]
    table = table_of(vectors, files, scale=2.0)
    table.loc[7, ["status", "embedding"]] = ["no face", None]
    table.to_parquet(tmp_path / "e.parquet")
    kinds = np.where(label > 0, "high", "low")
    labels = pd.DataFrame(
        {
            "Image": [f"p{n:03}" for n in range(N)],
            "id": [f"{n // 2:03}" for n in range(N)],
            "y": label.round(4),
            "kind": kinds,
            "sex": ["f", "m"] * (N // 2),
        }
    )
    labels.to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path / "e.parquet", tmp_path / "labels.csv"


def mefem(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + result.stderr + repr(result.exception)
    return result


# --- the numbers
# -----------------------------------------------------------------------------------------------------


def test_predictions_are_those_of_scikit_learn(tables):
    found = probe_labels(*tables, "y", person="id")
    labels = pd.read_csv(tables[1], dtype={"id": str}).drop(index=7)
    vectors = np.delete(planted()[0], 7, axis=0).astype(float)
    y, people = labels.y.to_numpy(), labels.id.to_numpy()
    folds = list(GroupKFold(5, shuffle=True, random_state=0).split(vectors, y, people))
    expected, fold = np.empty(len(y)), np.empty(len(y), int)
    for number, (train, test) in enumerate(folds):
        inner = list(GroupKFold(3, shuffle=True, random_state=0).split(train, y[train], people[train]))
        head = make_pipeline(
            StandardScaler(), RidgeCV(10.0 ** np.arange(7), cv=inner, scoring="neg_mean_squared_error")
        )
        expected[test], fold[test] = head.fit(vectors[train], y[train]).predict(vectors[test]), number
    assert (
        np.allclose(found.predictions.prediction, expected, atol=1e-10)
        and (found.predictions.fold == fold).all()
    )
    assert found.numbers["r2"].value == pytest.approx(r2_score(y, expected))
    assert found.numbers["mae"].value == pytest.approx(mean_absolute_error(y, expected))
    # the head's strength hardly matters here: scikit-learn's own one-liner comes to the same
    plain = cross_val_predict(
        make_pipeline(StandardScaler(), RidgeCV(10.0 ** np.arange(7))), vectors, y, cv=folds
    )
    assert np.corrcoef(plain, expected)[0, 1] > 0.99


@pytest.mark.parametrize(("noise", "low", "high"), [(0.1, 0.97, 1.0), (1.0, 0.42, 0.55), (30.0, -0.05, 0.03)])
def test_a_planted_r2_is_found(noise, low, high):
    vectors, label = planted(2000, noise)
    files = tuple(f"{n}.png" for n in range(2000))
    labels = pd.DataFrame({"file": files, "y": label, "id": np.arange(2000) // 2})
    found = probe_labels(Embeddings(files, vectors), labels, "y", person="id").numbers["r2"]
    assert low < found.value < high and found.n == 2000 and found.persons == 1000


def test_classes(tables):
    found = probe_labels(*tables, "kind", person="id")
    table = found.predictions
    assert found.joined.classes == ("high", "low") and set(table.prediction) <= {0.0, 1.0}
    assert (
        found.numbers["accuracy"].value == pytest.approx((table.target == table.prediction).mean())
        and found.numbers["accuracy"].low > 0.55
    )
    assert found.numbers["balanced_accuracy"].value == pytest.approx(
        balanced_accuracy_score(table.target, table.prediction)
    )
    assert (
        f"; always '{found.joined.classes[int(table.target.mode()[0])]}' "
        f"{table.target.value_counts(normalize=True).max():.3f} (119" in str(found)
    )


@pytest.mark.parametrize("target", ["y", "kind"])
def test_nobody_is_in_two_folds_and_nobody_is_known_again(target):
    """Embeddings that hold who it is and nothing else predict nothing, unless people are in both parts."""
    rng = np.random.default_rng(0)
    who = np.arange(300) // 5
    vectors = rng.standard_normal((60, 60))[who] + 0.01 * rng.standard_normal((300, 60))
    labels = pd.DataFrame(
        {
            "file": [f"{n}.jpg" for n in range(300)],
            "id": [f"{n:02}" for n in who],
            "y": rng.standard_normal(60)[who],
        }
    )
    labels["kind"] = np.where(labels.y > labels.y.median(), "high", "low")
    embeddings = Embeddings(tuple(labels.file), vectors)
    honest, leaking = (
        probe_labels(embeddings, labels, target, person="id"),
        probe_labels(embeddings, labels, target),
    )
    assert honest.predictions.groupby("person").fold.nunique().max() == 1
    metric = next(iter(honest.numbers))
    assert (
        honest.numbers[metric].value < (0.1 if target == "y" else 0.65)
        and leaking.numbers[metric].value > 0.8
    )
    assert any("--person COLUMN" in line for line in leaking.said) and not any(
        "--person COLUMN" in line for line in honest.said
    )


@pytest.mark.parametrize("target", ["y", "kind"])
def test_the_order_of_rows_changes_nothing(tables, tmp_path, target):
    table, labels = pd.read_parquet(tables[0]), pd.read_csv(tables[1], dtype=str)
    other = np.random.default_rng(5).standard_normal((N, 6))
    texts = []
    for seed in (None, 1, 2):
        order = np.arange(N) if seed is None else np.random.default_rng(seed).permutation(N)
        table.iloc[order].to_parquet(tmp_path / "a.parquet")
        (labels if seed is None else labels.sample(frac=1, random_state=seed)).to_csv(
            tmp_path / "labels.csv", index=False
        )
        found = probe_labels(
            tmp_path / "a.parquet",
            tmp_path / "labels.csv",
            target,
            {"other": other[order]},
            person="id",
            group="sex",
        )
        texts.append((own.report(found), own._with_names(found).to_csv(), json.dumps(own.as_json(found))))
    assert texts[0] == texts[1] == texts[2]


def test_compared_on_the_same_photographs_people_and_folds(tables, tmp_path):
    vectors, label = planted()
    files = [f"crops/p{n:03}.jpg" for n in range(N)]
    table_of(np.random.default_rng(1).standard_normal((N, 4)), files).drop(index=[0, 1]).to_parquet(
        tmp_path / "noise.parquet"
    )
    table_of(label[:, None] + 0.01 * vectors, files).to_parquet(tmp_path / "oracle.parquet")
    found = probe_labels(*tables, "y", [tmp_path / "noise.parquet", tmp_path / "oracle.parquet"], person="id")
    noise, oracle = found.against
    assert len(found.predictions) == N - 3  # one has no embedding, two are not in the other table
    assert (own.verdict(noise.difference), own.verdict(oracle.difference)) == ("better", "worse")
    assert found.joined.left_out["photographs that noise.parquet has no embedding of"] == [
        "P000.JPG",
        "P001.JPG",
    ]
    assert oracle.difference.value == pytest.approx(found.numbers["r2"].value - oracle.value.value)
    (same,) = probe_labels(*tables, "y", {"itself": planted()[0]}, person="id").against
    assert (
        own.verdict(same.difference) == "inconclusive"
        and same.difference.value == 0
        and "against itself" in str(same)
    )
    with pytest.raises(FileNotFoundError, match="mefem embed photos/ -o random.parquet -e random:FILE"):
        probe_labels(*tables, "y", ["random"])


def test_errors_by_group(tables):
    found = probe_labels(*tables, "y", person="id", group="sex")
    part = found.predictions[found.predictions.group == "f"]
    assert found.groups["f"].value == pytest.approx((part.target - part.prediction).abs().mean()) and set(
        found.groups
    ) == {"f", "m"}
    assert (
        found.group_lines()[0].startswith("sex f: MAE ")
        and "(60 photographs of 60 people)" in found.group_lines()[0]
    )


# --- the tables
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".npz"])
def test_what_embed_writes_is_read(tmp_path, ending):
    photos, out = tmp_path / "photos", tmp_path / f"e{ending}"
    photos.mkdir()
    for n in range(12):
        Image.fromarray(np.random.default_rng(n).integers(256, size=(112, 112, 3), dtype=np.uint8)).save(
            photos / f"{n}.png"
        )
    (photos / "3.png").write_bytes(b"no picture")
    kwargs = dict(img_size=112, patch_size=8, embed_dim=32, depth=1, num_heads=1)
    encoder = save_encoder(
        tmp_path / "encoder.safetensors", create_encoder(**kwargs), "vit_small_patch16_224", kwargs
    )
    mefem("embed", photos, "-o", out, "-e", encoder, "--framing", "as-is", "--features", "cls")
    found = read_embeddings(out)
    assert (
        found.files == tuple(sorted(f"{n}.png" for n in range(12))) and found.encoder == "encoder.safetensors"
    )
    assert found.features == "cls" and found.vectors.shape == (12, 32)
    assert found.usable.sum() == 11 and found.reason(found.files.index("3.png")) not in ("", "success")
    labels = pd.DataFrame({"image": [str(n) for n in range(12)], "y": np.arange(12) + 0.5})
    assert probe_labels(out, labels, "y").predictions.target.tolist() == [
        0.5,
        1.5,
        10.5,
        11.5,
        2.5,
        *np.arange(4, 10) + 0.5,
    ]


def test_columns_that_are_not_needed_do_not_matter(tmp_path):
    table = table_of(planted()[0], [f"{n}.jpg" for n in range(N)])[["embedding", "status", "file"]].assign(
        score=0.9, e10x="a", reason=""
    )
    table.to_parquet(tmp_path / "e.parquet")
    assert read_embeddings(tmp_path / "e.parquet").encoder == ""
    wide = (
        pd.DataFrame(planted()[0])
        .add_prefix("e")
        .assign(box="1 2", file=table.file, status="success", e5x=1, faces=2)
    )
    wide[sorted(wide)].to_csv(tmp_path / "e.csv", index=False)
    assert np.array_equal(read_embeddings(tmp_path / "e.csv").vectors, planted()[0])


@pytest.mark.parametrize(
    ("row", "photograph", "fits"),
    [
        ("f_001", "f_001.JPG", True),
        ("F_001.jpg", "f_001.JPG", True),
        ("photos/a.jpg", "a.jpg", True),
        ("a.jpg", "sub/a.jpg", True),
        ("C:\\photos\\a.jpg", "a.jpg", True),
        ("./a.jpg", "a.jpg", True),
        ("portrait.001", "portrait.001.png", True),
        ("cafe\u0301.jpg", "caf\u00e9.jpg", True),
        ("a.png", "a.jpg", False),
        ("x/a.jpg", "y/a.jpg", False),
        ("a", "aa.jpg", False),
        ("portrait.001", "portrait.jpg", False),
        ("", "a.jpg", False),
    ],
)
def test_which_row_is_which_photograph(row, photograph, fits):
    assert match_names([row], ["line 2"], [photograph], "e") == [photograph if fits else None]


def test_what_fits_two_ways_is_refused(tmp_path):
    files = ["a.jpg", "a.png", "s/b.jpg", "t/b.jpg", "c.jpg", "s/c.jpg"]
    assert match_names(["a.PNG", "t/b", "c.jpg"], ["line"] * 3, files, "e") == ["a.png", "t/b.jpg", "c.jpg"]
    for name, named in (("a", "'a.jpg' and 'a.png'"), ("b.jpg", "'s/b.jpg' and 't/b.jpg'")):
        with pytest.raises(
            DatasetError,
            match=f"labels.csv, line 7, column image: '{name}' fits two photographs of e.csv: {named}",
        ):
            match_names([name], ["labels.csv, line 7, column image"], files, "e.csv")
    with pytest.raises(DatasetError, match=r"line 3: 'x/d' is 'd.jpg' of e.csv, and so is 'd' \(line 2\)"):
        match_names(["d", "x/d"], ["line 2", "line 3"], ["d.jpg"], "e.csv")


def test_missing_values_and_what_is_left_out_are_counted_and_named(tmp_path):
    vectors, label = planted()
    embeddings = Embeddings(tuple(f"{n}.jpg" for n in range(N)), vectors)
    cells = [str(value) for value in label]
    cells[:6] = ["NA", "n/a", "N/A", "nan", "", " NaN "]
    rows = [f"{n};{cell}" for n, cell in enumerate(cells[:-1])] + [f"gone{n};1.5" for n in range(5)]
    (tmp_path / "labels.csv").write_text("\ufeffFILENAME;y\n" + "\n".join(rows), encoding="utf-8")
    found = probe_labels(embeddings, tmp_path / "labels.csv", "y")
    assert len(found.predictions) == N - 7 and found.joined.left_out == {
        "rows of labels.csv without a photograph": [f"gone{n}" for n in range(5)],
        "photographs without a row in labels.csv": ["119.jpg"],
        "photographs whose y is missing": [f"{n}.jpg" for n in range(6)],
    }
    assert "photographs whose y is missing: 6 (0.jpg, 1.jpg, 2.jpg ...)" in found.said
    assert found.said[0].startswith("y: 113 numbers, ") and found.said[0].endswith(
        "regression (--kind classes to treat as classes)"
    )


def test_a_persons_id_is_text():
    vectors, label = planted(12)
    labels = pd.DataFrame({"file": [f"{n}.jpg" for n in range(12)], "y": label, "id": ["7", "007", "07"] * 4})
    joined = own.join_labels(
        Embeddings(tuple(labels.file), vectors),
        own.read_labels(labels, Question("y", person="id")),
        Question("y", person="id"),
    )
    assert set(joined.rows.person) == {"7", "07", "007"}


def test_vip_as_it_is(shared):
    """1,026 rows: names without ending (seven files end in .JPG); columns image, height, weight, BMI."""
    vip = shared / "bmi" / "vip"
    files = tuple(sorted(path.name for path in (vip / "images").iterdir()))
    rng = np.random.default_rng(0)
    found = probe_labels(
        Embeddings(files, rng.standard_normal((len(files), 4))), vip / "annotation.csv", "BMI"
    )
    assert len(found.predictions) == 1026 and not found.joined.left_out
    table = pd.read_csv(vip / "annotation.csv").set_index("image").BMI
    assert all(
        table[file.rsplit(".", 1)[0]] == target
        for file, target in zip(found.predictions.file, found.predictions.target, strict=True)
    )
    assert found.numbers["r2"].value < 0.05


def test_frll_as_it_is(shared):
    files = tuple(path.name for path in sorted((shared / "frll").glob("*.jpg")))
    embeddings = Embeddings(files, np.random.default_rng(0).standard_normal((len(files), 4)))
    assert (
        len(probe_labels(embeddings, shared / "frll" / "labels.csv", "age", group="gender").predictions) == 24
    )
    assert probe_labels(embeddings, shared / "frll" / "labels.csv", "gender").joined.classes == (
        "female",
        "male",
    )


# --- what is refused
# -------------------------------------------------------------------------------------------------

COLUMNS = {"file": [f"{n}.jpg" for n in range(20)], "y": [f"{n}.5" for n in range(20)]}


@pytest.mark.parametrize(
    ("changes", "asked", "words"),
    [
        ({}, {"target": "Y"}, "no column 'Y' among file, y. Upper and lower case count."),
        ({}, {"person": "id"}, "no column 'id'"),
        (
            {"file": None, "photo": COLUMNS["file"]},
            {},
            "found none among y, photo; say it with --image COLUMN",
        ),
        ({"image": COLUMNS["file"]}, {}, "found file and image"),
        (
            {"y": ["3o", *COLUMNS["y"][1:]]},
            {},
            "labels.csv, line 2, column y: '3o' is no number, 19 others are",
        ),
        ({"y": ["31,5"] * 20}, {}, "a decimal comma? it has to be a point"),
        ({"y": ["a", *COLUMNS["y"][1:]]}, {"kind": "numbers"}, "line 2, column y: 'a' is no number"),
        (
            {"y": ["0", "1"] * 10},
            {},
            "column y: 2 different whole numbers (0, 1) may be amounts or names of classes: say --kind "
            "numbers or",
        ),
        ({"y": list("12345") * 4}, {}, "5 different whole numbers (1, 2, 3, 4, 5)"),
        ({"y": ["NA"] * 20}, {}, "column y: no cell says anything"),
        ({"y": ["2.5"] * 20}, {}, "y is the same for all 20 photographs"),
        (
            {"y": ["a"] * 17 + ["b"] * 3},
            {},
            "class 'b' has 3 people, too few for 5 folds: expected at least 5",
        ),
        ({"y": ["a", "A"] * 10}, {}, "'a' and 'A' differ in case alone"),
        ({"id": ["x", "NA"] * 10}, {"person": "id"}, "line 3, column id: 'NA' names nobody"),
        (
            {"id": list("xyz") + ["x"] * 17},
            {"person": "id"},
            "3 people with y are too few for 5 folds: expected at least 5",
        ),
        (
            {"file": [f"x{n}" for n in range(20)]},
            {},
            "column file has 'x0', 'x1', 'x2', and the photographs are '0.jpg', '1.jpg', '10.jpg'",
        ),
        ({"file": ["0.jpg", "0", *COLUMNS["file"][2:]]}, {}, "line 3, column file: '0' is '0.jpg' of "),
        ({"g": [str(n) for n in range(20)]}, {"group": "g", "kind": "numbers"}, None),
        ({}, {"kind": "words"}, "--kind is 'words', expected numbers or classes"),
        ({}, {"folds": 21}, "20 people with y are too few for 21 folds"),
    ],
)
def test_bad_tables_of_labels(tmp_path, changes, asked, words):
    labels = pd.DataFrame({name: cells for name, cells in (COLUMNS | changes).items() if cells})
    labels.to_csv(tmp_path / "labels.csv", index=False)
    table_of(planted(20)[0], COLUMNS["file"]).to_parquet(tmp_path / "e.parquet")
    arguments = {"target": "y"} | asked
    if words is None:
        assert set(
            probe_labels(tmp_path / "e.parquet", tmp_path / "labels.csv", **arguments).groups.values()
        ) == {None}
        return
    with pytest.raises(ValueError) as error:
        probe_labels(tmp_path / "e.parquet", tmp_path / "labels.csv", **arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_bad_tables_of_embeddings(tmp_path):
    vectors = planted(20)[0]
    good = table_of(vectors, COLUMNS["file"])
    pd.DataFrame(COLUMNS).to_csv(tmp_path / "labels.csv", index=False)
    pd.DataFrame(COLUMNS).to_parquet(tmp_path / "labels.parquet")
    (tmp_path / "cut.npz").write_bytes(b"PK\3\4 cut off")
    good.assign(file=["0.jpg"] * 20).to_parquet(tmp_path / "twice.parquet")
    good.assign(encoder=["a", "b"] * 10).to_parquet(tmp_path / "encoders.parquet")
    good.assign(embedding=[v[:5] if n else v for n, v in enumerate(vectors)]).to_parquet(
        tmp_path / "widths.parquet"
    )
    good.assign(embedding=[v * np.nan for v in vectors]).to_parquet(tmp_path / "nan.parquet")
    good.assign(status="no face", embedding=None).to_parquet(tmp_path / "none.parquet")
    for name, words in (
        ("nosuch.parquet", "is no file: expected a table that `mefem embed"),
        ("labels.csv", "expected a table that"),
        ("labels.parquet", "expected a table that"),
        ("cut.npz", "expected a table that"),
        ("e.xlsx", "is no file"),
        ("twice.parquet", "0.jpg stands there twice"),
        ("encoders.parquet", "expected one encoder for all rows, found a, b"),
        ("widths.parquet", "of one length, found 5, 6"),
        ("nan.parquet", "of 0.jpg holds values that are not finite"),
        ("none.parquet", "no row of "),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            probe_labels(tmp_path / name, tmp_path / "labels.csv", "y")
        assert words in str(error.value) and name in str(error.value), (name, error.value)


# --- the model
# -------------------------------------------------------------------------------------------------------


def test_the_saved_model_predicts_as_scikit_learn_does(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((150, 5)) * [1, 10, 0.1, 1, 0] + 3
    labels = pd.DataFrame(
        {"file": [f"{n}.jpg" for n in range(150)], "y": vectors[:, 1] + rng.standard_normal(150)}
    )
    labels["two"], labels["three"] = (
        np.where(labels.y > 3, "a", "b"),
        pd.cut(labels.y, [-99, 0, 6, 99], labels=["s", "m", "l"]).astype(str),
    )
    embeddings = Embeddings(tuple(labels.file), vectors, encoder="toy", features="cls")
    for target in ("y", "two", "three"):
        found = probe_labels(embeddings, labels, target)
        own.write_probe(found, tmp_path / target)
        rows = found.joined.rows
        head = own.fit_head(
            found.joined.vectors, rows.target.to_numpy(), rows.person.to_numpy(), found.joined.kind
        )
        new = 3 + rng.standard_normal((400, 5)) * 5
        expected, model = head.predict(new), LabelModel.load(tmp_path / target)
        if target == "y":
            assert np.allclose(model.predict(new), expected)
        else:
            assert model.predict(new).tolist() == [found.joined.classes[int(code)] for code in expected]


def test_files_of_others_with_our_names_stay(tables, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    found = probe_labels(*tables, "kind", person="id")
    for name in ("report.md", "predictions.csv", "model.safetensors"):
        (folder / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name} is of another program: choose a new folder"):
            own.write_probe(found, folder)
        assert (folder / name).read_text() == "mine"
        (folder / name).unlink()
    own.write_probe(found, folder)
    (folder / "model.safetensors").unlink()  # stopped before it was there
    own.write_probe(found, folder)
    own.write_probe(found, folder)


def test_a_class_that_the_other_table_lacks_is_not_given_to_others(tmp_path):
    rng, kinds = np.random.default_rng(0), np.repeat(["a", "b", "c"], 30)
    vectors = rng.standard_normal((90, 4)) + 8 * np.eye(4)[np.repeat([0, 1, 2], 30)]
    files = tuple(f"{n}.jpg" for n in range(90))
    labels = pd.DataFrame({"file": files, "kind": kinds})
    without = [n for n in range(90) if kinds[n] != "b"]
    other = Embeddings(tuple(files[n] for n in without), rng.standard_normal((60, 4)), name="other")
    found = probe_labels(Embeddings(files, vectors, encoder="toy"), labels, "kind", against={"other": other})
    own.write_probe(found, tmp_path / "model")
    model = LabelModel.load(tmp_path / "model")
    assert model.about["classes"] == ["a", "c"]
    assert (model.predict(vectors[without]) == kinds[without]).mean() > 0.95


def test_what_is_written_and_read_again(tables, tmp_path):
    out = tmp_path / "probe"
    said = mefem("probe", *tables, "--target", "y", "--person", "id", "--group", "sex", "-o", out).stdout
    assert (
        "y: r2 0." in said
        and "119 photographs of 60 people, 5 folds)" in said
        and "sex f: MAE" in said
        and "better than an untrained encoder? --against random --photographs FOLDER" in said
    )
    written = pd.read_csv(out / "predictions.csv", dtype={"person": str})
    assert (
        list(written) == ["file", "person", "fold", "target", "prediction"]
        and written.person[0] == "000"
        and len(written) == 119
    )
    assert (
        "photographs without an embedding: 1 (P007.JPG: no face)" in (out / "report.md").read_text()
        and said.split("\n")[2] in said
    )
    mefem("predict", out, tables[0], "-o", tmp_path / "new.csv")
    new = pd.read_csv(tmp_path / "new.csv")
    assert new.prediction.notna().sum() == 119 and new.status[7] == "no face" and len(new) == N
    truth = pd.read_csv(tables[1]).y
    assert np.corrcoef(new.prediction.drop(7), truth.drop(7))[0, 1] > 0.6
    mefem(
        "predict", out, tables[0], "-o", tmp_path / "new.csv"
    )  # its own file may be replaced, and so may its own folder
    mefem("probe", *tables, "--target", "kind", "--person", "id", "-o", out)
    assert set(pd.read_csv(out / "predictions.csv").prediction) <= {"high", "low"}


def test_json_alone(tables):
    found = json.loads(
        mefem("probe", *tables, "--target", "y", "--person", "id", "--against", tables[0], "--json").stdout
    )
    assert (
        found["photographs"] == 119
        and found["people"] == 60
        and found["left_out"] == {"photographs without an embedding": 1}
    )
    assert (
        found["metrics"]["r2"]["low"] < found["metrics"]["r2"]["value"]
        and found["against"][str(tables[0])]["verdict"] == "inconclusive"
    )


def test_a_model_is_not_given_another_encoders_embeddings(tables, tmp_path):
    out = tmp_path / "probe"
    own.write_probe(probe_labels(*tables, "y"), out)
    for change, words in (
        (dict(encoder="other"), "encoder is 'other', the model was fitted to 'toy'"),
        (dict(features="patches"), "features is 'patches', the model was fitted to 'cls'"),
        (
            dict(scale="1.13"),
            "crops are 1.13 times .* those of the model were 2.0 times; embed with --scale 2.0",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            predict_labels(
                out,
                Embeddings(("a.jpg",), np.zeros((1, 6)), **({"encoder": "toy", "features": "cls"} | change)),
            )
    with pytest.raises(ValueError, match="embeddings of 7 numbers, the model was fitted to 6"):
        predict_labels(out, Embeddings(("a.jpg",), np.zeros((1, 7)), encoder="toy", features="cls"))
    (tmp_path / "bad.safetensors").write_bytes(b"no model")
    for model, words in (
        (tmp_path / "bad.safetensors", "is no model of"),
        (tmp_path, "no model; expected the folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            LabelModel.load(model)


def test_the_hash_of_the_weights_decides_not_the_name(tables, tmp_path, capsys):
    """A retrained encoder in a file of the same name is another; a renamed file is the same."""
    table = pd.read_parquet(tables[0]).assign(encoder_hash="aaaa")
    table.to_parquet(tables[0])
    out = own.write_probe(probe_labels(*tables, "y"), tmp_path / "probe")
    assert LabelModel.load(out).about["encoder_hash"] == "aaaa"
    one = dict(features="cls", encoder="toy")
    retrained = Embeddings(("a.jpg",), np.zeros((1, 6)), **one, encoder_hash="bbbb")
    with pytest.raises(
        ValueError, match="encoder hash is 'bbbb', the model was fitted to 'aaaa'.*encoder, toy"
    ):
        predict_labels(out, retrained)
    renamed = Embeddings(("a.jpg",), np.zeros((1, 6)), features="cls", encoder="moved", encoder_hash="aaaa")
    assert len(predict_labels(out, renamed)) == 1
    assert capsys.readouterr().out == ""
    assert len(predict_labels(out, Embeddings(("a.jpg",), np.zeros((1, 6)), **one))) == 1
    assert (
        "embeddings has no hash of its encoder's weights: compared by its name only"
        in capsys.readouterr().out
    )


def test_an_encoder_compared_with_itself_is_said(tables, tmp_path):
    table = pd.read_parquet(tables[0])
    table.assign(encoder_hash="aaaa").to_parquet(tables[0])
    for name, digest, said in (("same", "aaaa", True), ("other", "bbbb", False), ("old", "", False)):
        table.assign(encoder_hash=digest).to_parquet(tmp_path / f"{name}.parquet")
        (line,) = map(str, probe_labels(*tables, "y", [tmp_path / f"{name}.parquet"]).against)
        assert ("both tables hold the same encoder's embeddings" in line) is said


def test_the_command_refuses_what_does_nothing(tables, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    features = tmp_path / "features"
    features.mkdir()
    for arguments, words in (
        ([*tables], "--target is missing"),
        ([tables[0], "--target", "y"], "LABELS is missing"),
        (
            [*tables, "--target", "y", "--task", "bmi", "--epochs", 3],
            "no folder of data/features, which goes with --task, --epochs",
        ),
        ([features, tables[1], "--target", "y", "--json"], "goes with LABELS, --target, --json"),
        ([features, "--task", "bmi"], "no features of"),
        ([*tables, "--target", "y", "-o", tmp_path / "full"], "holds other things, such as mine.txt"),
        ([*tables, "--target", "y", "-o", tables[1]], "is a file: expected a folder"),
        (
            [*tables, "--target", "y", "--against", "random"],
            "--against random computes the baseline by itself: give --photographs FOLDER",
        ),
    ):
        result = mefem("probe", *arguments, code=1)
        assert words in result.stderr and result.stderr.count("\n") == 1 and not result.stdout, result.stderr
    own.write_probe(probe_labels(*tables, "y"), tmp_path / "probe")
    for out, words in ((tables[1], "holds no predictions"), (tmp_path / "p.parquet", "ending in .csv")):
        assert words in mefem("predict", tmp_path / "probe", tables[0], "-o", out, code=1).stderr
    assert tables[1].read_text().startswith("Image,id,y") and (tmp_path / "full" / "mine.txt").exists()


def test_help_has_an_example():
    assert (
        "mefem probe embeddings.parquet labels.csv --target BMI --person id --group sex -o probe/\n"
        in mefem("probe", "--help").output
    )
    assert "mefem predict probe/ new.parquet -o predictions.csv\n" in mefem("predict", "--help").output


def test_baselines_are_computed_from_the_photographs(tmp_path):
    """`--against random` and `pixels` give what embedding by hand gives, of crops as the table has them."""
    from PIL import Image

    from mefem.embedding import embed, embed_photographs
    from mefem.encoders import PixelEncoder, load_encoder
    from mefem.models import create_encoder, save_encoder

    kwargs = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=1)
    file = save_encoder(tmp_path / "e.safetensors", create_encoder(**kwargs), "vit_small_patch16_224", kwargs)
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    pixels = rng.integers(0, 256, (40, 32, 32, 3), np.uint8)
    pixels[:, 0] = np.linspace(0, 255, 40, dtype=np.uint8)[:, None, None]
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(photos / f"{number:02}.png")
    table = tmp_path / "e.parquet"
    embed_photographs(photos, file, table, framing="as-is", progress=False)
    random = own.baseline("random", table, photos, str(file))
    expected = embed(pixels, load_encoder(f"random:{file}"), "mean")
    np.testing.assert_allclose(random.vectors, expected, atol=1e-4)
    pca = PixelEncoder().fit(embed_size(pixels))
    np.testing.assert_allclose(
        own.baseline("pixels", table, photos).vectors, embed(embed_size(pixels), pca, "mean"), atol=1e-3
    )
    labels = tmp_path / "labels.csv"
    pd.DataFrame({"file": [f"{n:02}.png" for n in range(40)], "y": np.arange(40) + 0.5}).to_csv(
        labels, index=False
    )
    asked = ["probe", table, labels, "--target", "y", "--against", "random", "--against", "pixels"]
    said = mefem(*asked, "--photographs", photos, "-e", file).stdout
    assert "against random (r2" in said and "against pixels (r2" in said
    for more, words in (
        ([], "give --photographs FOLDER"),
        (["--photographs", photos], "give --encoder FILE"),
        (["--photographs", tmp_path, "-e", file], "missing file"),
    ):
        assert words in mefem(*asked, *more, code=1).stderr
    # the labels are read first: nothing is embedded for nothing
    wrong = ["probe", table, labels, "--target", "z", "--against", "random"]
    assert "no column 'z'" in mefem(*wrong, code=1).stderr
    other = save_encoder(
        tmp_path / "other.safetensors", create_encoder(**kwargs), "vit_small_patch16_224", kwargs
    )
    said = mefem(*asked, "--photographs", photos, "-e", other, code=1).stderr
    assert "are not those that --encoder gives" in said
    said = mefem("probe", table, labels, "--target", "y", "--photographs", photos, code=1).stderr
    assert "does nothing without --against" in said


def test_a_face_is_framed_again_as_it_was(tmp_path, shared):
    """Boxes of the table give the crops that detection gave, bit for bit."""
    from mefem.embedding import embed_photographs
    from mefem.encoders import PixelEncoder
    from mefem.faces import frame_faces

    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted((shared / "frll").rglob("*.jpg"))[:3]:
        (photos / path.name).symlink_to(path)
    pixels = PixelEncoder(components=2).fit(
        np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    )
    embed_photographs(photos, pixels, tmp_path / "e.csv", framing="auto", progress=False)
    frames = own._frames(tmp_path / "e.csv")
    assert len(frames) == 3 and set(frames.status) == {"success"}
    for row in frames.itertuples():
        (framed,) = frame_faces(photos / row.file, "auto", size=64)
        np.testing.assert_array_equal(own.crop_again(row, photos, 64), framed.crop)


def test_baselines_of_the_starter_get_its_crops(tmp_path, shared):
    """mefem-starter's faces are tight (scale 1.13): both baselines see the same ones."""
    from mefem import FaceEmbedder
    from mefem.crop import Framing
    from mefem.embedding import embed, embed_photographs
    from mefem.encoders import STARTER, STARTER_FOLDER, load_encoder

    photos = sorted((shared / "frll").glob("*.jpg"))[:3]
    (tmp_path / "photos").mkdir()
    for path in photos:
        (tmp_path / "photos" / path.name).symlink_to(path)
    for name, scale in (("e.parquet", None), ("wide.csv", 2.0), ("e.npz", None)):
        table, asked = tmp_path / name, {} if scale is None else {"scale": scale}
        found = embed_photographs(tmp_path / "photos", STARTER, table, device="cpu", progress=False, **asked)
        assert set(found.scale) == {scale or 1.13}
        how = Framing(framing="auto", scale=scale or 1.13, size=112)
        crops = np.stack([how.of(path)[0].crop for path in photos])
        random = own.baseline("random", table, tmp_path / "photos", STARTER)
        expected = embed(crops, load_encoder(f"random:{STARTER_FOLDER}", device="cpu"), "mean")
        np.testing.assert_allclose(random.vectors, expected, atol=1e-4)
        assert random.encoder == f"random:{STARTER}"
        for row, crop in zip(own._frames(table).itertuples(), crops, strict=True):
            np.testing.assert_array_equal(own.crop_again(row, tmp_path / "photos", 112), crop)
        vectors = read_embeddings(table).vectors
        same = np.allclose(vectors, FaceEmbedder(device="cpu").fit_transform(photos), atol=1e-4)
        assert same == (scale is None)


def embed_size(pixels):
    """Crops as `crop_again` gives them at the size of the pixels' encoder."""
    import io

    from PIL import Image

    from mefem.faces import frame_faces

    found = []
    for picture in pixels:
        Image.fromarray(picture).save(data := io.BytesIO(), "PNG")
        data.seek(0)
        found.append(frame_faces(Image.open(data), "as-is", size=64)[0].crop)
    return np.stack(found)
