"""An export gives the encoder's tokens wherever it is loaded, and its model card's lines run."""

import json
import re
import runpy

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from mefem.cli import app
from mefem.encoders import load_encoder
from mefem.export import ExportError, export_encoder, plain_vit
from mefem.files import write_json
from mefem.models import create_encoder, save_encoder

TOY = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)
SHAPES = {
    "toy": TOY,
    "no CLS": TOY | {"class_token": False},
    "layer scale": TOY | {"init_values": 0.1},
    "ViT-Ti/16": dict(embed_dim=192, depth=1, num_heads=3),
}


def need(*packages):
    for name in packages:
        pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run's folder for each shape, with weights far from their initial values."""
    home, found = tmp_path_factory.mktemp("runs"), {}
    for name, kwargs in SHAPES.items():
        torch.manual_seed(1)
        encoder = create_encoder(**kwargs)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        found[name] = home / name.replace("/", "-")
        save_encoder(found[name] / "encoder.safetensors", encoder, "vit_small_patch16_224", kwargs)
    return found


@pytest.fixture
def crops(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "crop.png")
    return pixels


def test_the_line_names_a_relative_folder(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export_encoder(runs["toy"], "out") == 'timm.create_model("local-dir:out", pretrained=True)'


def test_what_a_killed_call_left_is_cleared(runs, tmp_path):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "model.safetensors").write_bytes(b"half")
    export_encoder(runs["toy"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("shape", SHAPES)
def test_timm_gives_the_tokens_of_load_encoder(runs, tmp_path, shape):
    export_encoder(runs[shape], tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    frozen = load_encoder(runs[shape], device="cpu")
    pictures = np.random.default_rng(0).integers(
        0, 256, (2, frozen.image_size, frozen.image_size, 3), np.uint8
    )
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = torch.stack([prepare(Image.fromarray(picture)) for picture in pictures])
    with torch.no_grad():
        tokens, pooled = model.forward_features(images), model(images)
    expected = frozen.tokens_of(pictures)
    assert torch.allclose(tokens, expected, atol=1e-5) and tokens.shape == expected.shape
    wanted = expected[:, 0] if frozen.has_cls else expected.mean(1)
    assert torch.allclose(pooled, wanted, atol=1e-5)
    about = timm.data.resolve_model_data_config(model)
    assert (tuple(about["mean"]), tuple(about["std"])) == (frozen.mean, frozen.std)
    assert about["input_size"] == (3, frozen.image_size, frozen.image_size)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["global_pool"] == ("token" if frozen.has_cls else "avg")
    assert model.patch_embed.patch_size[0] == SHAPES[shape].get("patch_size", 16)
    assert model.num_prefix_tokens == int(frozen.has_cls) and not getattr(model, "num_reg_tokens", 0)


def test_transformers_gives_the_tokens(runs, tmp_path, crops):
    need("transformers")
    from transformers import ViTModel

    export_encoder(runs["toy"], tmp_path / "out", "hf")
    model = ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    frozen = load_encoder(runs["toy"], device="cpu")
    with torch.no_grad():
        found = model(frozen.prepare(crops)).last_hidden_state
    assert torch.allclose(found, frozen.tokens_of(crops), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "words"), [("no CLS", "no CLS token"), ("layer scale", "blocks.0.ls1.gamma")]
)
def test_what_transformers_cannot_hold_is_refused(runs, tmp_path, shape, words):
    with pytest.raises(ExportError, match=words):
        export_encoder(runs[shape], tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", ["toy", "no CLS"])
def test_onnx_gives_the_tokens_of_any_number_of_pictures(runs, tmp_path, shape):
    need("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    export_encoder(runs[shape], tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "out/encoder.onnx"))
    frozen = load_encoder(runs[shape], device="cpu")
    for batch in (1, 2, 5):
        pictures = np.random.default_rng(batch).integers(0, 256, (batch, 32, 32, 3), np.uint8)
        found = session.run(None, {"images": frozen.prepare(pictures).numpy()})
        tokens = np.concatenate([found[0][:, None], found[1]], 1) if frozen.has_cls else found[0]
        np.testing.assert_allclose(tokens, frozen.tokens_of(pictures).numpy(), atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(about["mean"])) == frozen.mean


def test_a_missing_package_is_named_with_the_remedy(runs, tmp_path, monkeypatch):
    import mefem.export

    monkeypatch.setattr(mefem.export, "_have", lambda *names: [name for name in names if name == "onnx"])
    arguments = ["export", str(runs["toy"]), "-o", str(tmp_path / "out"), "--to", "onnx"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr == "mefem: export to ONNX needs onnx: pip install 'mefem[onnx]'\n"


@pytest.mark.parametrize(
    ("to", "packages"), [("timm", ()), ("hf", ("transformers",)), ("onnx", ("onnx", "onnxscript"))]
)
def test_the_lines_of_the_card_run(runs, tmp_path, crops, monkeypatch, to, packages):
    need(*packages)
    export_encoder(runs["toy"], tmp_path / "out", to)
    card = (tmp_path / "out/README.md").read_text()
    (tmp_path / "use.py").write_text(
        re.search("```python\n(.*?)```", card, re.S)[1].replace("crop.jpg", "crop.png")
    )
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path("use.py")["embedding"]
    expected = load_encoder(runs["toy"], device="cpu").tokens_of(crops[:1])[:, 1:].mean(1)
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), atol=1e-4)


def test_the_card_says_what_the_run_left_and_no_more(runs, tmp_path):
    run, faces = tmp_path / "data/runs/main", tmp_path / "data/faces"
    save_encoder(run / "encoder.safetensors", create_encoder(**TOY), "vit_small_patch16_224", TOY)
    export_encoder(run, tmp_path / "a")
    assert "| pictures | not recorded |" in (tmp_path / "a/README.md").read_text()
    settings = {"datasets": ["sfhq", "bmi"], "steps": 1200, "batch": 64}
    made = {"settings": "1a2b", "data": "3c4d", "code": "5e6f"}
    write_json(run / "run.json", {"run": "main", "pictures": 12345, "settings": settings, "made_from": made})
    write_json(faces / "bmi/manifest.json", {"crop": {"framing": "dataset"}})
    export_encoder(run, tmp_path / "b", licence="cc-by-4.0")
    card = (tmp_path / "b/README.md").read_text()
    for words in (
        "license: cc-by-4.0\n",
        "| pictures | 12,345 |",
        "| training | 1,200 steps of 64 pictures |",
        "| data | sfhq, bmi |",
        "| framing in training | bmi: dataset |",
        "| made from | settings 1a2b, data 3c4d, code 5e6f |",
        '"batch": 64',
    ):
        assert words in card, words


def test_a_folder_with_other_things_is_left_alone(runs, tmp_path):
    out = tmp_path / "out"
    export_encoder(runs["toy"], out)
    export_encoder(runs["no CLS"], out)  # over an earlier export
    assert not plain_vit(runs["no CLS"]).cls
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other things, such as notes.txt"):
        export_encoder(runs["toy"], out)
    assert (out / "notes.txt").read_text() == "mine"


def test_the_command(runs, tmp_path):
    result = CliRunner().invoke(app, ["export", str(runs["toy"]), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    line = result.output.splitlines()[-1]
    assert eval(line, {"timm": timm}).embed_dim == 64
    for arguments, words in (
        (["pixels"], "expected a plain VisionTransformer"),
        ([str(runs["toy"]), "--to", "tflite"], "expected one of timm, hf, onnx"),
        ([str(runs["toy"]), "--public"], "--public does nothing without --push-to"),
    ):
        result = CliRunner().invoke(app, ["export", *arguments, "-o", str(tmp_path / "no")])
        assert result.exit_code == 1 and words in result.stderr and not (tmp_path / "no").exists()


def test_version():
    import mefem

    assert CliRunner().invoke(app, ["--version"]).output == f"mefem {mefem.__version__}\n"
