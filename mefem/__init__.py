"""MeFEm: a face encoder pretrained by a joint embedding predictive architecture (arXiv 2602.14672).

The names below are loaded when they are first used: `import mefem` itself needs neither torch nor
mediapipe."""

__version__ = "0.1.0"

from importlib import import_module as _import_module
from pkgutil import iter_modules as _iter_modules

_PUBLIC = {
    "FaceDetector": "faces", "Face": "faces", "crop_face": "faces", "read_image": "faces", "CropError": "faces",
    "ImageError": "faces", "load_encoder": "encoders", "WeightsAbsent": "encoders", "embed": "embedding",
    "FaceEmbedder": "embedding", "load_settings": "config",
}
_MODULES = {module.name for module in _iter_modules(__path__) if not module.name.startswith("_")}


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(_import_module(f"mefem.{_PUBLIC[name]}"), name)
    if name in _MODULES:
        return _import_module(f"mefem.{name}")
    raise AttributeError(f"module 'mefem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_MODULES})
