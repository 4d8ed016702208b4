"""MeFEm: a face encoder pretrained by a joint embedding predictive architecture (arXiv 2602.14672).

Own photographs:

- `load_encoder(name)`: a frozen encoder, from a run's folder, a file, or a name
- `embed(crops, encoder)`: embeddings of face crops
- `FaceEmbedder(encoder)`: photographs to embeddings as a scikit-learn transformer
- `probe_labels(embeddings, labels, target)`, `predict_labels(model, embeddings)`: own labels
- `pretrain_photographs(photographs, out)`: an encoder of one's own
- `export_encoder(run, out, to)`: for timm, transformers or ONNX

Faces: `FaceDetector`, `Face`, `crop_face`, `read_image`; errors `ImageError`, `CropError`, `WeightsAbsent`.
A checkout's settings: `load_settings`. Modules, such as `mefem.masking`, are attributes. All are loaded when they
are first used: `import mefem` itself needs neither torch nor mediapipe.

>>> import numpy, mefem
>>> crop = mefem.crop_face(numpy.zeros((400, 400, 3), numpy.uint8), box=(150, 150, 250, 250), min_side=1)
>>> crop.shape
(224, 224, 3)
>>> encoder = mefem.load_encoder("random:vit_tiny_patch16_224")
>>> mefem.embed(crop[None], encoder, "mean").shape
(1, 192)
"""

__version__ = "0.1.0"

from importlib import import_module as _import_module

_PUBLIC = {
    "FaceDetector": "faces",
    "Face": "faces",
    "crop_face": "faces",
    "read_image": "faces",
    "CropError": "faces",
    "ImageError": "faces",
    "load_encoder": "encoders",
    "WeightsAbsent": "encoders",
    "embed": "features",
    "FaceEmbedder": "features",
    "load_settings": "config",
    "pretrain_photographs": "own_pictures",
    "probe_labels": "own_labels",
    "predict_labels": "own_labels",
    "export_encoder": "export",
}
_MODULES = set(
    "files compute made_from config faces shards simulate datasets provide masking weighting models jepa monitoring "
    "training encoders features probing metrics own_labels own_pictures export hub report ablations fairness pictures "
    "datasheets readme cli".split()
)

# Packages of the install's parts: pip install mefem[simulate]
_EXTRAS = {
    "anny": "simulate", "warp": "simulate", "matplotlib": "paper", "seaborn": "paper", "tabulate": "paper",
    "jinja2": "paper",
    "av": "video", "onnxruntime": "buffalo", "onnx": "onnx", "onnxscript": "onnx",
}


def _missing_part(error):
    """What to install where a module of an optional part is missing; "" for any other error."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    part = _EXTRAS.get(package) if isinstance(error, ModuleNotFoundError) else None
    return f"the package {package} is missing: pip install 'mefem[{part}]'" if part else ""


def __getattr__(name):
    if name not in _PUBLIC and name not in _MODULES:
        raise AttributeError(f"module 'mefem' has no attribute {name!r}")
    try:
        module = _import_module(f"mefem.{_PUBLIC.get(name, name)}")
    except ModuleNotFoundError as error:
        if not _missing_part(error):
            raise
        raise ModuleNotFoundError(f"mefem.{name}: {_missing_part(error)}", name=error.name) from error
    return getattr(module, name) if name in _PUBLIC else module


def __dir__():
    return sorted({*globals(), *_PUBLIC, *_MODULES})
