"""Settings: what is wrong is refused, by its full name."""

import pytest
import yaml

from mefem.compute import choose_precision
from mefem.config import (
    Profile,
    Settings,
    SettingsError,
    changes_of,
    load_settings,
    pretrain_settings,
    read_pretrain,
    run_name,
)
from mefem.files import write_atomic
from mefem.made_from import settings_hash

PROFILES = ["smoke", "demo", "study", "faces", "paper"]


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
        (
            lambda p: p["profiles"]["demo"]["pretrain"].update(masking={"cls_in_source": 1.5}),
            "masking.cls_in_source",
        ),
        (
            lambda p: p["base"]["pretrain"].update(bacth=3),
            "'base.pretrain.bacth'; did you mean 'base.pretrain.batch'?",
        ),
        (
            lambda p: p["profiles"]["demo"]["pretrain"].update(width=3),
            "did you mean 'profiles.demo.pretrain.masking.width'?",
        ),
        (
            lambda p: p["profiles"]["demo"]["pretrain"].update(zzz=3),
            "'profiles.demo.pretrain.zzz'; there are datasets, exclude_leaked",
        ),
        (
            lambda p: p["ablations"]["stripes2"].update(masknig={}),
            "ablation 'stripes2': unknown key 'masknig'; did you mean 'masking'?",
        ),
        (
            lambda p: p.update(overrides={"main": {"optimiser": {"lrs": 1}}}),
            "run 'main': unknown key 'optimiser.lrs'",
        ),
        (
            lambda p: p["profiles"]["demo"]["pretrain"]["encoder"]["kwargs"].update(x=[1]),
            "kwargs.x: expected a number, text, true or false, found [1]",
        ),
        (
            lambda p: p["base"]["pretrain"]["optimiser"].update(betas=[0.9, 1.0]),
            "optimiser.betas.1: expected a number less than 1, found 1.0",
        ),
        (lambda p: p.pop("datasets"), "params.yaml: datasets: missing"),
        (
            lambda p: p.update(runs=[2026]),
            "runs.0: expected text, found 2026; text that looks like something else goes into quotes: '2026'",
        ),
        (lambda p: p.update(runs=["main", "../x"]), "run '../x' does not name a folder"),
        (
            lambda p: (
                p["profiles"]["demo"]["crop"].update(framing={"celebs": "paper"})
                if "crop" in p["profiles"]["demo"]
                else p["profiles"]["demo"].update(crop={"framing": {"celebs": "paper"}})
            ),
            "crop.framing.celebs",
        ),
        (lambda p: p.update(profile="demmo"), "'demmo' is not one of"),
        (lambda p: p.update(overrides={"nosuch": {}}), "nosuch"),
    ],
)
def test_wrong_settings_are_refused_by_name(root, tmp_path, change, named):
    with pytest.raises(SettingsError) as error:
        load_settings(edited(root, tmp_path, change))
    assert named in str(error.value)
    assert str(error.value).startswith("params.yaml: ") and "\n" not in str(
        error.value
    )  # one plain line, without pydantic's words
    assert not any(noise in str(error.value) for noise in ("(file)", "Value error", "Input should", "[key]"))


def test_duplicate_key_and_broken_yaml(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("profile: demo\nprofile: smoke\n")
    with pytest.raises(SettingsError, match="duplicate key 'profile' in one section"):
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
    assert pretrain_settings(settings, run, masking={"width": 4}).masking.width == 4
    without = pretrain_settings(
        settings,
        run,
        **changes_of(["masking.cls_in_source=null", "masking.kind=quadrant", "optimiser.lr=1e-2"]),
    )
    assert (
        without.masking.cls_in_source is None
        and without.masking.kind == "quadrant"
        and without.optimiser.lr == 0.01
    )
    # YAML 1.1 takes 1e-1 for a text
    asked = pretrain_settings(settings, run, **changes_of(["method_options.temperature=1e-1"]))
    assert asked.method_options == {"temperature": 0.1}
    with pytest.raises(SettingsError, match="nosuch"):
        pretrain_settings(settings, "nosuch")


@pytest.mark.parametrize("key", ["run", "settings"])
def test_a_change_named_as_a_parameter_is_an_unknown_key(root, key):
    settings = load_settings(root / "params.yaml")
    with pytest.raises(SettingsError, match=f"unknown key '{key}'"):
        pretrain_settings(settings, settings.runs[0], **changes_of([f"{key}=3"]))


def test_changes_of_a_command_line():
    assert changes_of([]) == {}
    assert changes_of(["masking.width=4", "masking={k: 0.2}", " masking.width = 5 ", "encoder.name=a=b"]) == {
        "masking": {"width": 5, "k": 0.2},
        "encoder": {"name": "a=b"},
    }
    for bad in ("masking.width", "masking.width=", "=3", "masking..width=3"):
        with pytest.raises(SettingsError, match="expected KEY=VALUE"):
            changes_of([bad])
    with pytest.raises(SettingsError, match="not valid YAML"):
        changes_of(["masking={width: 3"])


@pytest.mark.parametrize("run", [2026, 7, True, None, 1.5])
def test_a_run_whose_name_became_a_number_is_refused(root, run):
    settings = load_settings(root / "params.yaml")
    for use in (
        lambda: run_name(run),
        lambda: pretrain_settings(settings, run),
        lambda: pretrain_settings(settings, run, steps=3),
    ):
        with pytest.raises(SettingsError, match=f"run {run} is not text .*-r run {run}"):
            use()


def test_run_names_are_folders_below_data_runs():
    assert run_name("2026") == "2026" and run_name("ablations/stripes2-0") == "ablations/stripes2-0"
    for run in ("", ".", "..", "a/../../b", "/tmp"):
        with pytest.raises(SettingsError, match="does not name a folder below data/runs"):
            run_name(run)


def test_base_holds_every_setting_and_is_the_packages_defaults(root):
    raw = yaml.safe_load((root / "params.yaml").read_text())
    defaults = Profile().model_dump(mode="json")
    assert raw["base"] == {section: values for section, values in defaults.items() if section != "scale"}
    for name, profile in raw["profiles"].items():  # the graph's stages depend on each of these
        assert list(profile) == ["scale", *raw["base"]], name


def changed_leaves(base, changes, path=""):
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            yield from changed_leaves(base[key], value, f"{path}{key}.")
        else:
            yield f"{path}{key}", base.get(key), value


def test_profiles_say_only_what_they_change(root):
    raw = yaml.safe_load((root / "params.yaml").read_text())
    said_again = [
        f"{name}.{key}"
        for name, profile in raw["profiles"].items()
        for key, before, now in changed_leaves(raw["base"], profile)
        if before == now
    ]
    assert said_again == []


def test_a_profile_is_base_with_its_changes(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("""{profile: wide, datasets: [], encoders: {}, runs: [main],
        base: {pretrain: {masking: {k: 0.3}, optimiser: {betas: [0.8, 0.9]}}, probing: {lrs: [1.0, 2.0]}},
        profiles: {plain: {}, wide: {pretrain: {masking: {width: 5}}, probing: {lrs: [3.0]}}}}""")
    settings = load_settings(path)
    wide, plain = settings.active, settings.profiles["plain"]
    assert (wide.pretrain.masking.width, wide.pretrain.masking.k, wide.pretrain.optimiser.betas) == (
        5,
        0.3,
        (0.8, 0.9),
    )
    assert (
        wide.probing.lrs == (3.0,)
        and plain == settings.base
        and plain.probing.lrs == (1.0, 2.0)
        and plain.pretrain.masking.width == 3
    )
    assert Settings.model_validate(settings.model_dump()) == settings


def test_a_settings_file_of_a_run_says_what_is_wrong(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text('{"masking": {"widht": 3}}')
    with pytest.raises(
        SettingsError, match="settings.json: unknown key 'masking.widht'; did you mean 'masking.width'"
    ):
        read_pretrain(path)
    path.write_text("{")
    with pytest.raises(SettingsError, match="is not a JSON file of settings"):
        read_pretrain(path)
    path.write_text("[3]")  # not a section at all
    with pytest.raises(SettingsError, match="settings.json: expected a mapping of keys"):
        read_pretrain(path)
    path.write_text('{"optimiser": {"lr": 0.1, "final_lr": 0.2}}')
    with pytest.raises(SettingsError, match="optimiser: final_lr 0.2 exceeds lr 0.1"):
        read_pretrain(path)


def test_hash_depends_on_values_not_on_order():
    assert (
        settings_hash({"a": 1, "b": 2}) == settings_hash({"b": 2, "a": 1}) != settings_hash({"a": 1, "b": 3})
    )


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "a.txt", "old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_precision_follows_what_the_processor_can(monkeypatch):
    for able, expected in (
        ({}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False}, "fp32"),
    ):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda able=able: able)
        assert choose_precision("auto", "cpu") == expected and choose_precision("auto", "cuda") == "bf16"
        assert choose_precision("fp32", "cuda") == "fp32" and choose_precision("bf16", "cpu") == "bf16"
