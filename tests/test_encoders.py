"""Each loader against an independent forward pass in double precision.

From random weights in the publisher's keys."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mefem.encoders import (
    ARCFACE_TEMPLATE,
    PixelEncoder,
    WeightsAbsent,
    WeightsMismatch,
    align_face,
    franca_positions,
    freeze,
    load_encoder,
    nominal_points,
    resize,
    save_pixels,
    similarity,
)
from mefem.export import plain_vit
from mefem.fairness import SeesOnly
from mefem.features import select_tokens
from mefem.models import create_encoder, encode_tokens, save_encoder

FACES = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)


def draw(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape) * 0.05)


# -- ours
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [True, False])
def test_own_checkpoint(tmp_path, cls):
    kwargs = SMALL | {"class_token": cls}
    model = create_encoder("vit_small_patch16_224", **kwargs).eval()
    path = save_encoder(tmp_path / "encoder.safetensors", model, "vit_small_patch16_224", kwargs)
    encoder = load_encoder(path, device="cpu")
    assert (encoder.tokens, encoder.dim, encoder.has_cls, encoder.heads, encoder.image_size) == (
        16 + cls,
        24,
        cls,
        3,
        32,
    )
    faces = FACES[:, :32, :32]
    x = (
        torch.from_numpy(faces).permute(0, 3, 1, 2) / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    ) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(encoder.tokens_of(faces), encode_tokens(model, x), atol=1e-5)
    assert torch.equal(load_encoder(tmp_path, device="cpu").tokens_of(faces), encoder.tokens_of(faces))
    chance = load_encoder(f"random:{path}", device="cpu")
    other = {"encoder": "", "encoder_hash": ""}
    assert (
        chance.about() | other == encoder.about() | other and chance.weights_hash() != encoder.weights_hash()
    )
    assert chance.weights_hash() == load_encoder(f"random:{path}", device="cpu").weights_hash()
    assert torch.equal(chance.tokens_of(faces), load_encoder(f"random:{path}", device="cpu").tokens_of(faces))
    assert not torch.allclose(chance.tokens_of(faces), encoder.tokens_of(faces), atol=0.1)


def released(dim=128, depth=2):
    return create_encoder("vit_small_patch16_224", embed_dim=dim, depth=depth, num_heads=dim // 64).eval()


def test_released_file_in_half_precision(tmp_path):
    model = released()
    state = {k: v.half() for k, v in model.state_dict().items()}
    torch.save(state | {"head.weight": torch.zeros(3, 128)}, tmp_path / "MeFEm-S.pth.tar")
    encoder = load_encoder(tmp_path / "MeFEm-S.pth.tar", device="cpu")
    assert (
        encoder.dropped == ("head.weight",)
        and encoder.dim == 128
        and encoder.tokens == 197
        and encoder.heads == 2
    )
    model.load_state_dict({k: v.float() for k, v in state.items()})
    assert next(encoder.model.parameters()).dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(
            encoder.tokens_of(FACES), model.forward_features(encoder.prepare(FACES)), atol=1e-6
        )


def test_every_key_that_does_not_fit_is_named(tmp_path):
    state = released().state_dict()
    state["blocks.1.gain"] = state.pop("blocks.1.norm1.weight")
    state["norm.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "bad.pth.tar")
    with pytest.raises(WeightsMismatch) as error:
        load_encoder(tmp_path / "bad.pth.tar")
    assert len(error.value.faults) == 3
    for part in (
        "bad.pth.tar",
        "missing: blocks.1.norm1.weight",
        "without a place: blocks.1.gain",
        "norm.bias: shape (7,)",
    ):
        assert part in str(error.value)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was executed')",))


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save({"state": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsMismatch, match="evil.pth"):
        load_encoder(tmp_path / "evil.pth")
    for content in (b"hello", b"a,b\n1,2\n", b"", b"PK\3\4junk", b"\x80\x04}q."):
        (tmp_path / "embeddings.csv").write_bytes(content)
        with pytest.raises(WeightsMismatch, match="embeddings.csv is not a whole PyTorch file") as error:
            load_encoder(tmp_path / "embeddings.csv")
        assert "weights_only" not in str(error.value), "torch's advice to execute the file is not passed on"
    for name in ("evil.pth", "embeddings.csv"):
        with pytest.raises(WeightsMismatch, match=name):
            load_encoder(f"pixels:{tmp_path / name}")


# -- FaRL: CLIP's image tower, from the equations of its paper
# ---------------------------------------------------------


def clip_state(rng, dim=128, depth=2, grid=14):
    state = {
        "class_embedding": (dim,),
        "positional_embedding": (1 + grid**2, dim),
        "conv1.weight": (dim, 3, 16, 16),
        "proj": (dim, 64),
    }
    for name in ("ln_pre", "ln_post"):
        state |= {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
    for i in range(depth):
        p = f"transformer.resblocks.{i}."
        state |= {
            p + "ln_1.weight": (dim,),
            p + "ln_1.bias": (dim,),
            p + "ln_2.weight": (dim,),
            p + "ln_2.bias": (dim,),
            p + "attn.in_proj_weight": (3 * dim, dim),
            p + "attn.in_proj_bias": (3 * dim,),
            p + "attn.out_proj.weight": (dim, dim),
            p + "attn.out_proj.bias": (dim,),
            p + "mlp.c_fc.weight": (4 * dim, dim),
            p + "mlp.c_fc.bias": (4 * dim,),
            p + "mlp.c_proj.weight": (dim, 4 * dim),
            p + "mlp.c_proj.bias": (dim,),
        }
    return {k: draw(rng, *s) + (1.0 if "ln_" in k and k.endswith("weight") else 0) for k, s in state.items()}


def norm(x, weight, bias, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight + bias


def attend(x, w_in, b_in, w_out, b_out, heads):
    b, n, d = x.shape
    q, k, v = (x @ w_in.T + b_in).reshape(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / (d // heads) ** 0.5
    scores = torch.exp(scores - scores.amax(-1, keepdim=True))
    mixed = torch.einsum("bhij,bhjd->bihd", scores / scores.sum(-1, keepdim=True), v)
    return mixed.reshape(b, n, d) @ w_out.T + b_out


def patches_of(x, weight):
    """Patch embedding as a plain product of unfolded patches."""
    b, d, p = len(x), weight.shape[0], weight.shape[-1]
    g = x.shape[-1] // p
    cut = x.reshape(b, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(b, g * g, -1)
    return cut @ weight.reshape(d, -1).T


def clip_forward(s, x, heads, depth):
    x = torch.cat([s["class_embedding"].expand(len(x), 1, -1), patches_of(x, s["conv1.weight"])], 1)
    x = norm(x + s["positional_embedding"], s["ln_pre.weight"], s["ln_pre.bias"], 1e-5)
    for i in range(depth):
        p = {k.split(f"resblocks.{i}.")[1]: v for k, v in s.items() if f"resblocks.{i}." in k}
        y = norm(x, p["ln_1.weight"], p["ln_1.bias"], 1e-5)
        x = x + attend(
            y,
            p["attn.in_proj_weight"],
            p["attn.in_proj_bias"],
            p["attn.out_proj.weight"],
            p["attn.out_proj.bias"],
            heads,
        )
        y = norm(x, p["ln_2.weight"], p["ln_2.bias"], 1e-5) @ p["mlp.c_fc.weight"].T + p["mlp.c_fc.bias"]
        x = x + (y / (1 + torch.exp(-1.702 * y))) @ p["mlp.c_proj.weight"].T + p["mlp.c_proj.bias"]
    return norm(x, s["ln_post.weight"], s["ln_post.bias"], 1e-5)


@torch.no_grad()
def test_farl(tmp_path):
    state = clip_state(np.random.default_rng(1))
    text = {
        "positional_embedding": torch.zeros(77, 8),
        "token_embedding.weight": torch.zeros(5, 8),
        "logit_scale": torch.ones(()),
    }
    torch.save(
        {"state_dict": {f"visual.{k}": v for k, v in state.items()} | text, "epoch": 16},
        tmp_path / "farl.pth",
    )
    encoder = load_encoder(f"farl:{tmp_path / 'farl.pth'}", device="cpu")
    assert (encoder.tokens, encoder.dim, encoder.heads) == (197, 128, 2)
    assert set(encoder.dropped) == {*text, "visual.proj"} and encoder.about()["keys_left_out"] == 4
    x = (
        torch.from_numpy(FACES).double().permute(0, 3, 1, 2) / 255
        - torch.tensor([0.48145466, 0.4578275, 0.40821073]).double().view(3, 1, 1)
    ) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).double().view(3, 1, 1)
    state = {k: v.float().double() for k, v in state.items()}
    wanted = clip_forward(state, x, 2, 2)
    assert torch.allclose(encoder.tokens_of(FACES).double(), wanted, atol=2e-5)
    assert torch.allclose(encoder.model.double()(x), wanted, atol=1e-10)


# -- Franca: DINOv2's ViT with SwiGLU and layer scale
# ------------------------------------------------------------------


def franca_state(rng, dim=128, depth=4, chunks=2, hidden=344, grid=37):
    state = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + grid**2, dim),
        "mask_token": (1, dim),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "patch_embed.proj.weight": (dim, 3, 14, 14),
        "patch_embed.proj.bias": (dim,),
    }
    for i in range(depth):
        p = f"blocks.{i // (depth // chunks)}.{i}."
        state |= {
            p + "norm1.weight": (dim,),
            p + "norm1.bias": (dim,),
            p + "norm2.weight": (dim,),
            p + "norm2.bias": (dim,),
            p + "attn.qkv.weight": (3 * dim, dim),
            p + "attn.qkv.bias": (3 * dim,),
            p + "attn.proj.weight": (dim, dim),
            p + "attn.proj.bias": (dim,),
            p + "ls1.gamma": (dim,),
            p + "ls2.gamma": (dim,),
            p + "mlp.w12.weight": (2 * hidden, dim),
            p + "mlp.w12.bias": (2 * hidden,),
            p + "mlp.w3.weight": (dim, hidden),
            p + "mlp.w3.bias": (dim,),
        }
    return {k: draw(rng, *s) + (1.0 if "norm" in k and k.endswith("weight") else 0) for k, s in state.items()}


def bicubic_matrix(out, size, scale):
    """Weights of bicubic interpolation (Keys' kernel, a = -0.75) with given scale and repeated borders."""

    def kernel(t):
        t = abs(t)
        return (
            (1.25 * t - 2.25) * t * t + 1 if t <= 1 else -0.75 * (((t - 5) * t + 8) * t - 4) if t < 2 else 0.0
        )

    weights = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        at = (i + 0.5) / scale - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            weights[i, min(max(j, 0), size - 1)] += kernel(at - j)
    return weights


def franca_forward(s, x, heads, depth, chunks=2):
    grid, dim = x.shape[-1] // 14, s["cls_token"].shape[-1]
    m = bicubic_matrix(grid, 37, (grid + 0.1) / 37)
    table = torch.einsum("ia,jb,abd->ijd", m, m, s["pos_embed"][0, 1:].reshape(37, 37, dim)).reshape(-1, dim)
    x = patches_of(x, s["patch_embed.proj.weight"]) + s["patch_embed.proj.bias"] + table
    x = torch.cat([(s["cls_token"][0] + s["pos_embed"][0, :1]).expand(len(x), 1, -1), x], 1)
    for i in range(depth):
        p = {
            k.split(".", 3)[3]: v
            for k, v in s.items()
            if k.startswith(f"blocks.{i // (depth // chunks)}.{i}.")
        }
        y = norm(x, p["norm1.weight"], p["norm1.bias"], 1e-6)
        x = x + p["ls1.gamma"] * attend(
            y, p["attn.qkv.weight"], p["attn.qkv.bias"], p["attn.proj.weight"], p["attn.proj.bias"], heads
        )
        y = norm(x, p["norm2.weight"], p["norm2.bias"], 1e-6) @ p["mlp.w12.weight"].T + p["mlp.w12.bias"]
        gate, value = y.chunk(2, -1)
        y = gate / (1 + torch.exp(-gate)) * value @ p["mlp.w3.weight"].T + p["mlp.w3.bias"]
        x = x + p["ls2.gamma"] * y
    return norm(x, s["norm.weight"], s["norm.bias"], 1e-6)


@torch.no_grad()
def test_franca(tmp_path):
    state = {k: v.float() for k, v in franca_state(np.random.default_rng(2)).items()}
    heads = {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.last.weight": torch.zeros(2)}
    teacher = {f"backbone.{k}": v for k, v in state.items()} | heads
    torch.save({"teacher": {f"module.{k}": v for k, v in teacher.items()}}, tmp_path / "franca.pth")
    encoder = load_encoder(f"franca:{tmp_path / 'franca.pth'}", device="cpu")
    assert (encoder.tokens, encoder.dim, encoder.heads) == (257, 128, 2)
    assert set(encoder.dropped) == {*heads, "mask_token"}
    x = encoder.prepare(FACES).double()
    wanted = franca_forward({k: v.double() for k, v in state.items()}, x, 2, 4)
    assert torch.allclose(encoder.tokens_of(FACES).double(), wanted, atol=5e-5)
    assert torch.allclose(
        encoder.model.double()(x), wanted, atol=2e-6
    )  # the table was interpolated in single precision
    table = torch.randn(1, 1 + 37**2, 4)
    assert torch.equal(franca_positions(table, 37), table)
    with pytest.raises(WeightsMismatch, match="teacher"):
        torch.save({"model": state}, tmp_path / "other.pth")
        load_encoder(f"franca:{tmp_path / 'other.pth'}")
    with pytest.raises(ValueError, match="no architecture of timm by name"):
        plain_vit(f"franca:{tmp_path / 'franca.pth'}")


# -- Buffalo: an ONNX file written by hand
# -----------------------------------------------------------------------------


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def onnx_mean_colour(weight):
    """An ONNX model: mean colour of each picture [N, 3], times weight [3, 512]."""

    def node(kind, inputs, output):
        return field(1, b"".join(field(1, i) for i in inputs) + field(2, output) + field(4, kind))

    def info(number, name, *dims):
        shape = b"".join(field(1, field(2, d) if isinstance(d, str) else field(1, d)) for d in dims)
        return field(number, field(1, name) + field(2, field(1, field(1, 1) + field(2, shape))))

    tensor = (
        b"".join(field(1, d) for d in weight.shape)
        + field(2, 1)
        + field(8, "w")
        + field(9, struct.pack(f"<{weight.size}f", *weight.ravel()))
    )
    graph = (
        node("GlobalAveragePool", ["x"], "p")
        + node("Flatten", ["p"], "f")
        + node("MatMul", ["f", "w"], "y")
        + field(2, "g")
        + field(5, tensor)
        + info(11, "x", "n", 3, 112, 112)
        + info(12, "y", "n", 512)
    )
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13))


def test_buffalo(tmp_path):
    pytest.importorskip("onnxruntime")
    weight = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    (tmp_path / "w600k_r50.onnx").write_bytes(onnx_mean_colour(weight))
    encoder = load_encoder(f"buffalo:{tmp_path / 'w600k_r50.onnx'}")
    assert (encoder.tokens, encoder.dim, encoder.has_cls) == (1, 512, True)
    faces = np.full((2, 224, 224, 3), (250, 100, 5), np.uint8)
    found = encoder.tokens_of(faces)[:, 0].numpy()
    bgr = (np.array([5, 100, 250]) - 127.5) / 127.5
    assert np.allclose(found, bgr @ weight, atol=1e-4) and encoder.unaligned == 2
    masked = SeesOnly(encoder, np.ones((224, 224), bool))
    there = pickle.loads(pickle.dumps(masked))  # as it would travel to a process of joblib's
    assert (
        torch.equal(there.tokens_of(faces), masked.tokens_of(faces))
        and there.weights_hash() == masked.weights_hash()
    )


def test_alignment_recovers_a_known_pose():
    angle, scale, shift = 0.4, 1.7, np.array([60.0, 35.0])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    four = np.concatenate([ARCFACE_TEMPLATE[:3], ARCFACE_TEMPLATE[3:].mean(0, keepdims=True)])
    found = similarity(four @ turn.T + shift, four)
    assert np.allclose(found[:, :2] @ turn, np.eye(2)) and np.allclose(found[:, :2] @ shift + found[:, 2], 0)
    with pytest.raises(ValueError, match="coincide"):
        similarity(np.ones((4, 2)), four)


def test_alignment_moves_pixels_where_the_points_say():
    points = nominal_points(224)
    rgb = np.zeros((224, 224, 3), np.uint8)
    for i, (x, y) in enumerate(points):
        rgb[int(round(y)) - 2 : int(round(y)) + 3, int(round(x)) - 2 : int(round(x)) + 3, i % 3] = 255
    aligned = align_face(rgb, points)
    for i, channel in ((1, 1), (2, 2)):
        ys, xs = np.nonzero(aligned[..., channel] > 100)
        assert np.allclose([xs.mean(), ys.mean()], ARCFACE_TEMPLATE[i], atol=0.8)


def test_buffalo_alignment_on_real_faces(shared):
    from mefem.faces import FaceDetector, crop_face, read_image

    detector = FaceDetector()
    template = np.concatenate([ARCFACE_TEMPLATE[:3], ARCFACE_TEMPLATE[3:].mean(0, keepdims=True)])
    errors = []
    for path in sorted((shared / "frll").glob("*.jpg"))[:6]:
        crop = crop_face(read_image(path))
        aligned = align_face(crop, detector.detect(crop)[0].keypoints[:4])
        again = detector.detect(np.pad(aligned, ((56, 56), (56, 56), (0, 0)), mode="edge"))
        if again:
            errors.append(np.abs(again[0].keypoints[:4] - 56 - template).mean())
    assert len(errors) >= 4 and np.mean(errors) < 4  # pixels of 112


# -- pixels, timm, names
# ---------------------------------------------------------------------------------------------


def test_pixels_are_scikit_learns_pca_and_come_back_from_disk(tmp_path):
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    faces = (
        (rng.random((60, 1, 1, 5)) @ rng.random((5, 16 * 16 * 3)) * 50)
        .clip(0, 255)
        .astype(np.uint8)
        .reshape(60, 16, 16, 3)
    )
    encoder = PixelEncoder(components=5, image_size=16, device="cpu").fit(faces)
    flat = faces.transpose(0, 3, 1, 2).reshape(60, -1) / 255
    exact = PCA(5, svd_solver="full").fit(flat)
    assert np.allclose(np.abs(encoder.tokens_of(faces)[:, 0]), np.abs(exact.transform(flat)), atol=1e-3)
    again = PixelEncoder(components=5, image_size=16, device="cpu").fit(faces)
    assert torch.equal(again.axes, encoder.axes)
    save_pixels(tmp_path / "p.safetensors", encoder)
    loaded = load_encoder(f"pixels:{tmp_path / 'p.safetensors'}", device="cpu")
    assert torch.equal(loaded.tokens_of(faces), encoder.tokens_of(faces)) and loaded.dim == 5
    assert (
        PixelEncoder(components=128, image_size=8).fit(FACES).dim == 1
    )  # no more components than pictures carry
    with pytest.raises(ValueError, match="fit"):
        load_encoder("pixels").tokens_of(FACES)


@pytest.mark.parametrize(
    "name, tokens, dim",
    [
        ("vit_tiny_patch16_224", 197, 192),
        ("resnet18", 50, 512),
        ("resmlp_12_224", 197, 384),
        ("swin_tiny_patch4_window7_224", 50, 768),
        ("vit_pwee_patch16_reg1_gap_256", 256, 256),
    ],
)
def test_random_timm_models(name, tokens, dim):
    a = load_encoder(f"random:{name}", device="cpu")
    assert (a.tokens, a.dim) == (tokens, dim)
    assert torch.equal(
        a.tokens_of(FACES[:1]), load_encoder(f"random:{name}", device="cpu").tokens_of(FACES[:1])
    )


TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}
FAMILIES = {  # timm name -> (changes that make it small, CLS?, prefix tokens, patches)
    "vit_tiny_patch16_224": (TINY, True, 1, 14**2),
    "vit_small_patch14_reg4_dinov2": (TINY | {"img_size": 56}, True, 5, 4**2),
    "vit_pwee_patch16_reg1_gap_256": (TINY, False, 1, 16**2),
    "vit_base_patch16_siglip_224": (TINY, False, 0, 14**2),
    "vit_base_patch16_clip_224": (TINY, True, 1, 14**2),
    "aimv2_large_patch14_224": (TINY, False, 0, 16**2),
    "vit_tiny_r_s16_p8_224": ({"embed_dim": 48, "depth": 2}, True, 1, 7**2),
    "vit_small_patch16_dinov3": (TINY, True, 5, 16**2),
    "vit_base_patch16_rope_reg1_gap_256": (TINY, False, 1, 16**2),
    "eva02_tiny_patch14_224": (TINY, True, 1, 16**2),
    "eva_giant_patch14_224": (TINY, True, 1, 16**2),
    "vit_pe_core_tiny_patch16_384": ({"depth": 2}, True, 1, 24**2),
    "beit_base_patch16_224": (TINY, True, 1, 14**2),
    "beitv2_base_patch16_224": (TINY, True, 1, 14**2),
    "deit_tiny_distilled_patch16_224": (TINY, True, 2, 14**2),
    "deit3_small_patch16_224": (TINY, True, 1, 14**2),
    "vit_relpos_base_patch16_cls_224": (TINY, True, 1, 14**2),
    "vit_relpos_small_patch16_224": (TINY, False, 0, 14**2),
    "naflexvit_base_patch16_par_gap": ({"embed_dim": 48, "depth": 2, "num_heads": 3}, False, 4, 24**2),
    "cait_xxs24_224": ({"embed_dim": 48, "depth": 2, "num_heads": 3}, True, 1, 14**2),
    "convit_tiny": ({}, True, 1, 14**2),
    "xcit_nano_12_p16_224": ({"depth": 2}, True, 1, 14**2),
    "tnt_s_patch16_224": ({"depth": 2}, True, 1, 14**2),
    "mvitv2_small_cls": ({}, True, 1, 7**2),
    "vitamin_small_224": ({}, False, 0, 14**2),
}


def tokens_of_timm(name, changes):
    """The encoder, and what the network itself gives for the same pictures."""
    import timm

    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=0, **changes).eval()
    config = timm.data.resolve_model_data_config(model)
    size = changes.get("img_size", config["input_size"][1])
    encoder = freeze(name, model, config["mean"], config["std"], size, device="cpu")
    with torch.no_grad():
        return encoder, encoder.tokens_of(FACES[:1]), model.forward_features(encoder.prepare(FACES[:1]))


@pytest.mark.parametrize("name", FAMILIES)
def test_cls_registers_and_patches_of_each_family(name):
    changes, cls, prefix, patches = FAMILIES[name]
    encoder, tokens, whole = tokens_of_timm(name, changes)
    assert whole.shape[1] == prefix + patches, "the table above is right about timm"
    assert (encoder.has_cls, encoder.tokens) == (cls, cls + patches)
    assert torch.equal(select_tokens(tokens, "patches", cls), whole[:, prefix:]), (
        "every patch, and neither register nor CLS"
    )
    if cls:
        assert torch.equal(select_tokens(tokens, "cls", cls), whole[:, 0])
    else:
        with pytest.raises(ValueError, match="no CLS"):
            select_tokens(tokens, "cls", cls)


def test_networks_without_a_count_of_their_prefix():
    """VOLO has a CLS and no `num_prefix_tokens`; PiT gives its CLS alone, distilled or not."""
    volo, tokens, whole = tokens_of_timm("volo_d1_224", {})
    assert volo.has_cls and whole.shape[1] == 197 and torch.equal(tokens, whole)
    for name in ("pit_ti_224", "pit_ti_distilled_224"):
        pit, tokens, whole = tokens_of_timm(name, {"depth": (1, 1, 1)})
        assert pit.has_cls and pit.tokens == 1 and torch.equal(tokens, whole[:, :1])


@pytest.mark.parametrize(
    "name, words",
    [
        ("crossvit_tiny_240", "gives a list"),
        ("coat_lite_tiny", "not a square"),
        ("efficientvim_m1", "gives a list"),
        ("lcnet_035", "pooled vector"),
    ],
)
def test_networks_that_cannot_be_read_are_refused(name, words):
    with pytest.raises(ValueError, match=f"({words}).*not supported"):
        load_encoder(f"random:{name}", device="cpu")


def test_tokens_that_are_no_square_are_refused():
    """A prefix that nothing says must not be taken for patches."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, reg_tokens=3, **TINY)
    model.num_prefix_tokens = 1
    with pytest.raises(ValueError, match="200 tokens, of which 199 should be patches.*not supported"):
        freeze("odd", model, (0.5,) * 3, (0.5,) * 3, device="cpu")


def test_random_weights_leave_the_global_generator_alone():
    torch.manual_seed(3)
    a = torch.rand(1)
    torch.manual_seed(3)
    load_encoder("random:vit_tiny_patch16_224", device="cpu")
    assert torch.equal(a, torch.rand(1))


@pytest.fixture
def empty_caches(monkeypatch, tmp_path):
    """No weights anywhere, and a network that must not be asked."""
    import socket

    import huggingface_hub.constants

    monkeypatch.setenv("MEFEM_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(
        socket.socket, "connect", lambda *_: pytest.fail("weights were asked for over the network")
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_timm_weights_are_never_fetched_unasked(empty_caches):
    for name in ("timm:resnet10t", "resnet10t"):
        with pytest.raises(WeightsAbsent, match="never fetched unasked(.|\n)*random:resnet10t"):
            load_encoder(name)
    for name in ("timm:resnet_what", "random:resnet_what"):
        with pytest.raises(ValueError, match="timm knows no model 'resnet_what'"):
            load_encoder(name)


@pytest.mark.parametrize(
    "place", ["{}/resnet10t.safetensors", "{}/torch/checkpoints/resnet10t_176_c3-f3215ab1.pth"]
)
def test_timm_weights_from_where_they_lie(empty_caches, place):
    """A plain timm name, with its authors' size, mean and std; the classifier of the file is left out."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(5)
    model = timm.create_model("resnet10t").eval()
    file = Path(place.format(empty_caches))
    file.parent.mkdir(parents=True, exist_ok=True)
    (save_file if file.suffix == ".safetensors" else torch.save)(model.state_dict(), str(file))
    encoder = load_encoder("resnet10t", device="cpu")
    assert (encoder.image_size, encoder.tokens, encoder.dim) == (176, 1 + 6 * 6, 512)
    with torch.no_grad():
        found, features = encoder.tokens_of(FACES), model.forward_features(encoder.prepare(FACES))
    assert torch.allclose(found[:, 1:], features.flatten(2).transpose(1, 2), atol=1e-4)
    assert torch.allclose(found[:, 0], features.mean((2, 3)), atol=1e-4)


@pytest.mark.parametrize("name", ["mefem-s", "mefem-b", "farl", "franca", "buffalo"])
def test_absent_weights_say_how_to_get_them(name, monkeypatch, tmp_path):
    monkeypatch.setenv("MEFEM_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsAbsent) as error:
        load_encoder(name)
    assert "licence: " in str(error.value) and "to get it: " in str(error.value)


@pytest.mark.parametrize(
    "name, error, words",
    [
        ("nothing", ValueError, "mefem-s"),
        ("random:", ValueError, "needs a model"),
        ("gone.safetensors", WeightsAbsent, "gone.safetensors"),
        ("farl:gone.pth", WeightsAbsent, "gone.pth"),
        ("timm:", ValueError, "needs a model"),
    ],
)
def test_unknown_names(name, error, words):
    with pytest.raises(error, match=words):
        load_encoder(name)


def test_wrong_pictures_are_refused():
    encoder = load_encoder("random:vit_tiny_patch16_224", device="cpu")
    for wrong in (FACES.astype(np.float32), FACES[0], FACES[..., :1]):
        with pytest.raises(ValueError, match=r"uint8 \[B, H, W, 3\]"):
            encoder.tokens_of(wrong)
    with pytest.raises(ValueError, match="224 x 100"):
        encoder.tokens_of(FACES[:, :100])
    assert resize(torch.zeros(1, 10, 10, 3, dtype=torch.uint8), 7).shape == (1, 7, 7, 3)


def test_bf16_is_close():
    a, b = (
        load_encoder("random:vit_tiny_patch16_224", device="cpu", precision=p).tokens_of(FACES[:1])
        for p in ("fp32", "bf16")
    )
    assert (
        b.dtype == torch.float32 and not torch.equal(a, b) and F.cosine_similarity(a, b, dim=-1).min() > 0.99
    )
