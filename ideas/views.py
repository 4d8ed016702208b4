"""JEPA with a second prediction beside that of patches: which picture a view of it is from.

{method: ideas/views.py:ViewsJEPA, method_options: {weight: 0.5}} (nbs/benchmarks/recipe.ipynb)"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mefem.jepa import JEPA, at_least_float32, spread
from mefem.models import encode_tokens


def uniform(low: float, high: float, shape, like: torch.Tensor, generator=None) -> torch.Tensor:
    """Numbers in [`low`, `high`), drawn where `like` lies: no copy, no wait."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=like.device)


def stray(images: torch.Tensor, area: float, generator=None) -> torch.Tensor:
    """Each image [B, 3, H, W] cut to a box of at least `area` of it, anywhere; half of them mirrored."""
    count = len(images)
    size = uniform(area, 1, count, images, generator).sqrt()
    aspect = uniform(-0.15, 0.15, count, images, generator).exp().clamp(size, 1 / size)  # no side above 1
    half = torch.stack([size * aspect, size / aspect], 1)  # [B, 2]: of x and y, in half sides
    centre = uniform(-1, 1, (count, 2), images, generator) * (1 - half)
    mirror = 1 - 2 * uniform(0, 1, count, images, generator).round()
    affine = torch.stack([torch.diag_embed(half)[:, 0], torch.diag_embed(half)[:, 1]], 1)
    affine = torch.cat([affine, centre[:, :, None]], 2)  # [B, 2, 3]
    affine[:, 0, 0] *= mirror
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def recolour(images: torch.Tensor, strength: float, generator=None) -> torch.Tensor:
    """Normalised images [B, 3, H, W] with other contrast, saturation, brightness and tint; a fifth grey."""
    if not strength:
        return images
    one, three = (len(images), 1, 1, 1), (len(images), 3, 1, 1)

    def draw(low, high, shape=one):
        return uniform(low, high, shape, images, generator)

    mean = images.mean((2, 3), keepdim=True)
    images = mean + (images - mean) * draw(1 - strength, 1 + strength)
    grey = images.mean(1, keepdim=True)
    colour = torch.where(draw(0, 1) < 0.2, 0.0, draw(0, 1 + strength))
    light = draw(-strength, strength) * 1.5 + draw(-strength, strength, three) * 0.5
    return grey + (images - grey) * colour + light


def info_nce(a: torch.Tensor, b: torch.Tensor, temperature: float) -> torch.Tensor:
    """Which row of `b` belongs to each row of `a`, and the reverse, by cosine: arXiv 1807.03748, eq. 4.

    Both [B, D], B > 1; the other rows are the wrong answers. A scalar, divided by log B: guessing costs 1."""
    if len(a) < 2:
        raise ValueError("one picture cannot be told from others: expected a batch of at least 2 per process")
    a, b = (F.normalize(at_least_float32(x), dim=1) for x in (a, b))
    logits = a @ b.T / temperature
    same = torch.arange(len(a), device=a.device)
    both = F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)
    return both / (2 * math.log(len(a)))


class ViewsJEPA(JEPA):
    """JEPA whose student also tells pictures apart by two views of each.

    A view is a straying crop of at least `area` of the picture, at times mirrored, with other colours
    (`colour`: 0 leaves them), of which the student sees the share `keep` of the patches. The mean tokens of
    a picture's two views must find each other among the batch (`info_nce`). The loss is (1 - `weight`) *
    eq. 5 + `weight` * that; 1 leaves the paper's prediction out. Other pictures are those of one process."""

    def __init__(
        self,
        encoder,
        predictor,
        masking,
        weights,
        teacher_input="image",
        weight=0.5,
        keep=0.5,
        area=0.4,
        colour=0.4,
        temperature=0.2,
    ):
        super().__init__(encoder, predictor, masking, weights, teacher_input)
        if not (0 < weight <= 1 and 0 < keep <= 1 and 0 < area <= 1 and 0 <= colour < 1 and temperature > 0):
            raise ValueError(
                "ViewsJEPA: expected weight, keep and area in (0, 1], colour in [0, 1), temperature above 0; "
                f"found {weight}, {keep}, {area}, {colour}, {temperature}"
            )
        self.weight, self.keep, self.area = weight, keep, area
        self.colour, self.temperature = colour, temperature
        width = encoder.embed_dim
        self.head = nn.Sequential(
            nn.Linear(width, 512),
            nn.LayerNorm(512),
            nn.GELU(),
            nn.Linear(512, 128),
        )
        if weight == 1:
            self.predictor.requires_grad_(False)  # nothing asks it

    def forward(self, images: torch.Tensor, generator: torch.Generator | None = None, splits=None) -> dict:
        """As in `JEPA`; without its prediction, both spreads are those of the views."""
        views = [self.view(images, generator) for _ in range(2)]  # [B, K, D] each
        contrast = info_nce(*(self.head(tokens.mean(1)) for tokens in views), self.temperature)
        if self.weight == 1:
            spreads = [spread(tokens.detach().float()) for tokens in views]
            return {"loss": contrast, "target_spread": spreads[0], "prediction_spread": spreads[1]}
        out = super().forward(images, generator, splits)
        return out | {"loss": (1 - self.weight) * out["loss"] + self.weight * contrast}

    def view(self, images: torch.Tensor, generator=None) -> torch.Tensor:
        """The student's tokens [B, K, D] of some patches of a view of each picture; CLS is always there."""
        images = recolour(stray(images, self.area, generator), self.colour, generator)
        cls, patches = int(self.student.has_class_token), self.student.patch_embed.num_patches
        order = torch.rand(len(images), patches, generator=generator, device=images.device).argsort(1)
        index = order[:, : max(1, round(self.keep * patches))] + cls
        if cls:
            index = torch.cat([torch.zeros_like(index[:, :1]), index], 1)
        return encode_tokens(self.student, images, index)
