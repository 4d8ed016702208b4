"""The method against the paper's equations in float64, and the encoder against timm."""

import numpy as np
import pytest
import timm
import torch

from mefem.jepa import JEPA, jepa_loss
from mefem.masking import MultiblockMasking, StripeMasking
from mefem.models import Predictor, create_encoder, encode_tokens, load_encoder_file, save_encoder
from mefem.weighting import circular_weights, patch_radius, token_weights, uniform_weights

KWARGS = dict(img_size=112, patch_size=8, embed_dim=32, depth=2, num_heads=2)


def tiny(masking=None, cls=True, **kwargs):
    torch.manual_seed(0)
    encoder = create_encoder(**KWARGS, **({} if cls else {"class_token": False}))
    return JEPA(encoder, Predictor(32, 14, cls, dim=16, depth=1, heads=2), masking or StripeMasking(), circular_weights(), **kwargs)


def test_weights_are_the_sigmoid_of_the_text_in_float64():
    w = circular_weights(14, r0=5.5, sigma=1.5)
    for y, x in [(0, 0), (6, 7), (3, 10), (13, 2)]:
        r = np.hypot(y - 6.5, x - 6.5)
        assert patch_radius(14)[y, x].item() == pytest.approx(r, abs=1e-12)
        assert w[y, x].item() == pytest.approx(1 / (1 + np.exp(1.5 * (r - 5.5))), rel=1e-6)
    assert token_weights(w)[0] == 1 and (uniform_weights() == 1).all()
    falling = w[6, 7:].diff()
    assert (falling <= 0).all() and falling.min() < -0.2


@pytest.mark.parametrize("teacher_input", ["image", "targets"])
def test_loss_is_equation_5_token_by_token(teacher_input):
    jepa = tiny(teacher_input=teacher_input).double()
    with torch.no_grad():  # a teacher that differs from the student, as after some steps
        for p in jepa.teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
    images = torch.randn(3, 3, 112, 112, dtype=torch.float64)
    split = jepa.masking.sample(3, torch.Generator().manual_seed(4))
    total = 0.0
    for b in range(3):
        s, t = split.source[b], split.target[b]
        known = encode_tokens(jepa.student, images[b : b + 1], s)
        predicted = jepa.predictor(known, s[None], t[None])[0].detach().numpy()
        z = encode_tokens(jepa.teacher, images[b : b + 1], None if teacher_input == "image" else t)[0].detach().numpy()
        z = z[t] if teacher_input == "image" else z
        for i, token in enumerate(t.tolist()):
            target = (z[i] - z[i].mean()) / np.sqrt(z[i].var() + 1e-5)
            x = np.abs(predicted[i] - target)
            smooth = np.where(x < 1, 0.5 * x**2, x - 0.5).mean()
            y, c = divmod(token - 1, 14)
            w = 1.0 if token == 0 else 1 / (1 + np.exp(1.5 * (np.hypot(y - 6.5, c - 6.5) - 5.5)))
            total += w * smooth / len(t) / 3
    out = jepa(images, splits=[split])
    # The loss itself is float32 (autocast); the weights too: agreement to their rounding.
    assert out["loss"].item() == pytest.approx(total, rel=3e-6)


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
        everything = torch.arange(197)
        torch.testing.assert_close(encode_tokens(encoder, images, everything), encoder.forward_features(images), rtol=1e-4, atol=1e-5)
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
    for masking, cls in [(StripeMasking(cls_in_source=None), False), (MultiblockMasking(), False), (MultiblockMasking(cls_in_source=0.5), True)]:
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
