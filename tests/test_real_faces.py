"""The profile `faces`: its data sets as their authors publish them, its tasks, and its table."""

import json

import pytest

from mefem.config import SettingsError, load_settings
from mefem.datasets.bmi import Reader
from mefem.datasets.core import DatasetError
from mefem.probing import TASKS
from mefem.report import FACES


def vip(root, text, names=("f_001.jpg", "m_002.JPG")):
    """A source laid out as the VIP attribute set."""
    (root / "vip" / "images").mkdir(parents=True)
    (root / "vip" / "annotation.csv").write_text("image,height,weight,BMI\n" + text)
    for name in names:
        (root / "vip" / "images" / name).write_bytes(b"picture")
    return root


def photographs(root):
    """All of the reader's, in order."""
    reader = Reader()
    return [photo for unit in reader.units(root) for photo in reader.read(root, unit)]


def test_the_vip_set_is_read_as_published(tmp_path):
    root = vip(tmp_path, "f_001,1.55,61.0,25.39\nm_002,1.80,81,25\nf_003,1.7,60,\n")
    first, second, third = photographs(root)
    assert Reader().state(root) == ("present", "vip") and Reader().original(root) == 3
    assert (first.labels["sex"], first.labels["height_cm"], first.labels["bmi"]) == ("female", 155, 25.39)
    assert second.data == b"picture" and second.labels["person"] == "vip/m_002"
    assert third.problem == "missing photograph"


@pytest.mark.parametrize("row", ["f_001,155,61,25.39", "f_001,1.55,61,31", "x_001,1.55,61,25.39"])
def test_a_vip_row_that_cannot_be_is_named(tmp_path, row):
    with pytest.raises(DatasetError, match="annotation.csv, line 2"):
        photographs(vip(tmp_path, row + "\n"))


def test_own_labels_come_before_the_vip_layout(tmp_path):
    root = vip(tmp_path, "f_001,1.55,61.0,25.39\n")
    (root / "vip" / "labels.csv").write_text(
        "image,height,weight,bmi,sex,person\nf_001.jpg,160,64,25,f,a\nm_002.JPG,180,81,25,m,b\n"
    )
    assert Reader().original(root) == 2


def test_the_profile_has_real_photographs_and_its_tasks(root):
    settings = load_settings(root / "params.yaml", "faces")
    assert not settings.active.simulate.photographs and settings.active.pretrain.datasets == ("fairface",)
    assert settings.active.pretrain.runtime.probe and set(settings.beyond["faces"]) <= set(TASKS)
    shown = {column.task for column in FACES.columns}
    assert {*settings.beyond["faces"], "fairface-age", "bmi"} == shown


def test_tasks_of_a_profile_that_does_not_exist(root, tmp_path):
    text = (root / "params.yaml").read_text().replace("beyond:\n  faces:", "beyond:\n  facs:")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(SettingsError, match="no such profile: facs"):
        load_settings(tmp_path / "params.yaml")


def test_the_classes_are_those_of_the_lists():
    from mefem.labels import FAIRFACE_CLASSES

    for name in ("age", "gender", "race"):
        assert len(TASKS[f"fairface-{name}"].classes) == len(FAIRFACE_CLASSES[name])
    assert json.dumps([row.name for row in FACES.rows]).count("as published") == 1
