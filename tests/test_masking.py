"""Maskings: the distribution of eq. 4, and the promise of static, disjoint, complete splits."""

import numpy as np
import pytest
import torch
from scipy import stats

from mefem.masking import (
    MultiblockMasking,
    QuadrantMasking,
    StripeMasking,
    create_masking,
    stripe_probabilities,
)

GRID = 14


def stripe_of(row: torch.Tensor, cls: bool) -> tuple[int, int]:
    """Direction and first line of the stripe in one source row, found from the patches alone."""
    patches = (row[row > 0] - 1) if cls else row
    r, c = patches // GRID, patches % GRID
    horizontal = len(set(c.tolist())) == GRID
    return int(not horizontal), int((r if horizontal else c).min())


@pytest.mark.parametrize("width", range(1, 7))
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, None])
def test_splits_are_static_disjoint_and_complete(width, p):
    masking = StripeMasking(GRID, width, cls_in_source=p)
    split = masking.sample(2000, torch.Generator().manual_seed(width))
    assert split.source.shape == (2000, GRID * width) == (2000, masking.sizes[0])
    assert split.target.shape[1] == masking.tokens - GRID * width == masking.sizes[1]
    together = torch.cat(split, 1).sort(1).values
    assert (together == torch.arange(masking.tokens)).all()
    assert (split.source.diff(dim=1) > 0).all() and (split.target.diff(dim=1) > 0).all()
    if p is not None:
        in_source = (split.source[:, 0] == 0).float().mean().item()
        assert abs(in_source - p) <= 4 * (p * (1 - p) / 2000) ** 0.5


def centre_law(k: float) -> np.ndarray:
    """P(i_c = i) of eq. 4 by scipy: the truncated normal's mass over each rounding cell."""
    mean, sd = (GRID - 1) / 2, GRID * k
    law = stats.truncnorm((0 - mean) / sd, (GRID - 1 - mean) / sd, mean, sd)
    return np.diff(law.cdf(np.clip(np.arange(GRID + 1) - 0.5, 0, GRID - 1)))


@pytest.mark.parametrize("k", [0.05, 0.175, 1.0])
def test_stripe_probabilities_are_scipys(k):
    np.testing.assert_allclose(stripe_probabilities(GRID, k).numpy(), centre_law(k), atol=1e-12)


def lines_of(split) -> tuple[np.ndarray, np.ndarray]:
    """Whether each stripe without CLS is horizontal, and its first line, by neighbours alone: [B] each."""
    first, second = split.source[:, 0].numpy(), split.source[:, 1].numpy()
    last = split.source[:, -1].numpy()
    width = split.source.shape[1] // GRID
    # A horizontal stripe fills whole rows: its tokens are consecutive. A vertical one has gaps.
    horizontal = last - first == GRID * width - 1
    assert ((second - first == 1) | (width == 1)).all()
    return horizontal, np.where(horizontal, first // GRID, first % GRID)


@pytest.mark.parametrize("width", range(1, 7))
def test_stripe_centre_follows_equation_4(width):
    # 200,000 draws. At width 1 the stripe is its centre; a wider one starts at i_c - width // 2, inside.
    draws = 200_000
    split = StripeMasking(GRID, width, cls_in_source=None).sample(draws, torch.Generator().manual_seed(width))
    horizontal, start = lines_of(split)
    starts = np.clip(np.arange(GRID) - width // 2, 0, GRID - width)
    expected = np.bincount(starts, centre_law(0.175), minlength=GRID - width + 1)
    for direction in (True, False):
        observed = np.bincount(start[horizontal == direction], minlength=GRID - width + 1)
        assert len(observed) == len(expected)
        assert stats.chisquare(observed, expected * observed.sum()).pvalue > 1e-3
    assert stats.binomtest(int(horizontal.sum()), draws, 0.5).pvalue > 1e-3


def test_cls_coin_is_independent_of_the_stripe():
    split = StripeMasking(GRID, 3, cls_in_source=0.3).sample(200_000, torch.Generator().manual_seed(9))
    coin = (split.source[:, 0] == 0).numpy()
    assert stats.binomtest(int(coin.sum()), len(coin), 0.3).pvalue > 1e-3
    first = np.where(coin, (split.source[:, 1] - 1).numpy(), (split.source[:, 0] - 1).numpy())
    horizontal = np.where(
        coin,
        (split.source[:, 12] - split.source[:, 1]).numpy() == 11,
        (split.source[:, 11] - split.source[:, 0]).numpy() == 11,
    )
    cut = np.where(horizontal, first // GRID, GRID + first % GRID)
    table = np.array([np.bincount(cut[coin == side], minlength=2 * GRID) for side in (False, True)])
    assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3


@pytest.mark.parametrize("width", [2, 3, 4])
def test_stripes_cover_whole_lines_shifted_inside(width):
    masking = StripeMasking(GRID, width, cls_in_source=0.0)
    split = masking.sample(5000, torch.Generator().manual_seed(1))
    starts = {stripe_of(row, cls=True) for row in split.source}
    assert {d for d, _ in starts} == {0, 1}
    assert {s for _, s in starts} == set(range(GRID - width + 1))


def test_the_patch_that_cls_replaces_lies_on_the_border():
    for masking in (StripeMasking(cls_in_source=1.0), QuadrantMasking(cls_in_source=1.0)):
        without = type(masking)(cls_in_source=0.0)
        for cut in range(len(masking.source_table)):
            gone = set(without.source_table[cut, 0].tolist()) - set(masking.source_table[cut, 1].tolist())
            (patch,) = gone
            row, column = divmod(patch - 1, GRID)
            assert row in (0, GRID - 1) or column in (0, GRID - 1)


def test_samples_are_independent_and_reproducible():
    masking = StripeMasking()
    a = masking.sample(64, torch.Generator().manual_seed(3))
    b = masking.sample(64, torch.Generator().manual_seed(3))
    assert torch.equal(a.source, b.source) and len({tuple(row.tolist()) for row in a.source}) > 10


@pytest.mark.parametrize(
    "masking",
    [StripeMasking(width=w, cls_in_source=None) for w in range(1, 7)]
    + [QuadrantMasking(cls_in_source=None), MultiblockMasking()],
    ids=[*(f"stripes {w}" for w in range(1, 7)), "quadrant", "multiblock"],
)
def test_no_border_artefact(masking):
    # Over all splits of a step, every patch can be source and target, and mirrored patches equally often.
    counts = torch.zeros(2, GRID * GRID)
    n = 40_000
    for split in masking.sample_all(n, torch.Generator().manual_seed(11)):
        for side, index in enumerate(split):
            counts[side] += torch.bincount(index.flatten(), minlength=GRID * GRID)
    assert (counts > 0).all()
    for side in counts.reshape(2, GRID, GRID):
        error = 5 * side.max().sqrt()
        if isinstance(masking, StripeMasking) and masking.width % 2 == 0:
            continue  # i_c - width // 2 puts even stripes half a patch towards the top left (O8)
        mirrors = (side.flip(0), side.flip(1)) + (
            (side.T,) if not isinstance(masking, MultiblockMasking) else ()
        )  # aspect 0.75 to 1.5
        for mirrored in mirrors:
            assert (side - mirrored).abs().max() < 2 * error


def test_quadrants_are_equally_likely():
    split = QuadrantMasking(cls_in_source=None).sample(40_000, torch.Generator().manual_seed(2))
    observed = np.unique(split.source[:, 0].numpy(), return_counts=True)
    assert observed[0].tolist() == [0, 7, 98, 105] and stats.chisquare(observed[1]).pvalue > 1e-3


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_cls_has_one_side_in_every_masking(p):
    for masking in (
        StripeMasking(cls_in_source=p),
        QuadrantMasking(cls_in_source=p),
        MultiblockMasking(cls_in_source=p),
    ):
        for split in masking.sample_all(4000, torch.Generator().manual_seed(1)):
            source, target = (split.source == 0).sum(1), (split.target == 0).sum(1)
            assert (source + target == 1).all()
            assert abs(source.float().mean() - p) <= 4 * (p * (1 - p) / 4000) ** 0.5


def test_multiblock_is_static_and_reaches_every_line():
    for p in (None, 0.5):
        masking = MultiblockMasking(GRID, cls_in_source=p)
        cls = int(p is not None)
        for mode, (n_source, n_target) in enumerate(masking.mode_sizes):
            split = masking.sample(3000, torch.Generator().manual_seed(0), mode=mode)
            assert split.source.shape == (3000, n_source) and split.target.shape == (3000, n_target)
            assert (torch.cat(split, 1).sort(1).values.diff(dim=1) > 0).all()
            for side in split:
                patches = side[side >= cls] - cls
                assert set((patches // GRID).tolist()) == set((patches % GRID).tolist()) == set(range(GRID))


@pytest.mark.parametrize(
    "bad", [dict(width=0), dict(width=14), dict(cls_in_source=1.5), dict(k=0), dict(kind="circle")]
)
def test_impossible_maskings_are_refused(bad):
    with pytest.raises(ValueError):
        create_masking(**({"kind": "stripes"} | bad))
    with pytest.raises(ValueError, match="even grid"):
        QuadrantMasking(13)
