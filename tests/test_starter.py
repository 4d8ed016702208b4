"""The encoder in the package: offline, what its card says, and the crops it is asked for."""

import importlib.util
import json

import numpy as np
import pytest

from mefem import FaceEmbedder, load_encoder
from mefem.crop import Framing
from mefem.encoders import STARTER, STARTER_FOLDER, say_starter


@pytest.fixture(scope="module")
def tool(script):
    return script("benchmarks/starter.py")


def test_it_loads_by_name_from_anywhere_and_says_once_what_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    say_starter.cache_clear()
    encoders = [load_encoder(STARTER, device="cpu") for _ in range(2)]
    said = capsys.readouterr().err
    assert said.count("mefem-starter") == 1 and "--fetch mefem-b" in said
    assert encoders[0].weights_hash() == encoders[1].weights_hash()
    assert (encoders[0].tokens, encoders[0].dim, encoders[0].image_size) == (197, 192, 112)
    assert sum(path.stat().st_size for path in STARTER_FOLDER.iterdir()) < 12 * 2**20


def test_it_is_the_default_and_takes_crops_as_tight_as_its_own(monkeypatch):
    assert FaceEmbedder().encoder == STARTER
    asked = []
    monkeypatch.setattr(Framing, "__post_init__", lambda self: asked.append(self.scale))
    FaceEmbedder(device="cpu").fit([])
    assert asked == [1.13]


def test_the_card_is_written_from_the_result_files(tool):
    found = json.loads(tool.FOUND.read_text())
    text = (STARTER_FOLDER / "README.md").read_text(encoding="utf-8")
    assert text == tool.card(found, tool.facts_of(STARTER_FOLDER))
    assert f"| gender, accuracy | {found['scores']['starter']['gender']:.3f} |" in text


def test_the_page_of_groups_is_written_from_the_result_file(tool):
    found = json.loads(tool.FOUND.read_text())
    text = (tool.FOUND.parent / "who_it_works_for.md").read_text(encoding="utf-8")
    assert text == tool.page(found)
    for axes in found["groups"].values():
        for rows in axes.values():
            assert sum(row["photographs"] for row in rows.values()) == found["counts"]["unseen"]
            assert all(row["low"] <= row["starter"] <= row["high"] for row in rows.values())


def test_groups_count_who_was_hit_and_a_planted_gap_is_beyond_noise(tool):
    people = {
        "race": np.repeat(["A", "B"], 200),
        "gender": np.tile(["F", "M"], 200),
        "age": np.repeat("3-9", 400),
    }
    hit = np.concatenate([np.ones(200), np.zeros(200)]).astype(bool)

    class Hits(dict):
        files = ("gender", "bmi")

    found = tool.by_group(dict.fromkeys(("starter", "untrained", "pixels"), Hits(gender=hit)), people)
    assert list(found) == ["gender"]
    assert found["gender"]["race"]["A"]["right"] == 200 and found["gender"]["race"]["B"]["starter"] == 0
    assert set(found["gender"]["race and gender"]) == {"A, f", "A, m", "B, f", "B, m"}
    assert tool.gap_of(found["gender"]["race"], "photographs", "right") < 1e-9
    assert tool.gap_of(found["gender"]["gender"], "photographs", "right") > 0.9


def test_the_card_says_better_only_where_the_interval_does(tool):
    found = json.loads(tool.FOUND.read_text())
    found["gaps"]["bmi"]["untrained"] = [0.1, -0.01, 0.2]
    assert "no better than the untrained network" in tool.card(found, tool.facts_of(STARTER_FOLDER))


def test_pictures_of_noise_get_finite_embeddings():
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 255, (3, 90, 90, 3), dtype=np.uint8))
    found = FaceEmbedder(detect=False, device="cpu").fit_transform(pictures)
    assert found.shape == (3, 192) and np.isfinite(found).all() and np.ptp(found, axis=0).max() > 0


def test_the_card_of_an_export_names_its_crops(tmp_path):
    from mefem.export import export_encoder

    export_encoder(STARTER, tmp_path / "starter", "timm")
    card = (tmp_path / "starter" / "README.md").read_text(encoding="utf-8")
    assert "`mefem crop photos/ -o crops/ --scale 1.13`" in card and "twice" not in card


def test_an_export_that_was_not_loaded_is_not_said_to_be_right(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from mefem.cli import app

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else real(name, *rest)
    )
    said = CliRunner().invoke(app, ["export", STARTER, "-o", str(tmp_path / "hf"), "--to", "hf"]).stdout
    assert "unchecked: transformers is not here" in said and "gives" not in said


def test_its_untrained_network_has_its_shape_and_its_crops():
    fresh, ours = load_encoder(f"random:{STARTER}", device="cpu"), load_encoder(STARTER, device="cpu")
    assert (fresh.tokens, fresh.dim, fresh.face_scale) == (ours.tokens, ours.dim, ours.face_scale)
    assert fresh.weights_hash() != ours.weights_hash() and fresh.name == "random:mefem-starter"
