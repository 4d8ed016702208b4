"""Settings: what is wrong is refused, by its full name."""

import pytest
import yaml

from mefem.compute import choose_precision
from mefem.config import SettingsError, load_settings, pretrain_settings, run_changes
from mefem.files import write_atomic
from mefem.made_from import settings_hash

PROFILES = ["smoke", "demo", "study", "fairface", "paper"]


def edited(root, tmp_path, change):
    raw = yaml.safe_load((root / "params.yaml").read_text())
    change(raw)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_valid(root, profile):
    settings = load_settings(root / "params.yaml", profile=profile)
    assert settings.profile == profile
    for run in settings.runs:
        assert pretrain_settings(settings, run).steps > 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: p["profiles"]["demo"].update(pretrian={}), "profiles.demo.pretrian"),
        (lambda p: p["profiles"]["demo"]["pretrain"].update(bacth=3), "profiles.demo.pretrain.bacth"),
        (lambda p: p["profiles"]["demo"]["pretrain"].update(batch="many"), "profiles.demo.pretrain.batch"),
        (lambda p: p["profiles"]["demo"]["pretrain"].update(steps=0), "profiles.demo.pretrain.steps"),
        (lambda p: p["profiles"]["demo"]["pretrain"].update(masking={"width": 14}), "masking.width 14"),
        (lambda p: p["profiles"]["demo"]["pretrain"].update(masking={"cls_in_source": 1.5}), "masking.cls_in_source"),
        (lambda p: p["profiles"]["demo"]["crop"].update(framing={"celebs": "paper"}) if "crop" in p["profiles"]["demo"]
         else p["profiles"]["demo"].update(crop={"framing": {"celebs": "paper"}}), "crop.framing.celebs"),
        (lambda p: p.update(profile="demmo"), "'demmo' is not one of"),
        (lambda p: p.update(overrides={"nosuch": {}}), "nosuch"),
    ],
)
def test_wrong_settings_are_refused_by_name(root, tmp_path, change, named):
    with pytest.raises(SettingsError) as error:
        load_settings(edited(root, tmp_path, change))
    assert named in str(error.value)
    assert "params.yaml" in str(error.value)


def test_duplicate_key_and_broken_yaml(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("profile: demo\nprofile: smoke\n")
    with pytest.raises(SettingsError, match="'profile' stands twice"):
        load_settings(path)
    path.write_text("profile: [demo\n")
    with pytest.raises(SettingsError, match="not valid YAML"):
        load_settings(path)


def test_overrides_and_changes_merge_deeply(root, tmp_path):
    path = edited(root, tmp_path, lambda p: p.update(overrides={p["runs"][0]: {"masking": {"width": 2}}}))
    settings = load_settings(path)
    run = settings.runs[0]
    base = pretrain_settings(settings, run)
    assert base.masking.width == 2 and base.masking.k == 0.175
    assert pretrain_settings(settings, run, **run_changes(width=4)).masking.width == 4
    without = pretrain_settings(settings, run, **run_changes(cls_in_source=-1, masking="quadrant", lr=0.01))
    assert without.masking.cls_in_source is None and without.masking.kind == "quadrant" and without.optimiser.lr == 0.01
    with pytest.raises(SettingsError, match="nosuch"):
        pretrain_settings(settings, "nosuch")


def test_hash_depends_on_values_not_on_order():
    assert settings_hash({"a": 1, "b": 2}) == settings_hash({"b": 2, "a": 1}) != settings_hash({"a": 1, "b": 3})


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "a.txt", "old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_precision_follows_what_the_processor_can(monkeypatch):
    for able, expected in (({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_bf16": False}, "fp32")):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda able=able: able)
        assert choose_precision("auto", "cpu") == expected and choose_precision("auto", "cuda") == "bf16"
        assert choose_precision("fp32", "cuda") == "fp32" and choose_precision("bf16", "cpu") == "bf16"
