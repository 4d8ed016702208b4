"""Methods beyond the paper against their formulas, and ideas that users bring in files of their own."""

import json
import textwrap

import numpy as np
import pytest
import torch
from scipy import integrate

import mefem.training as training
from mefem.beyond import (
    SIGRegJEPA,
    TargetShareJEPA,
    epps_pulley,
    inclusion_probabilities,
    load_idea,
    masking_of,
    run_code,
    sample_targets,
    sigreg,
    weights_of,
)
from mefem.config import MaskingSettings, PretrainSettings, SettingsError, WeightsSettings
from mefem.jepa import JEPA
from mefem.masking import StripeMasking
from mefem.models import Predictor, create_encoder
from mefem.weighting import circular_weights

KWARGS = dict(img_size=112, patch_size=8, embed_dim=32, depth=2, num_heads=2)


def tiny(method=JEPA, **options):
    torch.manual_seed(0)
    predictor = Predictor(32, 14, dim=16, depth=1, heads=2)
    return method(create_encoder(**KWARGS), predictor, StripeMasking(), circular_weights(), **options)


# A drawn share of the targets


@pytest.mark.parametrize("count", [1, 7, 20, 39, 40])
def test_inclusion_probabilities_are_proportional_and_capped(count):
    w = torch.rand(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(count)) ** 3 + 1e-4
    pi = inclusion_probabilities(w, count)
    torch.testing.assert_close(
        pi.sum(1), torch.full((6,), float(count), dtype=torch.float64), rtol=1e-10, atol=1e-10
    )
    assert (pi > 0).all() and (pi <= 1).all()
    for row, weight in zip(pi, w, strict=True):
        free = row < 1 - 1e-12
        if (
            free.any()
        ):  # the same constant for all that are not certain; nobody certain who would be below 1 by it
            c = row[free] / weight[free]
            torch.testing.assert_close(c, c[:1].expand_as(c), rtol=1e-9, atol=0)
            assert (weight[~free] * c[0] >= 1 - 1e-9).all()
    with pytest.raises(ValueError, match="cannot draw 41 of 40"):
        inclusion_probabilities(w, 41)


@pytest.mark.parametrize("count", [1, 5, 12, 17])
def test_drawn_targets_are_unbiased_exactly(count):
    # The draw changes with u only where a sum of probabilities crosses an integer: between those, one value.
    # So the expectation over u is a finite sum, exact in float64.
    rng = np.random.default_rng(count)
    w, losses = torch.from_numpy(rng.random((1, 18)) ** 2 + 1e-3), torch.from_numpy(rng.random(18) * 5)
    crossings = np.unique(
        np.concatenate([[0.0, 1.0], np.mod(np.cumsum(inclusion_probabilities(w, count)[0].numpy()), 1)])
    )
    expectation, drawn = 0.0, np.zeros(18)
    for low, high in zip(crossings[:-1], crossings[1:], strict=True):
        place, factor = sample_targets(w, count, torch.tensor([[(low + high) / 2]], dtype=torch.float64))
        assert place.shape == (1, count) and (place.diff(dim=1) > 0).all()
        expectation += (high - low) * (factor[0] * losses[place[0]]).mean().item()
        drawn[place[0]] += high - low
    assert expectation == pytest.approx((w[0] * losses).mean().item(), abs=1e-12)
    np.testing.assert_allclose(drawn, inclusion_probabilities(w, count)[0], atol=1e-12)


def test_a_share_of_targets_gives_the_loss_of_all_on_average():
    # Where predictions do not depend on the other targets, the whole step's loss is unbiased.
    jepa = tiny(TargetShareJEPA, share=0.2)
    jepa.predictor.blocks = torch.nn.Identity()
    images, generator = torch.randn(1, 3, 112, 112), torch.Generator().manual_seed(0)
    split = jepa.masking.sample(1, generator)
    with torch.no_grad():
        draws = np.array([jepa(images, generator, [split])["loss"].item() for _ in range(400)])
        jepa.share = 1.0
        whole = jepa(images, splits=[split])["loss"].item()
    assert abs(draws.mean() - whole) < 4 * draws.std() / 20 and draws.std() > 0


def test_all_targets_are_the_default_and_draw_nothing():
    images = torch.randn(2, 3, 112, 112)
    one, two = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    jepa = tiny()
    split = jepa.masking.sample(2, one)
    assert jepa(images, two)["loss"] == jepa(images, splits=[split])["loss"]
    assert torch.equal(one.get_state(), two.get_state())
    index, weights = jepa.select_targets(split.target)
    assert index is split.target and torch.equal(weights, jepa.weights[split.target])


def characteristic(kind, t):
    """Characteristic functions in closed form."""
    return {
        "normal": np.exp(-(t**2) / 2),
        "wide": np.exp(-2 * t**2),
        "uniform": np.sinc(t * 3**0.5 / np.pi),
        "shifted": np.exp(1j * t - t**2 / 2),
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "wide", "uniform", "shifted"])
def test_epps_pulley_has_its_expectation_on_known_distributions(kind):
    # E|phi_n - phi|^2 = |f - phi|^2 + (1 - |f|^2) / n, where f is the sample's own characteristic function.
    n, draws = 50, 4000
    rng = np.random.default_rng(0)
    x = {
        "normal": rng.standard_normal((n, draws)),
        "wide": 2 * rng.standard_normal((n, draws)),
        "uniform": rng.uniform(-(3**0.5), 3**0.5, (n, draws)),
        "shifted": 1 + rng.standard_normal((n, draws)),
    }[kind]
    t = np.linspace(-5, 5, 17)
    f, window = characteristic(kind, t), np.exp(-(t**2) / 2)
    expected = n * integrate.trapezoid((np.abs(f - window) ** 2 + (1 - np.abs(f) ** 2) / n) * window, t)
    found = epps_pulley(torch.from_numpy(x))
    assert found.shape == (draws,)
    assert abs(found.mean().item() - expected) < 5 * found.std().item() / draws**0.5
    if kind == "normal":  # and 17 points are enough for the integral
        assert expected == pytest.approx((2 * np.pi) ** 0.5 * (1 - 3**-0.5), rel=1e-3)


def test_epps_pulley_is_its_integral():
    x = np.array([-1.3, 0.2, 0.4, 2.5])

    def integrand(t):
        return abs(np.exp(1j * t * x).mean() - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)

    exact = 4 * integrate.quad(integrand, -5, 5)[0]
    assert epps_pulley(torch.from_numpy(x), points=401).item() == pytest.approx(exact, rel=1e-4)
    assert epps_pulley(torch.from_numpy(x)).item() == pytest.approx(exact, rel=1e-2)


def test_sigreg_is_the_mean_statistic_over_drawn_directions():
    """SIGReg once more.

    Unit directions, one integral each, n times the squared distance of characteristic functions."""
    n, dim, slices = 20, 6, 5
    z = torch.randn(n, 3, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = sigreg(z, slices=slices, places=3, generator=torch.Generator().manual_seed(2)).item()
    a = torch.randn(dim, slices, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).numpy()
    x = z.numpy() @ (a / np.linalg.norm(a, axis=0))  # [n, places, slices]
    t = np.linspace(-5, 5, 17)
    gap = np.abs(np.exp(1j * x[..., None] * t).mean(0) - np.exp(-(t**2) / 2)) ** 2
    assert found == pytest.approx((n * integrate.trapezoid(gap * np.exp(-(t**2) / 2), t)).mean(), rel=1e-10)


def test_sigreg_pulls_collapsed_tokens_apart():
    torch.manual_seed(0)
    z = (0.01 * torch.randn(64, 4, 8)).requires_grad_()
    optimiser = torch.optim.Adam([z], lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        sigreg(z, slices=32).backward()
        optimiser.step()
    assert 0.8 < z.std(0).mean() < 1.2


def test_sigreg_has_no_teacher():
    jepa = tiny(SIGRegJEPA)
    images = torch.randn(4, 3, 112, 112)
    jepa(images, torch.Generator().manual_seed(0))["loss"].backward()
    assert all(p.grad is None for p in jepa.teacher.parameters())
    with torch.no_grad():
        for p in jepa.student.parameters():
            p.add_(1.0)
    jepa.update_teacher(0.996)
    assert all(
        torch.equal(a, b) for a, b in zip(jepa.teacher.parameters(), jepa.student.parameters(), strict=True)
    )
    for bad in (dict(weight=1.0), dict(weight=0.0), dict(teacher_input="targets")):
        with pytest.raises(ValueError, match="method sigreg"):
            tiny(SIGRegJEPA, **bad)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="method target-share"):
            tiny(TargetShareJEPA, share=share)


# Ideas in files


IDEA = """
    import torch
    from mefem.jepa import JEPA
    from mefem.masking import Masking

    class Diagonal(Masking):
        def __init__(self, grid, cls_in_source, width=3):
            row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
            falling = (row - column).abs() <= width // 2
            patches = torch.stack([falling, falling.flip(1)]).flatten(1)
            super().__init__(patches, torch.tensor([0, grid - 1]), torch.ones(2), grid, cls_in_source)

    def half(grid, value=0.5):
        return torch.full((grid, grid), value)

    class Squared(JEPA):
        def __init__(self, *parts, power=2):
            super().__init__(*parts)
            self.power = power

        def loss(self, predicted, target, weights):
            return (weights * (predicted - target).abs().pow(self.power).mean(-1)).mean()
"""

RUN = dict(
    encoder=dict(kwargs=dict(img_size=112, patch_size=8, embed_dim=32, depth=1, num_heads=1)),
    predictor=dict(dim=32, depth=1, heads=1),
    batch=4,
    steps=2,
    checkpoint_every=2,
    log_every=1,
    precision="fp32",
    device="cpu",
)


@pytest.fixture
def idea(tmp_path, monkeypatch):
    """The file ideas/mine.py of a project, which is the working folder."""
    (tmp_path / "params.yaml").write_text("profile: none\n")
    path = tmp_path / "ideas" / "mine.py"
    path.parent.mkdir()
    path.write_text(textwrap.dedent(IDEA))
    monkeypatch.chdir(tmp_path)
    return path


def own(**changes):
    kinds = dict(
        masking=dict(kind="ideas/mine.py:Diagonal", options=dict(width=5)),
        weights=dict(kind="ideas/mine.py:half"),
        method="ideas/mine.py:Squared",
        method_options=dict(power=3),
    )
    return PretrainSettings(**RUN | kinds | changes)


def test_a_run_uses_the_masking_the_weights_and_the_loss_of_a_file(idea):
    jepa = training.build(own())
    table = jepa.masking.source_table[0, 0]  # the falling diagonal, CLS among the targets
    assert all(abs(int(p - 1) // 14 - int(p - 1) % 14) <= 2 for p in table) and len(table) == 14 * 5 - 6
    assert (jepa.weights[1:] == 0.5).all() and jepa.weights[0] == 1
    p, t, w = torch.randn(2, 7, 5), torch.randn(2, 7, 5), torch.rand(2, 7)
    assert jepa.loss(p, t, w).item() == pytest.approx(((p - t).abs() ** 3).mean(-1).mul(w).mean().item())


def test_an_edited_idea_is_trained_again_and_a_comment_is_not(idea, capsys):
    pictures = np.random.default_rng(0).integers(0, 255, (8, 112, 112, 3), dtype=np.uint8)

    def encoder():
        path = training.pretrain(own(), root=idea.parent.parent, pictures=pictures, progress=False)
        return path.read_bytes(), json.loads((path.parent / "run.json").read_text())["made_from"]["code"]

    first = encoder()
    assert first[1] == run_code(own()) != run_code(PretrainSettings(**RUN))
    idea.write_text("# mine\n" + idea.read_text())
    capsys.readouterr()
    assert encoder() == first and "nothing to do" in capsys.readouterr().out
    idea.write_text(idea.read_text().replace(".pow(self.power)", ".pow(self.power + 1)"))
    again = encoder()
    assert again[0] != first[0] and again[1] != first[1]
    assert "other code and is left as it is" in capsys.readouterr().out


def test_two_processes_load_the_idea_too(idea, monkeypatch):
    from test_training import write_shards

    monkeypatch.delenv("RANK", raising=False)
    write_shards(idea.parent.parent / "data" / "faces" / "facecaption")
    config = own(datasets=("facecaption",), runtime=dict(processes=2))
    assert training.launch(config, run="two", root=idea.parent.parent).exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(kind="ideas/mine.py:Diagnal"), "mine.py defines no 'Diagnal'"),
        (dict(kind="ideas/none.py:Diagonal"), "there is no file .*ideas/none.py"),
        (dict(kind="ideas/mine.py:Diagonal", options=dict(widht=5)), "'widht'.* Diagonal\\(.*width=3"),
    ],
)
def test_mistakes_in_naming_an_idea_are_named(idea, settings, words):
    with pytest.raises(SettingsError, match=words):
        masking_of(MaskingSettings(**settings), 14)


def test_an_error_inside_an_idea_names_its_file_and_class(idea):
    """Cuts of different sizes are the usual mistake of a masking of one's own."""
    idea.write_text(
        "import torch\nfrom mefem.masking import Masking\n"
        "class Ragged(Masking):\n"
        "    def __init__(self, grid, cls_in_source):\n"
        "        patches = torch.arange(grid**2) < torch.tensor([[5], [6]])\n"
        "        super().__init__(patches, torch.zeros(2, dtype=int), torch.ones(2), grid, cls_in_source)\n"
    )
    words = r"^ideas/mine.py:Ragged: cuts of different sizes, \[5, 6\] tokens: every cut must"
    with pytest.raises(SettingsError, match=words):
        masking_of(MaskingSettings(kind="ideas/mine.py:Ragged"), 14)


def test_a_broken_idea_is_named(idea):
    idea.write_text("import no_such_module")
    with pytest.raises(SettingsError, match="mine.py cannot be imported: ModuleNotFoundError"):
        load_idea("ideas/mine.py:Diagonal")


def test_weights_of_a_wrong_shape_or_sign_are_refused(idea):
    for value in (-1.0, float("nan")):
        with pytest.raises(SettingsError, match="weights of 0 or more"):
            weights_of(WeightsSettings(kind="ideas/mine.py:half", options=dict(value=value)), 14)
    idea.write_text("import torch\ndef half(grid):\n    return torch.ones(grid)")
    with pytest.raises(SettingsError, match=r"\[14, 14\]; found \[14\]"):
        weights_of(WeightsSettings(kind="ideas/mine.py:half"), 14)


def test_a_kind_that_is_neither_built_in_nor_a_file_is_refused_before_anything_runs():
    for changes in (
        dict(masking=dict(kind="strips")),
        dict(weights=dict(kind="a.py")),
        dict(method="vicreg"),
    ):
        with pytest.raises(ValueError, match="ideas/diagonal.py:Diagonal; found"):
            PretrainSettings(**changes)


def test_an_option_that_a_method_does_not_have_is_refused():
    with pytest.raises(SettingsError, match="target-share: .*'shares'.* share"):
        training.build(PretrainSettings(**RUN, method="target-share", method_options=dict(shares=0.5)))
