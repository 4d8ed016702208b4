"""The command `mefem`, run as a person would: real photographs where they are at hand, simulated ones
elsewhere."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from test_faces import cartoon
from typer.testing import CliRunner

from mefem.cli import app
from mefem.config import ProbingSettings
from mefem.models import create_encoder, save_encoder
from mefem.provenance import stage_durations
from mefem.shards import read_labels, read_manifest

KWARGS = dict(img_size=112, patch_size=8, embed_dim=32, depth=1, num_heads=1)


def mefem(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + result.stderr + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    return save_encoder(
        tmp_path_factory.mktemp("e") / "encoder.safetensors",
        create_encoder(**KWARGS),
        "vit_small_patch16_224",
        KWARGS,
    )


def test_help_of_every_command():
    for command in (
        [],
        ["simulate"],
        ["crop"],
        ["pretrain"],
        ["embed"],
        ["probe"],
        ["predict"],
        ["finetune"],
        ["info"],
        ["info", "data"],
    ):
        assert "Usage" in mefem(*command, "--help").output


def test_crop_and_embed_real_portraits(shared, tmp_path, encoder_file):
    crops = tmp_path / "crops"
    output = mefem("crop", shared / "frll", "-o", crops).output
    assert "24  usable" in output
    assert len(list(crops.glob("*.jpg"))) == 24
    assert all(Image.open(p).size == (224, 224) for p in crops.glob("*.jpg"))
    mefem("embed", shared / "frll", "-o", tmp_path / "e.parquet", "-e", encoder_file)
    table = pd.read_parquet(tmp_path / "e.parquet")
    assert (table.status == "success").sum() == 24 and np.stack(table.embedding).shape == (24, 32)
    assert np.stack(table.embedding).std(0).max() > 0


def test_faces_that_fill_their_pictures_are_used(shared, tmp_path, encoder_file):
    """Photographs that are face crops already: the paper's square is larger than the picture."""
    (tmp_path / "vip").mkdir()
    for path in sorted((shared / "bmi/vip/images").iterdir())[:12]:
        (tmp_path / "vip" / path.name).symlink_to(path)
    paper = ("--jobs", 1, "--framing", "paper")
    refused = mefem("crop", tmp_path / "vip", "-o", tmp_path / "none", *paper, code=1).stderr
    assert "the others would use: shift 0, pad 12, as-is 12, auto 12" in refused
    crops = mefem("crop", tmp_path / "vip", "-o", tmp_path / "crops", "--jobs", 1).stdout
    table = mefem("embed", tmp_path / "vip", "-o", tmp_path / "e.parquet", "-e", encoder_file).stdout
    assert "12  usable" in crops and "12 of 12 photographs" in table and "(framing: as-is 12)" in table


def test_crop_and_embed_fairface_through_the_reader(shared, tmp_path, encoder_file):
    import pyarrow.parquet as pq

    for split in ("train", "validation"):  # the first rows of the real files, in their own schema
        source = shared / "fairface" / "0.25" / f"{split}-00000-of-00001.parquet"
        target = tmp_path / "raw" / "0.25" / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(source).slice(0, 60), target)
    result = mefem("crop", tmp_path / "raw", "--dataset", "fairface", "-o", tmp_path / "tight", code=1)
    assert "--framing dataset takes them as their publisher framed them" in result.stderr
    manifest = read_manifest(tmp_path / "tight")
    assert manifest["usable"] == 0 and manifest["dropped"]["leaves the picture"] > 100
    own = ("--dataset", "fairface", "--framing", "dataset", "-o")
    mefem("crop", tmp_path / "raw", *own, tmp_path / "own")
    made = sorted(path.name for path in (tmp_path / "own").iterdir())
    missing = mefem("crop", tmp_path / "rwa", *own, tmp_path / "own", code=1).stderr
    assert "rwa" in missing and sorted(path.name for path in (tmp_path / "own").iterdir()) == made
    same = mefem("crop", tmp_path / "raw", *own, tmp_path / "raw", code=1).stderr
    assert "name another folder" in " ".join(same.split())
    foreign = tmp_path / "downloads" / "00000_stats.json"  # img2dataset's names are ours
    foreign.parent.mkdir()
    foreign.write_text('{"count": 3, "successes": 3}')
    refused = mefem("crop", tmp_path / "raw", *own, foreign.parent, code=1).stderr
    assert "no `mefem crop` wrote" in " ".join(refused.split()) and foreign.exists()
    assert read_manifest(tmp_path / "own")["usable"] == 120
    assert set(read_labels(tmp_path / "own").split) == {"train", "validation"}


def test_bad_photographs_are_named_and_the_rest_unharmed(tmp_path, encoder_file):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "page.jpg").write_bytes(b"<html>not found</html>")
    Image.new("RGB", (300, 300), "grey").save(photos / "grey.png")
    result = mefem("embed", photos, "-o", tmp_path / "e.parquet", "-e", encoder_file, code=1)
    for name in ("empty.jpg", "page.jpg", "grey.png"):
        assert name in result.stderr
    mefem("embed", photos, "-o", tmp_path / "e.parquet", "-e", encoder_file, "--framing", "as-is")
    table = pd.read_parquet(tmp_path / "e.parquet").set_index("file")
    assert table.loc["grey.png", "status"] == "success" and table.loc["empty.jpg", "status"] != "success"


def test_one_picture_that_is_not_square_does_not_end_the_run(tmp_path, encoder_file):
    crops = tmp_path / "crops"
    crops.mkdir()
    for name, size in (("a.png", (112, 112)), ("b.png", (112, 90)), ("c.png", (200, 200))):
        Image.new("RGB", size, "grey").save(crops / name)
    result = mefem("embed", crops, "-o", tmp_path / "e.csv", "-e", encoder_file, "--no-detect")
    assert "b.png: not square" in result.stderr and "2 of 3 photographs" in result.output
    table = pd.read_csv(tmp_path / "e.csv")
    assert table.status.tolist() == ["success", "not square", "success"] and table.filter(
        regex="^e[0-9]"
    ).notna().sum(1).tolist() == [32, 0, 32]
    (tmp_path / "labels.csv").write_text("image,age\na.png,31\n")
    for out, words in (
        ("labels.csv", "is no table of embeddings"),
        ("e.xlsx", "ending in .parquet, .csv, .npz"),
    ):
        result = mefem("embed", crops, "-o", tmp_path / out, "-e", encoder_file, "--framing", "as-is", code=1)
        assert words in result.stderr
    assert (tmp_path / "labels.csv").read_text().startswith("image,age")


def test_nothing_usable_says_what_each_framing_would_use(tmp_path, encoder_file):
    photos = tmp_path / "photos"
    photos.mkdir()
    face = Image.fromarray(cartoon())
    for name, box in (("a", (150, 130, 362, 380)), ("b", (150, 130, 362, 342)), ("c", (0, 120, 512, 512))):
        face.crop(box).save(photos / f"{name}.png")
    said = "with --framing paper; of these 3, the others would use: shift 1, pad 3, as-is 1, auto 3\n"
    result = mefem("crop", photos, "-o", tmp_path / "crops", "--jobs", 1, "--framing", "paper", code=1)
    assert said in result.stderr and "3  leaves the picture" in result.stdout
    result = mefem(
        "embed", photos, "-o", tmp_path / "e.parquet", "-e", encoder_file, "--framing", "paper", code=1
    )
    assert said in result.stderr and "--framing pad, as-is or auto would use it" in result.stderr
    assert "(framing: " in mefem("embed", photos, "-o", tmp_path / "e.parquet", "-e", encoder_file).stdout
    assert "3  usable" in mefem("crop", photos, "-o", tmp_path / "crops", "--jobs", 1).stdout
    (photos / "b.png").unlink()
    said = "could be used with --framing as-is; the other framings look for a face, which was not done: try"
    assert (
        said
        in mefem("crop", photos, "-o", tmp_path / "crops", "--framing", "as-is", "--jobs", 1, code=1).stderr
    )


@pytest.mark.parametrize(
    "command, arguments, words",
    [
        ("crop", ["--framing", "dataset"], "name the data set by --dataset, or use as-is"),
        (
            "crop",
            ["--framing", "shift", "--dataset", "bmi"],
            "--framing shift is for a folder of photographs",
        ),
        (
            "crop",
            ["--framing", "papre"],
            "framing 'papre' is unknown, expected one of paper, shift, pad, as-is, auto",
        ),
        (
            "crop",
            ["--framing", "as-is", "--scale", "2"],
            "as-is looks for no face, so that nothing is done by --scale",
        ),
        ("crop", ["--framing", "dataset", "--dataset", "bmi", "--scale", "2"], "nothing is done by --scale"),
        ("crop", ["--dataset", "bmi", "--small-faces", "--min-score", "0.3"], "--min-score, --small-faces"),
        ("crop", ["--framing", "as-is", "--small-faces"], "nothing is done by --small-faces"),
        (
            "crop",
            ["--dataset", "bmi", "--cluster", "tcp://x:1", "--jobs", "2"],
            "workers of the cluster work, so that nothing is done by --jobs",
        ),
        ("crop", ["--cluster", "tcp://x:1"], "--cluster works on a data set"),
        ("embed", ["--framing", "as-is", "--scale", "2"], "nothing is done by --scale"),
        ("embed", ["--no-detect", "--min-score", "0.3", "--face", "surest"], "done by --face, --min-score"),
        ("embed", ["--detect", "--framing", "as-is"], "leave one of the two out"),
        ("embed", ["--no-detect", "--framing", "pad"], "leave one of the two out"),
        (
            "crop",
            ["--face", "largest", "--dataset", "bmi"],
            "the reader of bmi knows its faces; a folder has --face",
        ),
        ("crop", ["--dataset", "sfhq", "--scale", "2"], "--framing dataset looks for no face"),
        ("crop", ["--face", "all"], "crops are one per photograph"),
        ("embed", ["--face", "all", "--framing", "as-is"], "nothing is done by --face"),
        (
            "embed",
            ["--features", "patch"],
            "features 'patch' are unknown, expected one of mean, cls, patches, patches+cls",
        ),
        ("embed", ["--framing", "dataset"], "--framing dataset is a publisher's framing"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(tmp_path, encoder_file, command, arguments, words):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    arguments = arguments + (["-e", encoder_file] if command == "embed" else [])
    result = mefem(command, tmp_path, "-o", tmp_path / "out.csv", *arguments, code=1)
    assert words in result.stderr and result.stderr.count("\n") == 1 and not (tmp_path / "out.csv").exists()


def test_small_and_doubtful_faces_by_the_commands(tmp_path, encoder_file):
    photos = tmp_path / "photos"
    photos.mkdir()
    far = Image.new("RGB", (1600, 1000), (150, 170, 190))
    far.paste(Image.fromarray(cartoon()).resize((200, 200)), (900, 500))
    far.save(photos / "far.png")
    embedded = ["embed", photos, "-o", tmp_path / "e.csv", "-e", encoder_file]
    cropped = ["crop", photos, "-o", tmp_path / "crops", "--jobs", 1]
    for command in (embedded, cropped):
        mefem(*command, code=1)
        mefem(*command, "--small-faces")
    assert pd.read_csv(tmp_path / "e.csv").status.tolist() == ["success"]
    refused = mefem(*embedded, "--small-faces", "--min-score", 0.999, code=1).stderr
    assert (
        "far.png: low score; score 0." in refused
        and "1 have a face that a lower --min-score finds" in refused
    )
    assert "1  low score" in mefem(*cropped, "--small-faces", "--min-score", 0.999, code=1).stdout
    lower = refused.split("--min-score ")[1].split()[0]
    assert "1 of 1 photographs" in mefem(*embedded, "--small-faces", "--min-score", lower).stdout


def test_crops_inside_the_photographs_folder(shared, tmp_path, encoder_file):
    import shutil

    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for path in sorted((shared / "frll").glob("*.jpg"))[:3]:
        shutil.copy(path, photos)
        shutil.copy(path, photos / "more")
    for _ in range(2):
        assert mefem("crop", photos, "-o", photos / "crops").stdout.split() == ["6", "usable"]
        assert len(list((photos / "crops").glob("*.jpg"))) == 6
    mefem("embed", photos, "-o", tmp_path / "e.npz", "-e", encoder_file)
    with np.load(tmp_path / "e.npz") as found:
        assert len(found["file"]) == 6 and not [name for name in found["file"] if "crops" in name]
    assert "choose another one" in mefem("crop", photos, "-o", photos, code=1).stderr


# --- the probe
# -------------------------------------------------------------------------------------------------------


def toy_features(folder, n=80):
    rng = np.random.default_rng(0)
    bmi = 25 + 4 * rng.standard_normal(n)
    tokens = rng.standard_normal((n, 5, 8)) + (bmi - 25)[:, None, None] * rng.standard_normal(8) / 4
    folder.mkdir()
    np.save(folder / "bmi.npy", tokens.astype(np.float16))
    pd.DataFrame(
        {"key": np.arange(n).astype(str), "person": (np.arange(n) // 2).astype(str), "bmi": bmi}
    ).to_parquet(folder / "bmi.parquet")
    about = {
        "state": "present",
        "n": n,
        "has_cls": True,
        "tokens": 5,
        "heads": 2,
        "encoder": "toy",
        "encoder_hash": "a" * 12,
        "faces_hash": "f" * 12,
    }
    (folder / "bmi.json").write_text(json.dumps(about))
    return folder


def test_defaults_of_the_probe_are_those_of_the_settings():
    from dataclasses import asdict

    from mefem.probing import ProbeOptions

    settings, defaults = ProbingSettings().model_dump(), asdict(ProbeOptions())
    assert defaults.pop("seeds") == (settings.pop("seed"),) and settings.pop("seeds") == 1
    assert settings.pop("bootstrap") and settings == defaults


@pytest.mark.parametrize(
    "changes",
    [None, {"folds": 3, "epochs": 3, "batch": 16, "patience": 2, "bootstrap": 100, "seed": 4, "seeds": 2}],
)
def test_the_probe_gives_the_numbers_of_the_graph(tmp_path, monkeypatch, changes):
    from mefem.evaluation import evaluate

    features = toy_features(tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    if changes:
        profile = {"probing": changes}
        params = {
            "profile": "mine",
            "datasets": ["bmi"],
            "encoders": {"toy": "pixels"},
            "runs": ["main"],
            "profiles": {"mine": profile, "other": {"probing": {"epochs": 1}}},
        }
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    else:

        def nowhere():
            raise FileNotFoundError("no params.yaml")

        monkeypatch.setattr("mefem.cli.find_root", nowhere)
    evaluate(
        {"toy": (features, tmp_path / "results")},
        ["bmi"],
        ["patches"],
        linear=False,
        progress=False,
        jobs=1,
        **ProbingSettings(**(changes or {})).model_dump(),
    )
    (graph,) = (json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json"))
    mefem("probe", features, "-o", tmp_path / "numbers.json")
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert found["values"] == graph["values"] and found["folds"] == graph["folds"]
    quick = json.loads(mefem("probe", features, "--epochs", 1, "--folds", 2, "--seed", 7).stdout)
    assert len(quick["folds"]) == 2 and quick["seeds"][0] == 7 and quick["values"] != graph["values"]
    assert (
        "numbers.csv: expected a file ending in .json"
        in mefem("probe", features, "-o", tmp_path / "numbers.csv", code=1).stderr
    )
    assert ("wrong" if changes else "params.yaml") in mefem(
        "probe", features, "--profile", "wrong", code=1
    ).stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["embed", "nosuch", "-o", "x.parquet", "-e", "pixels"], "nosuch"),
        (["embed", "{tmp}", "-o", "{tmp}/x.parquet", "-e", "{tmp}/none.safetensors"], "none.safetensors"),
        (["pretrain", "--profile", "demmo"], "demmo"),
        (["crop", "{tmp}/nosuch", "-o", "{tmp}/out"], "nosuch"),
        (["crop", "{tmp}", "--dataset", "celebs", "-o", "{tmp}/out"], "celebs"),
        (["simulate", "celebs", "{tmp}/out"], "celebs"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(tmp_path, arguments, named):
    result = mefem(*[a.replace("{tmp}", str(tmp_path)) for a in arguments], code=1)
    assert named in result.stderr and "Traceback" not in result.stderr


def test_pretrain_changes_keys_by_set(tmp_path, monkeypatch):
    import mefem.training as training

    called = []
    monkeypatch.setattr(
        training,
        "pretrain",
        lambda config, resume, run, root, resume_anyway: called.append((run, config)) or "done",
    )
    mefem(
        "pretrain",
        "--profile",
        "smoke",
        "--name",
        "2026",
        "--set",
        "masking.width=5",
        "--set",
        "optimiser.lr=1e-4",
        "--set",
        "masking.cls_in_source=null",
        "--set",
        "optimiser.betas=[0.9, 0.95]",
    )
    ((run, config),) = called
    assert (
        run == "2026"
        and config.batch == 16
        and config.masking.width == 5
        and config.masking.cls_in_source is None
    )
    assert config.optimiser.lr == 1e-4 and config.optimiser.betas == (0.9, 0.95)
    (tmp_path / "s.json").write_text(json.dumps({"steps": 7}))
    mefem("pretrain", "--name", "x", "--settings", tmp_path / "s.json")
    assert called[1][1].steps == 7
    for arguments, said in (
        (
            ["--set", "masking.widht=5"],
            "mefem: run 'main': unknown key 'masking.widht'; did you mean 'masking.width'?\n",
        ),
        (["--set", "width=5"], "did you mean 'masking.width'?\n"),
        (["--set", "run=3"], "run 'main': unknown key 'run'"),
        (["--set", "settings.width=5"], "unknown key 'settings'"),
        (["--set", "width"], "expected KEY=VALUE"),
        (["--settings", tmp_path / "s.json", "--set", "steps=3"], "leave out --profile and --set"),
        (["--settings", tmp_path / "s.json", "--name", "../x"], "does not name a folder"),
    ):
        assert said in mefem("pretrain", *arguments, code=1).stderr
    assert len(called) == 2


def test_info_lists_data_and_weights(root, monkeypatch):
    monkeypatch.chdir(root)
    data = mefem("info", "data").output
    for name in ("facecaption", "fairface", "bmi"):
        assert name in data
    weights = mefem("info", "weights").output
    for name in ("farl", "franca", "buffalo"):
        assert name in weights.lower()


def test_info_of_a_set_that_is_there_and_of_one_to_fetch(tmp_path, monkeypatch):
    import shutil

    from mefem.files import find_root

    shutil.copy(find_root() / "params.yaml", tmp_path)
    photographs = tmp_path / "data/raw/folder"
    photographs.mkdir(parents=True)
    for number in range(3):
        (photographs / f"{number}.jpg").write_bytes(bytes(500_000))
    monkeypatch.chdir(tmp_path)
    assert (
        "folder       present   3 photographs, 0 of them in labels.csv; 3 files, 1.5 MB; not cropped yet"
        in mefem("info", "data").output
    )
    assert "celeba is not at Hugging Face" in mefem("info", "data", "--fetch", "celeba", code=1).stderr
    assert "no reader for the data set 'celebb'" in mefem("info", "data", "--fetch", "celebb", code=1).stderr


def test_stage_durations_come_from_papermill(tmp_path):
    for i, name in enumerate(["b", "a"]):
        about = {"metadata": {"papermill": {"duration": 1.5 + i, "start_time": f"2026-01-01T00:00:0{i}"}}}
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(about))
    assert stage_durations(tmp_path) == [("b", 1.5), ("a", 2.5)]
