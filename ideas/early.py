"""JEPA with four changes tried for short runs (nbs/benchmarks/recipe.ipynb); each is off at its default.

{method: ideas/early.py:EarlyJEPA, method_options: {splits: 4, blocks: 2, penalty: 0.05, area: 0.6}}"""

import torch

from mefem.beyond import sigreg, stray
from mefem.jepa import JEPA, normalise_targets
from mefem.models import encode_tokens


class EarlyJEPA(JEPA):
    """JEPA with more from each pass of the teacher, other targets, a penalty, and crops that stray.

    `splits`: of each picture for one pass of the teacher; `blocks`: of the teacher, the last ones, over which
    targets are averaged (data2vec, arXiv 2202.03555); `penalty`: weight of SIGReg (arXiv 2511.08544) of the
    student's mean source token of each picture, over the pictures of the batch; `area`: of the boxes that are
    cut at random from the pictures, at least; below 1 half of them are mirrored too. One process."""

    def __init__(
        self,
        encoder,
        predictor,
        masking,
        weights,
        teacher_input="image",
        splits=1,
        blocks=1,
        penalty=0.0,
        area=1.0,
    ):
        super().__init__(encoder, predictor, masking, weights, teacher_input)
        fits = splits >= 1 and 1 <= blocks <= len(encoder.blocks) and 0 <= penalty < 1 and 0 < area <= 1
        if not fits:
            raise ValueError(
                f"EarlyJEPA: expected splits >= 1, 1 <= blocks <= {len(encoder.blocks)}, 0 <= penalty < 1, "
                f"0 < area <= 1; found {splits}, {blocks}, {penalty}, {area}"
            )
        self.splits, self.blocks, self.penalty, self.area = splits, blocks, penalty, area

    def forward(self, images: torch.Tensor, generator: torch.Generator | None = None, splits=None) -> dict:
        """As in `JEPA`; the splits of a picture are rows of one larger batch."""
        if self.area < 1:
            images = stray(images, self.area, generator)
        tokens = self.encode_picture(images)
        images = images.repeat(self.splits, 1, 1, 1)
        if tokens is not None:
            tokens = tokens.repeat(self.splits, 1, 1)
        splits = splits or self.masking.sample_all(len(images), generator, images.device)
        out = self.predict(images, tokens, splits, generator)
        if not self.penalty:
            return out
        return out | {"loss": (1 - self.penalty) * out["loss"] + self.penalty * self.sigreg(generator)}

    def predict(self, images, all_tokens, splits, generator=None) -> dict:
        """As in `JEPA`; keeps the student's mean source token of each row."""
        self.means = []
        hook = self.predictor.register_forward_pre_hook(
            lambda module, args: self.means.append(args[0].mean(1))
        )
        try:
            return super().predict(images, all_tokens, splits, generator)
        finally:
            hook.remove()

    def sigreg(self, generator) -> torch.Tensor:
        """Of the mean source tokens: [splits * B, D] for each split that the masking draws."""
        means = torch.stack([mean.unflatten(0, (self.splits, -1)) for mean in self.means]).flatten(0, 1)
        self.means = []
        return sigreg(means.transpose(0, 1), generator=generator)  # [B, splits, D]

    @torch.no_grad()
    def encode_picture(self, images: torch.Tensor) -> torch.Tensor | None:
        """The teacher's tokens [B, N, D]: the mean over its last blocks, each normalised over channels."""
        if self.blocks == 1 or self.teacher_input != "image":
            return super().encode_picture(images)
        outputs = []
        hooks = [
            block.register_forward_hook(lambda module, args, out: outputs.append(normalise_targets(out)))
            for block in self.teacher.blocks[-self.blocks :]
        ]
        try:
            encode_tokens(self.teacher, images)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(outputs).mean(0)
