"""MeFEm: a face encoder pretrained by a joint embedding predictive architecture (arXiv 2602.14672).

Your own photographs:

- `load_encoder(name)`: a frozen encoder, from a run's folder, a file, or a name
- `embed(crops, encoder)`: embeddings of face crops
- `FaceEmbedder(encoder)`: photographs to embeddings, a transformer of scikit-learn
- `probe_labels(embeddings, labels, target)`: how well embeddings predict a label of yours
- `predict_labels(model, embeddings)`: predictions for new photographs
- `pretrain_photographs(photographs, out)`: an encoder of your own
- `export_encoder(run, out, to)`: for timm, transformers or ONNX

Faces: `FaceDetector`, `Face`, `crop_face`, `read_image`. Errors: `ImageError`, `CropError`, `WeightsAbsent`.
Settings of a checkout: `load_settings`. Modules are attributes, such as `mefem.masking`.
All are loaded when they are first used: `import mefem` itself needs neither torch nor mediapipe.

>>> import numpy, mefem
>>> photograph = numpy.zeros((400, 400, 3), numpy.uint8)
>>> crop = mefem.crop_face(photograph, box=(150, 150, 250, 250), min_side=1)
>>> crop.shape
(224, 224, 3)
>>> encoder = mefem.load_encoder("random:vit_tiny_patch16_224")
>>> mefem.embed(crop[None], encoder, "mean").shape
(1, 192)
"""

__version__ = "0.1.0"

from importlib import import_module as _import_module
from pkgutil import iter_modules as _iter_modules

_PUBLIC = {
    "FaceDetector": "faces",
    "Face": "faces",
    "crop_face": "faces",
    "read_image": "faces",
    "CropError": "faces",
    "ImageError": "faces",
    "load_encoder": "encoders",
    "WeightsAbsent": "encoders",
    "embed": "embedding",
    "FaceEmbedder": "embedder",
    "load_settings": "config",
    "probe_labels": "own_labels",
    "predict_labels": "own_labels",
    "pretrain_photographs": "own_pictures",
    "export_encoder": "export",
}
_MODULES = {module.name for module in _iter_modules(__path__) if not module.name.startswith("_")}

# Optional packages that the modules import, and the part of the install that brings each: pip install mefem[simulate]
_EXTRAS = {
    "anny": "simulate",
    "warp": "simulate",
    "matplotlib": "paper",
    "jinja2": "paper",
    "markdown_it": "paper",
    "mapie": "paper",
    "av": "video",
    "onnxruntime": "buffalo",
    "onnx": "onnx",
    "onnxscript": "onnx",
}


def _missing_part(error) -> str:
    """What to install where an optional package is missing; "" for any other error."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    part = _EXTRAS.get(package) if isinstance(error, ModuleNotFoundError) else None
    return f"the package {package} is missing: pip install 'mefem[{part}]'" if part else ""


def __getattr__(name: str):
    if name not in _PUBLIC and name not in _MODULES:
        raise AttributeError(f"module 'mefem' has no attribute {name!r}")
    try:
        module = _import_module(f"mefem.{_PUBLIC.get(name, name)}")
    except ModuleNotFoundError as error:
        if missing := _missing_part(error):
            raise ModuleNotFoundError(f"mefem.{name}: {missing}", name=error.name) from error
        raise
    return getattr(module, name) if name in _PUBLIC else module


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_MODULES})
