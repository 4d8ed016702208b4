"""`FaceEmbedder` as scikit-learn's users know its transformers: its own checks, and what people hand on."""

import pickle
import tempfile
import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from joblib import parallel_config
from PIL import Image
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks as checks
from sklearn.utils.estimator_checks import estimator_checks_generator
from sklearn.utils.validation import validate_data
from test_faces import cartoon

from mefem import embedder
from mefem.compute import torch_threads
from mefem.embedder import FaceEmbedder
from mefem.embedding import embed
from mefem.encoders import PixelEncoder, freeze
from mefem.models import IMAGENET_MEAN, IMAGENET_STD, create_encoder, save_encoder

KWARGS = dict(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=1)
CROPS = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)


FOLDER = tempfile.TemporaryDirectory()  # scikit-learn's checks are listed before there are fixtures
ENCODER = f"{FOLDER.name}/encoder.safetensors"


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return freeze("small", create_encoder(**KWARGS), IMAGENET_MEAN, IMAGENET_STD, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def encoder_file():
    torch.manual_seed(0)
    return str(save_encoder(ENCODER, create_encoder(**KWARGS), "vit_small_patch16_224", KWARGS))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The crops as files."""
    folder = tmp_path_factory.mktemp("crops")
    for number, crop in enumerate(CROPS):
        Image.fromarray(crop).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(len(CROPS))]


# --- scikit-learn's own checks
# ---------------------------------------------------------------------------------------


class OfRows(FaceEmbedder):
    """Takes the matrices of numbers that scikit-learn's checks are made of: each row becomes a picture."""

    def __init__(
        self,
        encoder="mefem-starter",
        features="mean",
        detect=True,
        batch=64,
        device=None,
        on_error="raise",
        framing="auto",
        face="surest",
        min_score=0.5,
        small_faces=False,
        n_jobs=None,
    ):
        given = dict(locals())
        super().__init__(**{name: given[name] for name in FaceEmbedder().get_params()})

    def fit(self, X, y=None):
        return super().fit(self._drawn(validate_data(self, X)))

    def transform(self, X):
        if not hasattr(self, "encoder_"):
            raise NotFittedError
        return super().transform(self._drawn(validate_data(self, X, reset=False)))

    @staticmethod
    def _drawn(X):
        """Vertical stripes, one a number."""
        shades = (127 * np.tanh(X / 3) + 128).astype(np.uint8)
        wide = np.repeat(shades, -(-32 // shades.shape[1]), axis=1)[:, None, :32, None]
        return np.broadcast_to(wide, (len(X), 32, 32, 3))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.no_validation = False
        tags.input_tags.two_d_array = True
        tags.input_tags.one_d_array = tags.input_tags.string = False
        return tags


@pytest.fixture(scope="module")
def loaded_once():
    """Loading is not what is checked: a fit takes milliseconds, and one thread leaves the others alone."""
    with pytest.MonkeyPatch.context() as patch, torch_threads(1):
        patch.setattr(embedder, "as_encoder", cache(embedder.as_encoder))
        yield


ALL = list(estimator_checks_generator(OfRows(ENCODER, framing="as-is", device="cpu")))


# named by the check: the estimator's text holds a temporary folder, another in each of pytest's processes
@pytest.mark.parametrize("estimator, check", ALL, ids=[check.func.__name__ for _, check in ALL])
def test_scikit_learns_checks(loaded_once, estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


LEARNING = (
    checks.check_fit_idempotent,
    checks.check_estimators_overwrite_params,
    checks.check_dict_unchanged,
    checks.check_transformer_general,
    checks.check_methods_sample_order_invariance,
    # not check_methods_subset_invariance: the last bits of float32 depend on the size of the batch
)


@pytest.mark.parametrize("check", LEARNING, ids=lambda check: check.__name__)
def test_scikit_learns_checks_of_an_encoder_that_is_fitted(check):
    with torch_threads(1):
        check("OfRows", OfRows("pixels", framing="as-is", device="cpu"))


WITHOUT_DATA = (
    checks.check_estimator_cloneable,
    checks.check_estimator_tags_renamed,
    checks.check_valid_tag_types,
    checks.check_estimator_repr,
    checks.check_no_attributes_set_in_init,
    checks.check_do_not_raise_errors_in_init_or_set_params,
    checks.check_mixin_order,
    checks.check_parameters_default_constructible,
    checks.check_get_params_invariance,
    checks.check_set_params,
)


@pytest.mark.parametrize("check", WITHOUT_DATA, ids=lambda check: check.__name__)
def test_scikit_learns_checks_of_the_class_itself(check):
    check("FaceEmbedder", FaceEmbedder())


# --- what people hand on
# ---------------------------------------------------------------------------------------------


def test_one_column_of_paths_in_any_wrapping(encoder, paths):
    embedder, expected = FaceEmbedder(encoder, framing="as-is", batch=3), embed(CROPS, encoder, "mean")
    shuffled = pd.Series(paths, index=[5, 3, 1, 0, 2, 4, 6], name="path")
    for X in (
        paths,
        tuple(paths),
        np.array(paths),
        np.array(paths, dtype=object)[:, None],
        np.array(paths)[:, None],
        shuffled,
        shuffled.astype(object),
        shuffled.to_frame(),
        pd.Index(paths),
        (path for path in paths),
        CROPS,
        list(CROPS),
        iter(CROPS),
        pd.DataFrame({"picture": [Image.fromarray(crop) for crop in CROPS]}),
    ):
        rows = embedder.fit_transform(X)
        assert rows.dtype == np.float32 and np.allclose(rows, expected, atol=1e-5), type(X)
    framed = embedder.set_output(transform="pandas").fit_transform(shuffled.to_frame())
    assert list(framed.index) == list(shuffled.index) and list(framed.columns) == [
        f"mean{i}" for i in range(24)
    ]


def test_a_generator_is_read_a_batch_at_a_time(encoder, monkeypatch):
    read, seen = [], []
    real = embedder.embed_usable
    monkeypatch.setattr(
        embedder, "embed_usable", lambda crops, *rest: seen.append(len(read)) or real(crops, *rest)
    )
    pictures = (read.append(number) or crop for number, crop in enumerate(CROPS))
    FaceEmbedder(encoder, framing="as-is", batch=2).fit(None).transform(pictures)
    assert seen == [0, 2, 4, 6, 7]


@pytest.mark.parametrize("features, shape", [("mean", (0, 24)), ("cls", (0, 24)), ("patches", (0, 4, 24))])
def test_no_pictures_are_no_rows(encoder, features, shape):
    embedder = FaceEmbedder(encoder, features=features).fit([])
    for nothing in ([], np.array([]), pd.Series([], dtype=object), pd.DataFrame({"path": []}), iter(())):
        assert embedder.transform(nothing).shape == shape
    if len(shape) == 2:
        assert embedder.set_output(transform="pandas").transform([]).shape == shape


@pytest.mark.parametrize(
    "X, words",
    [
        ("photos/1.jpg", r"expected a list of pictures, found one, 'photos/1.jpg': write \['photos/1.jpg'\]"),
        (b"\xff\xd8", "found one"),
        (Image.new("RGB", (32, 32)), "found one, <PIL"),
        (CROPS[0], r"expected pictures \[N, H, W, 3\], found one, \[32, 32, 3\]: write \[picture\]"),
        (7, "expected a list of pictures, found 7"),
        (np.array("a.jpg"), "found one"),
        (
            pd.DataFrame({"path": ["a.jpg"], "age": [3]}),
            r"one column of pictures, found 2: name it, table\[\['path",
        ),
        ([3.5], "picture 0 .*expected a path, bytes, a file object or a Pillow picture, found 3.5"),
        ([None], "picture 0 .*found None"),
    ],
)
def test_what_is_no_list_of_pictures_is_refused_with_the_remedy(encoder, X, words):
    fitted = FaceEmbedder(encoder, framing="as-is").fit([])
    with pytest.raises(ValueError, match=words):
        fitted.transform(X)
    if not isinstance(X, list):
        with pytest.raises(ValueError, match=words):
            FaceEmbedder(encoder, framing="as-is").fit(X)
    else:
        rows = fitted.set_params(on_error="nan").transform([*X, CROPS[0]])
        assert np.isnan(rows).any(1).tolist() == [True, False]


def test_a_missing_file_is_named_once(encoder):
    with pytest.raises(ValueError) as caught:
        FaceEmbedder(encoder).fit(None).transform(["photos/nope.jpg"])
    assert str(caught.value).count("nope.jpg") == 1 and "missing file" in str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"detect": False, "framing": "pad"}, "detect=False is framing='as-is', and framing is 'pad'"),
        ({"detect": False, "small_faces": True}, "small_faces does nothing with framing 'as-is'"),
        ({"framing": "as-is", "min_score": 0.3}, "min_score 0.3 does nothing with framing 'as-is'"),
        ({"framing": "as-is", "face": "largest"}, "face 'largest' does nothing with framing 'as-is'"),
        ({"face": "all"}, "face='all' must be one of surest, largest"),
        ({"min_score": 50}, "min_score 50: expected a number from 0 to 1"),
        ({"framing": "papre"}, "framing 'papre' is unknown"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_fit(encoder, options, words):
    with pytest.raises(ValueError, match=words):
        FaceEmbedder(encoder, **options).fit(None)


# --- pipelines, searches, processes
# ---------------------------------------------------------------------------------


def test_beside_other_columns(encoder, paths):
    people = pd.DataFrame({"age": np.arange(7.0), "path": paths}, index=list("gfedcba"))
    embedder = FaceEmbedder(encoder, framing="as-is")
    for column in ("path", ["path"]):
        both = ColumnTransformer([("face", embedder, column), ("age", "passthrough", ["age"])])
        table = both.set_output(transform="pandas").fit_transform(people)
        assert list(table.columns) == [*(f"face__mean{i}" for i in range(24)), "age__age"]
        assert list(table.index) == list("gfedcba")
        assert np.allclose(table.iloc[:, :24], embed(CROPS, encoder, "mean"), atol=1e-5)
        assert make_pipeline(both, Ridge(1e-3)).fit(people, people.age).score(people, people.age) > 0.9


def test_memory_keeps_embeddings_between_candidates_and_folds(encoder_file, paths, tmp_path, monkeypatch):
    calls, real = [], embedder.embed
    monkeypatch.setattr(
        embedder, "embed", lambda crops, *rest: calls.append(len(crops)) or real(crops, *rest)
    )
    grid = {"ridge__alpha": [0.1, 1, 10]}

    def search(**memory):
        calls.clear()
        steps = make_pipeline(FaceEmbedder(encoder_file, framing="as-is", device="cpu"), Ridge(), **memory)
        found = GridSearchCV(steps, grid, cv=2, error_score="raise").fit(paths, np.arange(7.0))
        return sum(calls), found.best_score_

    plain, kept = search(), search(memory=str(tmp_path / "memory"))
    assert kept[1] == plain[1] and kept[0] < plain[0] and "memory=" in FaceEmbedder.__doc__
    assert len(paths) <= kept[0], "each was embedded once at least"


def test_pickled_and_in_other_processes(encoder_file, paths):
    model = make_pipeline(FaceEmbedder(encoder_file, framing="as-is", device="cpu"), Ridge())
    again = pickle.loads(pickle.dumps(model.fit(paths, np.arange(7.0))))
    assert np.array_equal(again.predict(paths), model.predict(paths))
    alone = cross_val_score(model, paths, np.arange(7.0), cv=2)
    assert np.allclose(cross_val_score(model, paths, np.arange(7.0), cv=2, n_jobs=2), alone, rtol=1e-4)


def test_threads_give_the_rows_of_one(encoder, tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(6)]
    for number, file in enumerate(files):
        Image.fromarray(cartoon(unit=0.7 + number / 20)).save(file)
    Image.new("RGB", (64, 64)).save(files[3])
    one = FaceEmbedder(encoder, batch=4, on_error="nan").fit(None).transform(files)
    assert np.isnan(one).any(1).tolist() == [False] * 3 + [True] + [False] * 2
    two = FaceEmbedder(encoder, batch=4, on_error="nan", n_jobs=2).fit(None).transform(files)
    assert np.array_equal(one, two, equal_nan=True)
    with parallel_config(n_jobs=2), pytest.raises(ValueError, match="3.png: no face"):
        FaceEmbedder(encoder, batch=4).fit(None).transform(files)


def test_pixels_are_fitted_anew_on_other_pictures(encoder):
    """A parameter stays as it was given: else a clone would keep what it saw in another fold."""
    embedder = FaceEmbedder(PixelEncoder("pixels", 3, 16, "cpu"), framing="as-is").fit(CROPS[:4])
    assert embedder.encoder.axes is None
    fresh = FaceEmbedder(PixelEncoder("pixels", 3, 16, "cpu"), framing="as-is").fit(CROPS[3:])
    for other in (clone(embedder), embedder):
        assert np.allclose(other.fit(CROPS[3:]).transform(CROPS), fresh.transform(CROPS), atol=1e-5)
    fitted = FaceEmbedder(fresh.encoder_, framing="as-is").fit(CROPS[:4])
    assert np.array_equal(fitted.transform(CROPS), fresh.transform(CROPS)), "what is fitted already stays so"
    with pytest.raises(ValueError, match="none of those given is usable"):
        FaceEmbedder("pixels", on_error="nan").fit(["gone.jpg"])


def test_the_default_encoder_is_that_of_the_command():
    import inspect

    from mefem.cli import embed as command

    assert inspect.signature(command).parameters["encoder"].default == FaceEmbedder().encoder


def test_the_options_of_the_transformer_find_small_and_doubtful_faces(encoder, tmp_path):
    far = Image.new("RGB", (1600, 1000), (150, 170, 190))
    far.paste(Image.fromarray(cartoon()).resize((200, 200)), (900, 500))
    with pytest.raises(ValueError, match="no face .--small-faces looks for smaller ones"):
        FaceEmbedder(encoder).fit(None).transform([far])
    assert np.isfinite(FaceEmbedder(encoder, small_faces=True).fit(None).transform([far])).all()
    drawn = Image.fromarray(cartoon())
    with pytest.raises(ValueError, match="low score .score 0.*--min-score 0.* would use it"):
        FaceEmbedder(encoder, min_score=0.999).fit(None).transform([drawn])
