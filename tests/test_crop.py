"""The options of the crop stage.

Its work on data sets is tested with the readers, on folders mostly with the embeddings."""

import os
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

import mefem.crop
from mefem.config import CropSettings
from mefem.crop import Cropping, Framing, crop_photographs
from mefem.datasets.core import DatasetError
from mefem.faces import visible_files


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


def photographs(folder: Path, *values) -> Path:
    folder.mkdir(parents=True)
    for value in values:
        Image.new("RGB", (40, 40), (value,) * 3).save(folder / f"{value}.png")
    return folder


def test_crops_of_another_folder_of_the_same_name_stay(tmp_path, monkeypatch):
    for name in "AB":
        photographs(tmp_path / name / "photos", 10, 20)
    how = {"jobs": 1, "progress": False, "framing": "as-is", "size": 32}
    monkeypatch.chdir(tmp_path / "A")
    crop_photographs(Path("photos"), Path("../out"), **how)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.chdir(tmp_path / "B")
    with pytest.raises(ValueError, match="holds crops of the photographs in .*A/photos"):
        crop_photographs(Path("photos"), Path("../out"), **how)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "moved").mkdir()
    for name in ("A", "out"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    monkeypatch.chdir(tmp_path / "moved" / "A")  # moved together they still belong together
    assert crop_photographs(Path("photos"), Path("../out"), **how) == {"usable": 2}


def test_a_link_to_a_folder_is_followed_once_and_never_in_a_circle(tmp_path):
    photos = photographs(tmp_path / "photos", 10)
    photographs(tmp_path / "disk", 20, 30)
    photographs(photos / "below", 40)
    for name, target in {
        "one": "disk",
        "two": "disk",
        "up": ".",
        "self": "photos",
        "in": "photos/below",
    }.items():
        (photos / name).symlink_to(tmp_path / target)
    names = [path.relative_to(photos).as_posix() for path in visible_files(photos)]
    linked = {name for name in names if "disk" in str((photos / name).resolve())}
    assert len(names) == 4 and len(linked) == 2
    how = {"jobs": 1, "progress": False, "framing": "as-is", "size": 32}
    for _ in range(2):
        assert crop_photographs(photos, tmp_path / "out", **how) == {"usable": 4}


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    photos, real = photographs(tmp_path / "photos" / "share", 10).parent, os.scandir

    def fails(path):
        if str(path).endswith("share"):
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(ValueError, match="share cannot be read: Input/output error"):
        visible_files(photos)


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
