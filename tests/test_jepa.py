"""The method against the paper's equations in float64, and the encoder against timm."""

import numpy as np
import pytest
import timm
import torch
from scipy import special

from mefem.jepa import JEPA, jepa_loss
from mefem.masking import MultiblockMasking, StripeMasking
from mefem.models import (
    Predictor,
    create_encoder,
    encode_tokens,
    fuse_attention,
    load_encoder_file,
    save_encoder,
)
from mefem.weighting import circular_weights, patch_radius, token_weights, uniform_weights

KWARGS = dict(img_size=112, patch_size=8, embed_dim=32, depth=2, num_heads=2)


def tiny(masking=None, cls=True, **kwargs):
    torch.manual_seed(0)
    encoder = create_encoder(**KWARGS, **({} if cls else {"class_token": False}))
    return JEPA(
        encoder,
        Predictor(32, 14, cls, dim=16, depth=1, heads=2),
        masking or StripeMasking(),
        circular_weights(),
        **kwargs,
    )


def test_weights_are_the_sigmoid_of_the_text_in_float64():
    w = circular_weights(14, r0=5.5, sigma=1.5)
    for y, x in [(0, 0), (6, 7), (3, 10), (13, 2)]:
        r = np.hypot(y - 6.5, x - 6.5)
        assert patch_radius(14)[y, x].item() == pytest.approx(r, abs=1e-12)
        assert w[y, x].item() == pytest.approx(1 / (1 + np.exp(1.5 * (r - 5.5))), rel=1e-6)
    assert token_weights(w)[0] == 1 and (uniform_weights() == 1).all()
    falling = w[6, 7:].diff()
    assert (falling <= 0).all() and falling.min() < -0.2


# The whole method once more in numpy and float64, one picture and one token at a time, from the equations:
# nothing below calls mefem or torch but to read the parameters.


def norm(x, state, name, eps=1e-6):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def block(x, state, name, heads, eps):
    """A transformer block on tokens [K, D].

    Attention head by head, then the perceptron, each on normed tokens."""
    q, k, v = np.split(linear(norm(x, state, f"{name}.norm1", eps), state, f"{name}.attn.qkv"), 3, axis=-1)
    width, mixed = x.shape[1] // heads, []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        mixed.append(special.softmax(q[:, part] @ k[:, part].T / np.sqrt(width), axis=-1) @ v[:, part])
    x = x + linear(np.concatenate(mixed, -1), state, f"{name}.attn.proj")
    y = linear(norm(x, state, f"{name}.norm2", eps), state, f"{name}.mlp.fc1")
    return x + linear(y * special.ndtr(y), state, f"{name}.mlp.fc2")  # GELU(y) = y Phi(y)


def encode(image, state, tokens, cls, depth=2, heads=2):
    """Representations [K, D] of the tokens of one image [3, 112, 112], which attend to each other alone."""
    embedded = []
    for token in tokens:
        if cls and token == 0:
            x = state["cls_token"][0, 0]
        else:
            row, column = divmod(token - cls, 14)
            patch = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            x = (state["patch_embed.proj.weight"] * patch).sum((1, 2, 3)) + state["patch_embed.proj.bias"]
        embedded.append(x + state["pos_embed"][0, token])
    x = np.stack(embedded)
    for i in range(depth):
        x = block(x, state, f"blocks.{i}", heads, 1e-6)
    return norm(x, state, "norm")


def predict(known, state, source, target, cls, heads=2):
    """Predictions [|T|, D] for one picture.

    Embedded source tokens and mask tokens, each at its place, through the blocks."""

    def place(token):
        return state["cls_position"][0, 0] if cls and token == 0 else state["positions"][0, token]

    x = [linear(z, state, "embed") + place(token) for z, token in zip(known, source, strict=True)]
    x = np.stack(x + [state["mask_token"][0, 0] + place(token) for token in target])
    x = block(x, state, "blocks.0", heads, 1e-6)
    return linear(norm(x, state, "norm", 1e-6), state, "project")[len(source) :]


def weight_of(token, cls):
    """Eq. 6 with the sign of its text; 1 for CLS."""
    y, x = divmod(token - cls, 14)
    return 1.0 if cls and token == 0 else 1 / (1 + np.exp(1.5 * (np.hypot(y - 6.5, x - 6.5) - 5.5)))


def loss_by_hand(jepa, images, splits, cls, teacher_input):
    """Eq.

    5 with smooth L1, layer-normed targets (O4), for float64 pictures [B, 3, 112, 112]; mean over pictures and
    splits."""
    student, teacher, predictor = (
        {k: v.numpy() for k, v in m.state_dict().items()}
        for m in (jepa.student, jepa.teacher, jepa.predictor)
    )
    total = []
    for split in splits:
        for image, source, target in zip(
            images.numpy(), split.source.tolist(), split.target.tolist(), strict=True
        ):
            all_tokens = range(196 + cls) if teacher_input == "image" else target
            seen = dict(zip(all_tokens, encode(image, teacher, all_tokens, cls), strict=True))
            predicted = predict(encode(image, student, source, cls), predictor, source, target, cls)
            loss = 0.0
            for guess, token in zip(predicted, target, strict=True):
                z = (seen[token] - seen[token].mean()) / np.sqrt(seen[token].var() + 1e-5)
                gap = np.abs(guess - z)
                loss += weight_of(token, cls) * np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
            total.append(loss / len(target))
    return np.mean(total)


@pytest.mark.parametrize("teacher_input", ["image", "targets"])
@pytest.mark.parametrize(
    "masking",
    [
        StripeMasking(cls_in_source=1.0),
        StripeMasking(cls_in_source=0.0),
        StripeMasking(cls_in_source=None),
        MultiblockMasking(cls_in_source=0.5),
    ],
    ids=["CLS in source", "CLS in targets", "no CLS", "multiblock"],
)
def test_loss_is_equation_5_by_hand_in_float64(masking, teacher_input):
    cls = masking.cls_in_source is not None
    jepa = tiny(masking, cls, teacher_input=teacher_input).double()
    weights = [weight_of(token, cls) for token in range(196 + cls)]
    torch.testing.assert_close(
        jepa.weights, torch.tensor(weights, dtype=torch.float64), rtol=1e-6, atol=1e-8
    )  # rounded to float32
    jepa.weights = torch.tensor(weights, dtype=torch.float64)
    with torch.no_grad():  # no symmetry left: biases, norms and tokens random, the teacher not the student
        for p in jepa.parameters():
            p.add_(0.1 * torch.randn_like(p))
    images = torch.randn(2, 3, 112, 112, dtype=torch.float64)
    splits = masking.sample_all(2, torch.Generator().manual_seed(4))
    expected = loss_by_hand(jepa, images, splits, int(cls), teacher_input)
    with torch.no_grad():
        found = jepa(images, splits=splits)["loss"].item()
    assert abs(found - expected) < 1e-10 * max(1.0, expected)
    assert expected > 0.05  # a loss to speak of


# I-JEPA as its paper and released weights have it, written once more in plain torch: no CLS, no weights,
# names of its own
# checkpoints. Those are loaded into ours.


class Attention(torch.nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = (
            part.reshape(b, n, self.heads, d // self.heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        scores = q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5
        return self.proj(
            (torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ v).transpose(1, 2).reshape(b, n, d)
        )


class TransformerBlock(torch.nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = (torch.nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = Attention(dim, heads)
        self.mlp = torch.nn.ModuleDict(
            {"fc1": torch.nn.Linear(dim, 4 * dim), "fc2": torch.nn.Linear(4 * dim, dim)}
        )

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        hidden = self.mlp["fc1"](self.norm2(x))
        return x + self.mlp["fc2"](hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)


class ReferenceEncoder(torch.nn.Module):
    """Pictures [B, 3, 112, 112] and kept patches [B, K] (None: all) to representations [B, K, dim]."""

    def __init__(self, dim=32, depth=2, heads=2):
        super().__init__()
        self.patch_embed = torch.nn.ModuleDict({"proj": torch.nn.Conv2d(3, dim, 8, stride=8)})
        self.pos_embed = torch.nn.Parameter(torch.empty(1, 196, dim))
        self.blocks = torch.nn.ModuleList(TransformerBlock(dim, heads) for _ in range(depth))
        self.norm = torch.nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images, kept=None):
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed
        x = x if kept is None else torch.stack([tokens[rows] for tokens, rows in zip(x, kept, strict=True)])
        for layer in self.blocks:
            x = layer(x)
        return self.norm(x)


class ReferencePredictor(torch.nn.Module):
    def __init__(self, dim=32, width=16, depth=2, heads=2):
        super().__init__()
        self.predictor_embed, self.predictor_proj = torch.nn.Linear(dim, width), torch.nn.Linear(width, dim)
        self.mask_token, self.predictor_pos_embed = (
            torch.nn.Parameter(torch.empty(1, n, width)) for n in (1, 196)
        )
        self.predictor_blocks = torch.nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.predictor_norm = torch.nn.LayerNorm(width, eps=1e-6)

    def forward(self, context, kept, asked):
        places = self.predictor_pos_embed[0]
        x = torch.cat([self.predictor_embed(context) + places[kept], self.mask_token + places[asked]], 1)
        for layer in self.predictor_blocks:
            x = layer(x)
        return self.predictor_proj(self.predictor_norm(x)[:, kept.shape[1] :])


def test_i_jepas_weights_give_i_jepas_loss():
    torch.manual_seed(0)
    student, teacher, predictor = (
        module.double() for module in (ReferenceEncoder(), ReferenceEncoder(), ReferencePredictor())
    )
    with torch.no_grad():
        for module in (student, teacher, predictor):
            for p in module.parameters():
                p.normal_(std=0.3)
    masking = StripeMasking(cls_in_source=None)
    jepa = JEPA(
        create_encoder(**KWARGS, class_token=False),
        Predictor(32, 14, cls=False, dim=16, depth=2, heads=2),
        masking,
        uniform_weights(),
    )
    ours = {
        "predictor_embed": "embed",
        "predictor_pos_embed": "positions",
        "predictor_blocks": "blocks",
        "predictor_norm": "norm",
        "predictor_proj": "project",
        "mask_token": "mask_token",
    }
    jepa.double()
    jepa.student.load_state_dict(student.state_dict())
    jepa.teacher.load_state_dict(teacher.state_dict())
    jepa.predictor.load_state_dict(
        {
            ".".join([ours[name.partition(".")[0]], *name.split(".")[1:]]): value
            for name, value in predictor.state_dict().items()
        }
    )
    images, split = (
        torch.randn(3, 3, 112, 112, dtype=torch.float64),
        masking.sample(3, torch.Generator().manual_seed(1)),
    )
    with torch.no_grad():
        z = torch.stack([tokens[rows] for tokens, rows in zip(teacher(images), split.target, strict=True)])
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        gap = (predictor(student(images, split.source), split.source, split.target) - z).abs()
        expected = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean().item()
        assert abs(jepa(images, splits=[split])["loss"].item() - expected) < 1e-12 and expected > 0.3


def test_targets_are_normalised_as_described():
    jepa = tiny().double()
    images = torch.randn(5, 3, 112, 112, dtype=torch.float64)
    index = jepa.masking.sample(5, torch.Generator().manual_seed(0)).target
    z = encode_tokens(jepa.teacher, images).numpy()
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    expected = np.stack([z[b, index[b]] for b in range(5)])
    found = jepa.targets(images, index, jepa.encode_picture(images))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)


def test_jepa_loss_in_float64_formula():
    p, t, w = torch.randn(2, 7, 5), torch.randn(2, 7, 5), torch.rand(2, 7)
    x = (p - t).abs().double().numpy()
    expected = (np.where(x < 1, x**2 / 2, x - 0.5).mean(-1) * w.double().numpy()).mean()
    assert jepa_loss(p, t, w).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"])
def test_all_tokens_are_timms_forward_features_and_state_loads_strictly(name, tmp_path):
    encoder = create_encoder(name, depth=2).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encode_tokens(encoder, images), encoder.forward_features(images))
        all_tokens = torch.arange(197)
        torch.testing.assert_close(
            encode_tokens(encoder, images, all_tokens), encoder.forward_features(images), rtol=1e-4, atol=1e-5
        )
    path = save_encoder(tmp_path / "e.safetensors", encoder, name, {"depth": 2})
    loaded, about = load_encoder_file(path)
    plain = timm.create_model(name, num_classes=0, global_pool="token", depth=2).eval()
    plain.load_state_dict(loaded.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain.forward_features(images), encode_tokens(loaded, images))
    assert about["architecture"] == name


def test_subset_equals_encoding_with_the_rest_removed():
    encoder = create_encoder(**KWARGS).eval()
    images, index = torch.randn(2, 3, 112, 112), torch.tensor([[0, 3, 77], [5, 100, 196]])
    with torch.no_grad():
        tokens = encoder._pos_embed(encoder.patch_embed(images))
        kept = torch.stack([tokens[b, index[b]] for b in range(2)])
        expected = encoder.norm(encoder.blocks(kept))
        torch.testing.assert_close(encode_tokens(encoder, images, index), expected)


def test_no_gradient_reaches_the_teacher_and_ema_follows():
    jepa = tiny().train()
    assert not jepa.teacher.training
    jepa(torch.randn(2, 3, 112, 112), torch.Generator().manual_seed(0))["loss"].backward()
    assert all(p.grad is None for p in jepa.teacher.parameters())
    assert all(p.grad is not None for p in jepa.student.parameters() if p.requires_grad)
    assert all(p.grad is not None for p in jepa.predictor.parameters() if p.requires_grad)


def test_without_cls_and_with_multiblock():
    for masking, cls in [
        (StripeMasking(cls_in_source=None), False),
        (MultiblockMasking(), False),
        (MultiblockMasking(cls_in_source=0.5), True),
    ]:
        out = tiny(masking, cls)(torch.randn(2, 3, 112, 112), torch.Generator().manual_seed(0))
        assert torch.isfinite(out["loss"])
    with pytest.raises(ValueError, match="disagree on CLS"):
        tiny(StripeMasking(cls_in_source=None), cls=True)
    with pytest.raises(ValueError, match="teacher_input"):
        tiny(teacher_input="source")


def test_truncated_encoder_file_is_named(tmp_path):
    path = save_encoder(tmp_path / "e.safetensors", create_encoder(**KWARGS), "vit_small_patch16_224", KWARGS)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="e.safetensors is not a whole safetensors file"):
        load_encoder_file(path)


def test_attention_in_parts_gives_what_the_fused_kernel_gives():
    encoder = (
        create_encoder(
            "vit_small_patch16_224", img_size=112, patch_size=8, embed_dim=32, depth=2, num_heads=2
        )
        .double()
        .eval()
    )
    images = torch.randn(2, 3, 112, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fused = encode_tokens(encoder, images)
    fuse_attention(encoder, False)
    assert not any(block.attn.fused_attn for block in encoder.blocks)
    assert torch.allclose(encode_tokens(encoder, images), fused, atol=1e-12)


def test_the_same_weights_give_the_same_bytes(tmp_path):
    kwargs = dict(img_size=112, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    encoder = create_encoder("vit_small_patch16_224", **kwargs)
    written = {
        save_encoder(
            tmp_path / f"{i}.safetensors", encoder, "vit_small_patch16_224", kwargs, run="main", note="ü"
        ).read_bytes()
        for i in range(20)
    }
    assert len(written) == 1
    loaded, about = load_encoder_file(tmp_path / "0.safetensors")
    assert about["run"] == "main" and about["note"] == "ü"
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in encoder.state_dict().items())
    assert int.from_bytes(written.pop()[:8], "little") % 8 == 0
