"""Maskings: the distribution of eq. 4, and the promise of static, disjoint, complete splits."""

import numpy as np
import pytest
import torch
from scipy import stats

from mefem.masking import MultiblockMasking, QuadrantMasking, StripeMasking, create_masking, stripe_probabilities

GRID = 14


def stripe_of(row: torch.Tensor, cls: bool) -> tuple[int, int]:
    "Direction and first line of the stripe in one source row, found from the patches alone."
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


def test_stripe_centre_follows_equation_4():
    # Width 1: the stripe is its centre. 200,000 draws against scipy's truncated normal over the rounding cells.
    draws, k = 200_000, 0.175
    split = StripeMasking(GRID, 1, k, cls_in_source=None).sample(draws, torch.Generator().manual_seed(0))
    first, second = split.source[:, 0], split.source[:, 1]
    horizontal = second - first == 1
    centre = torch.where(horizontal, first // GRID, first % GRID).numpy()
    mean, sd = (GRID - 1) / 2, GRID * k
    law = stats.truncnorm((0 - mean) / sd, (GRID - 1 - mean) / sd, mean, sd)
    expected = np.diff(law.cdf(np.clip(np.arange(GRID + 1) - 0.5, 0, GRID - 1)))
    np.testing.assert_allclose(stripe_probabilities(GRID, k).numpy(), expected, atol=1e-12)
    for direction in (True, False):
        observed = np.bincount(centre[horizontal.numpy() == direction], minlength=GRID)
        assert stats.chisquare(observed, expected * observed.sum()).pvalue > 1e-3
    assert stats.binomtest(int(horizontal.sum()), draws, 0.5).pvalue > 1e-3


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


@pytest.mark.parametrize("bad", [dict(width=0), dict(width=14), dict(cls_in_source=1.5), dict(k=0), dict(kind="circle")])
def test_impossible_maskings_are_refused(bad):
    with pytest.raises(ValueError):
        create_masking(**({"kind": "stripes"} | bad))
    with pytest.raises(ValueError, match="even grid"):
        QuadrantMasking(13)
