"""The options of the crop stage.

Its work on data sets is tested with the readers, on folders mostly with the embeddings."""

from dataclasses import asdict

import pytest
from PIL import Image

import mefem.crop
from mefem.config import CropSettings
from mefem.crop import Cropping, Framing, crop_photographs
from mefem.datasets.core import DatasetError


def test_defaults_of_the_crop_stage_are_those_of_the_settings():
    settings, defaults = CropSettings().model_dump(), asdict(Cropping())
    assert settings.pop("framing") == {} and defaults.pop("framing") is None
    assert settings == defaults


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="min_sides"):
        Cropping(min_sides=64)
    with pytest.raises(DatasetError, match="framing 'tight': expected 'paper' or 'dataset'"):
        Cropping(framing="tight")
    with pytest.raises(ValueError, match="framing 'tight' is unknown"):
        Framing(framing="tight")


@pytest.mark.parametrize("changed", ["nothing", "a photograph", "a crop", "the size"])
def test_a_folders_crops_go_on_after_a_kill(tmp_path, monkeypatch, changed):
    """The second call crops what is left and what changed, and ends as a call that nothing stopped."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(6):
        Image.new("RGB", (40, 40), (number * 40,) * 3).save(photos / f"{number}.png")
    (photos / "1.png").write_bytes(b"no picture")
    done, real = [], mefem.crop._crop_file

    def stopped(path, target, how):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(path.name)
        return real(path, target, how)

    how = {"jobs": 1, "progress": False, "framing": "as-is", "size": 32}
    monkeypatch.setattr(mefem.crop, "_crop_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        crop_photographs(photos, tmp_path / "out", **how)
    assert done == ["0.png", "1.png", "2.png"]
    if changed == "a photograph":
        Image.new("RGB", (41, 41), "red").save(photos / "0.png")
    if changed == "a crop":
        (tmp_path / "out" / "0.jpg").unlink()
    how["size"] += changed == "the size"
    again = []
    monkeypatch.setattr(
        mefem.crop, "_crop_file", lambda path, *rest: (again.append(path.name), real(path, *rest))[1]
    )
    counts = crop_photographs(photos, tmp_path / "out", **how)
    before = {"nothing": [], "the size": ["0.png", "1.png", "2.png"]}.get(changed, ["0.png"])
    assert again == [*before, "3.png", "4.png", "5.png"] and counts == {"usable": 5, "not an image": 1}
    monkeypatch.undo()
    assert crop_photographs(photos, tmp_path / "straight", **how) == counts
    found, straight = (
        {p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("out", "straight")
    )
    assert found == straight
