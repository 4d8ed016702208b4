"""The options of the crop stage.

Its work on data sets is tested with the readers, on folders with the embeddings."""

from dataclasses import asdict

import pytest

from mefem.config import CropSettings
from mefem.crop import Cropping, Framing
from mefem.datasets.core import DatasetError


def test_defaults_of_the_crop_stage_are_those_of_the_settings():
    settings, defaults = CropSettings().model_dump(), asdict(Cropping())
    assert settings.pop("framing") == {} and defaults.pop("framing") is None
    assert settings == defaults


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="min_sides"):
        Cropping(min_sides=64)
    with pytest.raises(DatasetError, match="framing 'tight': expected 'paper' or 'dataset'"):
        Cropping(framing="tight")
    with pytest.raises(ValueError, match="framing 'tight' is unknown"):
        Framing(framing="tight")
