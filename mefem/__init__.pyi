"""What `mefem/__init__.py` loads when it is first used, for type checkers and editors."""

from . import (
    ablations as ablations,
    beyond as beyond,
    cli as cli,
    compute as compute,
    config as config,
    crop as crop,
    datasets as datasets,
    datasheets as datasheets,
    embedder as embedder,
    embedding as embedding,
    encoders as encoders,
    evaluation as evaluation,
    export as export,
    faces as faces,
    fairness as fairness,
    fairness_page as fairness_page,
    features as features,
    figures as figures,
    files as files,
    finetune as finetune,
    hub as hub,
    jepa as jepa,
    labels as labels,
    made_from as made_from,
    masking as masking,
    metrics as metrics,
    models as models,
    monitoring as monitoring,
    own_labels as own_labels,
    own_pictures as own_pictures,
    pictures as pictures,
    probing as probing,
    provenance as provenance,
    provide as provide,
    readme as readme,
    report as report,
    shards as shards,
    simulate as simulate,
    tables as tables,
    training as training,
    weighting as weighting,
)
from .config import load_settings as load_settings
from .embedder import FaceEmbedder as FaceEmbedder
from .embedding import embed as embed
from .encoders import WeightsAbsent as WeightsAbsent
from .encoders import load_encoder as load_encoder
from .export import export_encoder as export_encoder
from .faces import CropError as CropError
from .faces import Face as Face
from .faces import FaceDetector as FaceDetector
from .faces import ImageError as ImageError
from .faces import crop_face as crop_face
from .faces import read_image as read_image
from .own_labels import predict_labels as predict_labels
from .own_labels import probe_labels as probe_labels
from .own_pictures import pretrain_photographs as pretrain_photographs

__version__: str
