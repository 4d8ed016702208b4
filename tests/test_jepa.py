"""The method against the paper's equations in float64, and the encoder against timm."""

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
from scipy import integrate, special

from mefem.jepa import JEPA, draw_targets, epps_pulley, inclusion_probabilities, jepa_loss, sigreg, whiten
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


# The whole method once more in numpy and float64, one picture and one token at a time, from the equations: nothing below
# calls mefem or torch but to read the parameters.


def norm(x, state, name, eps=1e-6):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def block(x, state, name, heads, eps):
    """A transformer block on tokens [K, D]: attention head by head, then the perceptron, each on normed tokens."""
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
    """Predictions [|T|, D] for one picture: embedded source tokens and mask tokens, each at its place, through the blocks."""

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
    """Eq. 5 with smooth L1, layer-normed targets (O4), for float64 pictures [B, 3, 112, 112]; mean over pictures and splits."""
    student, teacher, predictor = (
        {k: v.numpy() for k, v in m.state_dict().items()}
        for m in (jepa.student, jepa.teacher, jepa.predictor)
    )
    total = []
    for split in splits:
        for image, source, target in zip(
            images.numpy(), split.source.tolist(), split.target.tolist(), strict=True
        ):
            everything = range(196 + cls) if teacher_input == "image" else target
            seen = dict(zip(everything, encode(image, teacher, everything, cls), strict=True))
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


# I-JEPA as its paper and released weights have it, written once more in plain torch: no CLS, no weights, names of its own
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


@pytest.mark.parametrize("kind", ["layer", "batch", "whiten"])
def test_targets_are_normalised_as_described(kind):
    jepa = tiny(target_norm=kind).double()
    images = torch.randn(5, 3, 112, 112, dtype=torch.float64)
    index = jepa.masking.sample(5, torch.Generator().manual_seed(0)).target
    z = encode_tokens(jepa.teacher, images).numpy()
    if kind == "layer":
        z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    else:
        z = z - z.mean(0)
        flat = z.reshape(-1, z.shape[-1])
        c = flat.T @ flat / len(flat)
        whitener = np.linalg.inv(scipy.linalg.sqrtm(c + 1e-3 * np.trace(c) / len(c) * np.eye(len(c))).real)
        z = z @ whitener if kind == "whiten" else z / np.sqrt((z**2).mean((0, 1)) + 1e-5)
    expected = np.stack([z[b, index[b]] for b in range(5)])
    np.testing.assert_allclose(jepa.targets(images, index).numpy(), expected, atol=1e-10)


def test_whitened_targets_of_alike_or_broken_tokens():
    """Tokens that are all alike give zeros, not infinities; a token that is not a number stays visible in the loss."""
    assert (whiten(torch.zeros(2, 5, 4)) == 0).all()
    assert whiten(torch.full((2, 5, 4), torch.nan)).isnan().all()


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
        torch.testing.assert_close(
            encode_tokens(encoder, images, everything), encoder.forward_features(images), rtol=1e-4, atol=1e-5
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


# ---- beyond the paper: a drawn share of the targets, and SIGReg in place of the teacher


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
    # The draw changes with u only where a sum of probabilities crosses an integer: between those, one value. So the
    # expectation over u is a finite sum, exact in float64.
    rng = np.random.default_rng(count)
    w, losses = torch.from_numpy(rng.random((1, 18)) ** 2 + 1e-3), torch.from_numpy(rng.random(18) * 5)
    crossings = np.unique(
        np.concatenate([[0.0, 1.0], np.mod(np.cumsum(inclusion_probabilities(w, count)[0].numpy()), 1)])
    )
    expectation, drawn = 0.0, np.zeros(18)
    for low, high in zip(crossings[:-1], crossings[1:], strict=True):
        place, factor = draw_targets(w, count, u=torch.tensor([[(low + high) / 2]], dtype=torch.float64))
        assert place.shape == (1, count) and (place.diff(dim=1) > 0).all()
        expectation += (high - low) * (factor[0] * losses[place[0]]).mean().item()
        drawn[place[0]] += high - low
    assert expectation == pytest.approx((w[0] * losses).mean().item(), abs=1e-12)
    np.testing.assert_allclose(drawn, inclusion_probabilities(w, count)[0], atol=1e-12)


def test_a_share_of_targets_gives_the_loss_of_all_on_average():
    # A predictor whose answers do not depend on what else is asked: there the whole step's loss is unbiased.
    jepa = tiny(target_share=0.2)
    jepa.predictor.blocks = torch.nn.Identity()
    images, generator = torch.randn(1, 3, 112, 112), torch.Generator().manual_seed(0)
    split = jepa.masking.sample(1, generator)
    with torch.no_grad():
        draws = np.array([jepa(images, generator, [split])["loss"].item() for _ in range(400)])
        jepa.target_share = 1.0
        everything = jepa(images, splits=[split])["loss"].item()
    assert abs(draws.mean() - everything) < 4 * draws.std() / 20 and draws.std() > 0


def test_all_targets_are_the_default_and_draw_nothing():
    images = torch.randn(2, 3, 112, 112)
    one, two = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    jepa = tiny()
    split = jepa.masking.sample(2, one)
    assert jepa(images, two)["loss"] == jepa(images, splits=[split])["loss"]
    assert torch.equal(one.get_state(), two.get_state())
    index, weights = jepa.asked(split.target)
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
    """LeJEPA's SIGReg once more: unit directions, one integral each, n times the squared distance of characteristic functions."""
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
    jepa = tiny(sigreg=0.05)
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
    for bad in (dict(sigreg=1.0), dict(sigreg=0.1, teacher_input="targets"), dict(target_share=0.0)):
        with pytest.raises(ValueError, match="sigreg|target_share"):
            tiny(**bad)


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
