"""Health: each measure against a direct formula in float64; a collapsed teacher is flagged within 200
steps."""

import csv
import json

import numpy as np
import pytest
import torch
from torch import nn

from mefem.config import PretrainSettings
from mefem.monitoring import (
    SinceStart,
    alpha_req,
    health,
    peak_operations,
    position_share,
    rankme,
    relative_spread,
    ridge_probe,
    step_operations,
    token_rank,
)
from mefem.training import MemoryPictures, build, start_run, teacher_tokens, train

SMALL = dict(
    encoder=dict(kwargs=dict(img_size=112, patch_size=8, embed_dim=32, depth=1, num_heads=1)),
    predictor=dict(dim=32, depth=1, heads=1),
    batch=8,
    steps=200,
    checkpoint_every=200,
    log_every=20,
    precision="fp32",
    device="cpu",
)


@pytest.fixture(scope="module")
def pictures():
    """Smooth colours, each picture its own."""
    rough = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (64, 3, 4, 4))).float()
    return nn.functional.interpolate(rough, size=112, mode="bilinear").permute(0, 2, 3, 1).byte().numpy()


@pytest.mark.parametrize("shape", [(200, 30), (20, 60)])
def test_rankme_and_alpha_against_numpy(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * torch.arange(1, shape[1] + 1).pow(
        -0.7
    )
    s = np.linalg.svd(x.double().numpy(), compute_uv=False)
    assert rankme(x) == pytest.approx(np.exp(-(s / s.sum() * np.log(s / s.sum())).sum()), rel=1e-9)
    values = np.linalg.eigvalsh(np.cov(x.double().numpy().T))[::-1]
    values = values[values > 1e-6 * values[0]]
    design = np.stack([np.log(np.arange(1, len(values) + 1)), np.ones(len(values))], 1)
    slope = np.linalg.lstsq(design, np.log(values), rcond=None)[0][0]
    assert alpha_req(x) == pytest.approx(-slope, rel=1e-6)


def test_degenerate_embeddings():
    assert rankme(torch.ones(50, 8)) == pytest.approx(1, abs=1e-6)
    assert np.isnan(alpha_req(torch.ones(50, 8)))
    for measure in (rankme, alpha_req):
        with pytest.raises(ValueError, match="not finite"):
            measure(torch.full((3, 3), float("nan")))
        with pytest.raises(ValueError, match="N, D"):
            measure(torch.ones(3))


def test_relative_spread_against_numpy():
    tokens = torch.randn(7, 5, 3, dtype=torch.float64) + 2
    x = tokens.numpy()
    assert relative_spread(tokens) == pytest.approx(np.sqrt(x.var(axis=0).mean() / (x**2).mean()), rel=1e-12)
    assert relative_spread(torch.zeros(4, 2, 2)) == 0


def counted_operations(jepa) -> int:
    """What torch counts in a step of two pictures, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    # written out as matrix products, which torch knows how to count
    with sdpa_kernel(SDPBackend.MATH), counter:
        jepa(torch.randn(2, 3, 112, 112))["loss"].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "masking",
    [dict(), dict(cls_in_source=None), dict(kind="multiblock", cls_in_source=None), dict(kind="quadrant")],
)
@pytest.mark.parametrize("teacher_input", ["image", "targets"])
def test_counted_operations_are_what_torch_counts(masking, teacher_input):
    jepa = build(PretrainSettings(**SMALL | dict(masking=masking, teacher_input=teacher_input)))
    # two pictures, two operations each
    assert 2 * 2 * sum(step_operations(jepa).values()) == counted_operations(jepa)


@pytest.mark.parametrize(
    "changes",
    [
        dict(method="target-share"),
        dict(method="target-share", teacher_input="targets"),
        dict(method="sigreg"),
        dict(method="sigreg", masking=dict(kind="multiblock", cls_in_source=None)),
    ],
)
def test_counted_operations_of_the_methods_are_what_torch_counts(changes):
    jepa = build(PretrainSettings(**SMALL | changes))
    assert 2 * 2 * sum(step_operations(jepa).values()) == counted_operations(jepa)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_counted_operations_of_views_are_what_torch_counts(weight):
    jepa = build(PretrainSettings(**SMALL | {"method": "views", "method_options": {"weight": weight}}))
    compared = 3 * 2 * 128  # each picture's view with both of the others', forward and backward: not counted
    assert 2 * 2 * (sum(step_operations(jepa).values()) + compared) == counted_operations(jepa)


def test_peak_is_of_this_machine():
    assert 1e8 < peak_operations("cpu", size=256, seconds=0.02) < 1e14


def test_linear_probe_by_person_and_by_kind():
    from sklearn.linear_model import LinearRegression
    from sklearn.metrics import r2_score
    from sklearn.model_selection import GroupKFold, cross_val_predict

    rng = np.random.default_rng(0)
    x, people = rng.normal(size=(300, 6)), np.repeat(np.arange(60), 5)
    y = x @ rng.normal(size=6) + rng.normal(size=300)
    plain = r2_score(y, cross_val_predict(LinearRegression(), x, y, groups=people, cv=GroupKFold(5)))
    assert ridge_probe(x, y, people) == pytest.approx(plain, abs=0.01)
    assert ridge_probe(x, np.where(y > 0, "yes", "no"), people) > 0.75
    own = rng.normal(size=60)[people]  # a value that only the person's own pictures would give away
    identity = np.eye(60)[people] + 0.01 * rng.normal(size=(300, 60))
    assert ridge_probe(identity, own, people) < 0.1 < 0.9 < ridge_probe(identity, own)
    with pytest.raises(ValueError, match="300 labels"):
        ridge_probe(x, np.r_[y[:-1], np.nan])


def test_health_names_what_is_wrong():
    assert health(0.2, 0.3, 20) == [] == health(0.2, 0.3, 20, teacher_spread=0.3, waiting=0.0)
    assert len(health(float("nan"), 0.0, 1.0)) == 3
    assert "diverges" in health(1.7, 0.3)[0] and "collapsed" in health(0.1, 0.3, teacher_spread=0.0)[0]
    assert "runtime.workers" in health(0.1, 0.3, waiting=0.6)[0]
    assert health(0.1, 0.3, teacher_spread=float("nan"))


class Mean(nn.Module):
    """A predictor that is none: for every target the mean of the source."""

    def __init__(self, dim):
        super().__init__()
        self.embed, self.blocks, self.scale = (
            nn.Linear(dim, dim),
            nn.Sequential(),
            nn.Parameter(torch.ones(dim)),
        )

    def forward(self, source, source_index, target_index):
        return (self.scale * source.mean(1, keepdim=True)).expand(-1, target_index.shape[1], -1)


def test_a_collapsed_teacher_is_flagged_within_200_steps(tmp_path, pictures, capsys, monkeypatch):
    """Without a predictor and without an average, saying the same of everything is a solution, and the run
    finds it."""
    import mefem.training

    def build_without_predictor(config):
        jepa = build(config)
        jepa.predictor = Mean(32)
        return jepa

    store = MemoryPictures(pictures)
    train(start_run(PretrainSettings(**SMALL), store, tmp_path / "healthy"), progress=False)
    assert "collapse" not in capsys.readouterr().out
    monkeypatch.setattr(mefem.training, "build", build_without_predictor)
    ill = SMALL | dict(optimiser=dict(ema=(0, 0), lr=1e-2, start_lr=1e-2))
    train(start_run(PretrainSettings(**ill), store, tmp_path / "ill"), progress=False)
    spreads = {
        name: [float(row["teacher_spread"]) for row in csv.DictReader((tmp_path / name / "log.csv").open())]
        for name in ("healthy", "ill")
    }
    print(spreads)
    assert min(spreads["healthy"]) > 0.1
    assert "the teacher says the same of every picture" in capsys.readouterr().out


def test_rank_and_position_of_tokens_against_numpy():
    tokens = torch.randn(9, 6, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 6.0)
    tokens[..., 0] += torch.arange(6.0)
    x = tokens.double().numpy()
    s = np.linalg.svd((x - x.mean(0)).reshape(-1, 5), compute_uv=False)
    assert token_rank(tokens) == pytest.approx(np.exp(-(s / s.sum() * np.log(s / s.sum())).sum()), rel=1e-6)
    share = x.mean(0).var(axis=0).mean() / x.reshape(-1, 5).var(axis=0).mean()
    assert position_share(tokens) == pytest.approx(share, rel=1e-9)
    assert position_share(torch.zeros(3, 2, 4)) == 0 and token_rank(torch.zeros(3, 2, 4)) == pytest.approx(1)


def test_what_got_worse_since_the_start_is_said_once():
    say = SinceStart({"token_rank": 30.0, "position_share": 0.3, "probe": 0.3})
    assert say({"token_rank": 29.0, "position_share": 0.1}) == []
    (text,) = say({"token_rank": 15.6, "position_share": 0.1, "probe": 0.31})
    assert "15.6 directions" in text and "30.0 before" in text and "200,000 pictures" in text
    assert say({"token_rank": 14.0, "position_share": 0.1}) == []
    probe, place = sorted(say({"token_rank": 14.0, "position_share": 0.6, "probe": 0.2}), reverse=True)
    assert "ridge probe scores 0.200" in probe and "60% of the tokens' variance" in place
    (text,) = say({"token_rank": 29.0, "position_share": 0.6})
    assert text.startswith("token_rank is no longer worse")


def test_a_run_is_compared_with_its_own_start(pictures, tmp_path, capsys):
    """Tokens that lose their directions in training are named in the run's own output, with the remedy."""
    labels = np.arange(64) % 2
    config = PretrainSettings(
        **SMALL | dict(steps=40, checkpoint_every=20, optimiser=dict(lr=0.05, start_lr=0.05, ema=(0.5, 0.5)))
    )
    train(
        start_run(config, MemoryPictures(pictures), tmp_path),
        labelled=(pictures, labels, None),
        progress=False,
    )
    start = json.loads((tmp_path / "start.json").read_text())
    jepa = build(config)
    tokens = teacher_tokens(jepa, torch.from_numpy(pictures[:32]), "cpu")
    assert start["token_rank"] == pytest.approx(token_rank(tokens), rel=1e-4) and 0 <= start["probe"] <= 1
    with (tmp_path / "log.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert float(rows[-1]["token_rank"]) < 0.85 * start["token_rank"]
    assert "directions around their place's mean" in capsys.readouterr().out


def test_the_best_checkpoint_by_probe_is_kept(tmp_path, pictures):
    labels = np.arange(64) % 2
    config = PretrainSettings(**SMALL | dict(steps=8, checkpoint_every=2, runtime=dict(keep=1)))
    train(
        start_run(config, MemoryPictures(pictures), tmp_path),
        labelled=(pictures, labels, None),
        progress=False,
    )
    with (tmp_path / "log.csv").open() as f:
        probes = {int(row["step"]): float(row["probe"]) for row in csv.DictReader(f) if row["probe"]}
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["probe"] == pytest.approx(max(probes.values()), rel=1e-4)
    state = torch.load(tmp_path / "best.pt", weights_only=True)
    assert state["step"] == best["step"] == min(s for s in probes if probes[s] == max(probes.values()))
    assert len(list(tmp_path.glob("step_*.pt"))) == 1
