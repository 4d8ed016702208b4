"""The recipe study: its method against JEPA and against formulas, and its runs on a few pictures of noise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.special import logsumexp

from mefem.beyond import ViewsJEPA, info_nce, load_idea, recolour, sigreg, stray
from mefem.config import PretrainSettings
from mefem.jepa import JEPA, normalise_targets
from mefem.masking import StripeMasking, TokenSplit
from mefem.models import Predictor, create_encoder, encode_tokens
from mefem.training import optimiser_of
from mefem.weighting import circular_weights

ROOT = Path(__file__).resolve().parent.parent
KWARGS = dict(img_size=112, patch_size=8, embed_dim=32, depth=2, num_heads=2)


def tiny(method=JEPA, **options):
    torch.manual_seed(0)
    predictor = Predictor(32, 14, dim=16, depth=1, heads=2)
    return method(create_encoder(**KWARGS), predictor, StripeMasking(), circular_weights(), **options)


def early(**options):
    return tiny(load_idea("ideas/early.py:EarlyJEPA"), **options)


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 112, 112, generator=torch.Generator().manual_seed(0))


def seeded():
    return torch.Generator().manual_seed(1)


def test_with_its_defaults_it_is_jepa(images):
    ours, plain = early()(images, seeded()), tiny()(images, seeded())
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_several_splits_are_rows_of_one_batch_and_share_the_teacher(images):
    jepa = early(splits=3)
    split = jepa.masking.sample(12, seeded())
    passes = []
    jepa.teacher.norm.register_forward_hook(lambda module, args, out: passes.append(len(out)))
    loss = jepa(images, splits=[split])["loss"]
    assert passes == [4]  # one pass of the four pictures
    parts = [TokenSplit(*(index[i : i + 4] for index in split)) for i in (0, 4, 8)]
    separate = torch.stack([tiny()(images, splits=[part])["loss"] for part in parts])
    torch.testing.assert_close(loss, separate.mean(), rtol=1e-5, atol=1e-7)


def test_targets_are_averaged_over_the_last_blocks(images):
    jepa = early(blocks=2)
    encoder, x = jepa.teacher, None
    with torch.no_grad():
        x = encoder.patch_embed(images)
        x = torch.cat([encoder.cls_token.expand(4, -1, -1), x], 1) + encoder.pos_embed
        first = encoder.blocks[0](x)
        second = encoder.blocks[1](first)
        expected = (normalise_targets(first) + normalise_targets(second)) / 2
    torch.testing.assert_close(jepa.encode_picture(images), expected, rtol=1e-4, atol=1e-5)


def test_the_penalty_is_sigreg_of_the_mean_source_tokens(images):
    jepa, split = early(penalty=0.3), StripeMasking().sample(4, seeded())
    found = jepa(images, seeded(), splits=[split])["loss"]
    loss = tiny()(images, splits=[split])["loss"]
    means = encode_tokens(jepa.student, images, split.source).mean(1)
    expected = 0.7 * loss + 0.3 * sigreg(means[:, None], generator=seeded())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    found.backward()
    assert all(parameter.grad is None for parameter in jepa.teacher.parameters())


def test_student_and_teacher_see_the_same_straying_crop(images):
    split = StripeMasking().sample(4, seeded())
    found = early(area=0.5)(images, seeded(), splits=[split])["loss"]
    expected = tiny()(stray(images, 0.5, seeded()), splits=[split])["loss"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{"splits": 0}, {"blocks": 3}, {"penalty": 1.0}, {"area": 0.0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="expected splits >= 1, 1 <= blocks <= 2"):
        early(**options)


def views(**options):
    return tiny(ViewsJEPA, **options)


def test_info_nce_is_the_mean_cross_entropy_over_log_b():
    a, b = torch.randn(2, 6, 5, generator=seeded()).double().unbind()
    cosine = (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T / 0.3
    rows = [logsumexp(cosine[i]) - cosine[i, i] for i in range(6)]
    columns = [logsumexp(cosine[:, i]) - cosine[i, i] for i in range(6)]
    expected = (np.mean(rows) + np.mean(columns)) / 2 / np.log(6)
    assert info_nce(a, b, 0.3).item() == pytest.approx(float(expected), rel=1e-9)
    same = torch.ones(6, 5)
    assert info_nce(same, same, 0.3).item() == pytest.approx(1)  # guessing
    with pytest.raises(ValueError, match="at least 2"):
        info_nce(a[:1], b[:1], 0.3)


def test_a_box_of_the_whole_picture_is_the_picture_or_its_mirror(images):
    found = stray(images.repeat(4, 1, 1, 1), 1.0, seeded())
    mirrored = 0
    for picture, whole in zip(found, images.repeat(4, 1, 1, 1), strict=True):
        if not torch.allclose(picture, whole, atol=1e-3):
            torch.testing.assert_close(picture, whole.flip(-1), atol=1e-3, rtol=0)
            mirrored += 1
    assert 0 < mirrored < 16


def test_boxes_have_the_area_asked_for_and_stay_inside():
    """A ramp in x and one in y say which part of the picture is seen."""
    line = torch.linspace(-1, 1, 112)
    ramps = torch.stack([line.expand(112, 112), line[:, None].expand(112, 112), torch.zeros(112, 112)])
    found = stray(ramps.expand(300, -1, -1, -1), 0.3, seeded())
    span = found[:, :2].amax((2, 3)) - found[:, :2].amin((2, 3))  # [300, 2], 2 is the whole side
    area = span.prod(1) / 4
    assert 0.27 < area.min() < 0.4 and 0.9 < area.max() <= 1.001
    assert found.abs().max() <= 1.001


def test_colours_change_unless_they_are_to_stay(images):
    assert torch.equal(recolour(images, 0.0, seeded()), images)
    many = recolour(images[:1].repeat(500, 1, 1, 1), 0.4, seeded())
    spread = (many - many.mean(1, keepdim=True)).std((1, 2, 3))  # what is left of colour
    light = many.mean((2, 3)).std(0)
    assert 0.1 < (spread < 0.3 * spread.max()).float().mean() < 0.6 and (light > 0.2).all()


def test_the_loss_is_the_papers_and_that_of_two_views(images):
    jepa, split = views(weight=0.3), StripeMasking().sample(4, seeded())
    found = jepa(images, seeded(), splits=[split])["loss"]
    generator = seeded()
    both = [jepa.head(jepa.view(images, generator).mean(1)) for _ in range(2)]
    expected = 0.7 * tiny()(images, splits=[split])["loss"] + 0.3 * info_nce(*both, 0.2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert jepa.view(images).shape == (4, 1 + 98, 32)  # CLS and half of the patches


def test_without_the_papers_prediction_nothing_of_it_is_trained(images):
    jepa = views(weight=1.0)
    jepa(images, seeded())["loss"].backward()
    trained = {
        id(p) for group in optimiser_of(jepa, PretrainSettings()).param_groups for p in group["params"]
    }
    parts = (jepa.student, jepa.head)
    assert trained == {id(p) for part in parts for p in part.parameters() if p.requires_grad}
    assert all(p.grad is not None for p in jepa.head.parameters())


@pytest.mark.parametrize(
    "options", [{"weight": 0}, {"keep": 0}, {"area": 1.5}, {"colour": 1}, {"temperature": 0}]
)
def test_impossible_options_of_views_are_refused(options):
    with pytest.raises(ValueError, match="ViewsJEPA: expected"):
        views(**options)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, script):
    """A pack of 24 + 12 pictures of noise, and twelve people with a body mass index."""
    folder, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    tool = script("tools/gpu_faces.py")
    lists, rows = folder / "lists", []
    (folder / "images").mkdir()
    for split, count in (("train", 24), ("val", 12)):
        (lists / split).mkdir(parents=True)
        table = pd.DataFrame({"file": [f"{split}/{i}.jpg" for i in range(count)]})
        for file in table.file:
            Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(lists / file)
        table["age"], table["gender"], table["race"] = "3-9", "Male", "White"
        table.loc[::2, ["age", "gender", "race"]] = "20-29", "Female", "Black"
        table.to_csv(lists / f"fairface_label_{split}.csv", index=False)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(folder / f"images/f_{i}.jpg")
        rows.append({"image": f"f_{i}", "BMI": 20.0 + i})
    pd.DataFrame(rows).to_csv(folder / "annotation.csv", index=False)
    tool.pack(lists, lists, folder / "pack")
    return folder


def test_a_run_is_probed_from_its_start_and_is_not_made_twice(inputs, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "recipe.py", "run", "--pack", inputs / "pack"]
    command += ["--bmi", inputs, "--work", tmp_path / "work", "--only", "paper", "--minutes", "0.02"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run():
        return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)

    first = run()
    assert first.returncode == 0, first.stderr
    (folder,) = (tmp_path / "work").glob("paper-*")
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [rows[1]["step"] * i for i in range(5)]
    assert rows[0]["core_minutes"] == 0 < rows[-1]["core_minutes"]
    assert rows[-1]["pictures"] == rows[-1]["step"] * 32
    assert {"gender", "race", "age", "bmi", "token_rank", "position_share"} <= set(rows[-1])
    with np.load(folder / f"people-{rows[-1]['step']}.npz") as people:
        assert people["gender"].mean() == pytest.approx(rows[-1]["gender"], abs=1e-4)
    when = (folder / "result.json").stat().st_mtime_ns
    assert run().returncode == 0
    assert (folder / "result.json").stat().st_mtime_ns == when
    work = ["--bmi", inputs, "--work", tmp_path / "work"]
    heads = [*command[:2], "heads", *command[3:]]
    collect = [*command[:2], "collect", *work, "--out", tmp_path / "r.json"]
    for part in (heads, collect):
        done = subprocess.run(list(map(str, part)), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert set(found["paper_head"]) == {"pixels", "untrained-seed0", folder.name}
    paper = {(row["task"], row["against"]): row for row in found["compared"] if row["head"] == "paper"}
    for against, name in {"untrained": "untrained-seed0", "pixels": "pixels"}.items():
        gap = found["paper_head"][folder.name]["race"] - found["paper_head"][name]["race"]
        assert paper["race", against]["value"] == pytest.approx(gap, abs=2e-4)
    by = {(row["task"], row["against"]): row for row in found["compared"] if row["head"] == "ridge"}
    untrained = json.loads((tmp_path / "work" / "untrained-seed0.json").read_text())
    gap = by["race", "untrained"]
    assert gap["value"] == pytest.approx(rows[-1]["race"] - untrained["race"], abs=2e-4)
    assert gap["low"] <= gap["value"] <= gap["high"]
    assert by["bmi", "untrained"]["value"] == pytest.approx(rows[-1]["bmi"] - untrained["bmi"], abs=2e-4)
