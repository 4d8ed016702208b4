"""Reading, detecting and cropping: against Pillow done by hand, and on real photographs."""

import io
import pickle
import re
import subprocess
import time
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from mefem import faces, files
from mefem.crop import Cropping, crop_image
from mefem.faces import (
    CropError,
    FaceDetector,
    ImageError,
    crop_face,
    crop_square,
    face_square,
    open_image,
    read_image,
)


def saved(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(height=24, width=32):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], axis=2).astype(
        np.uint8
    )


@pytest.fixture(scope="module")
def detector():
    return FaceDetector()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_that_of_pillow(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = saved(Image.fromarray(gradient()), format, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(read_image(data), np.asarray(expected))
    assert faces.upright_size(open_image(data)) == expected.size


def test_modes_become_rgb():
    rgb = gradient()
    grey = rgb[..., 0]
    same = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(read_image(saved(Image.fromarray(grey))), same)
    assert np.array_equal(read_image(saved(Image.fromarray(grey.astype(np.uint16) * 257))), same)
    assert np.array_equal(read_image(saved(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF")), same)
    assert np.array_equal(read_image(saved(Image.fromarray(rgb).convert("CMYK"), "TIFF")), rgb)
    cmyk_jpeg = saved(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=100)
    assert np.abs(read_image(cmyk_jpeg).astype(int) - rgb).max() < 24, (
        "CMYK JPEG (stored inverted) is not a negative"
    )
    two_tone = Image.fromarray((grey > 100).astype(np.uint8) * 255).convert("1")
    assert set(np.unique(read_image(saved(two_tone)))) == {0, 255}
    assert read_image(saved(Image.fromarray(rgb).quantize(16))).shape == rgb.shape


def disguises():
    """Kinds of file whose pixels are not simply those of an array: name -> bytes."""
    rgb = gradient()
    grey, alpha = rgb[..., 0], np.dstack([rgb, rgb[..., 1]])
    found = {
        "16 bit PNG": saved(Image.fromarray(grey.astype(np.uint16) * 257)),
        "16 bit TIFF": saved(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"),
        "RGBA": saved(Image.fromarray(alpha)),
        "LA": saved(Image.fromarray(np.ascontiguousarray(alpha[..., :2]), "LA")),
        "palette": saved(Image.fromarray(rgb).quantize(16)),
        "clear palette": saved(Image.fromarray(rgb).quantize(8), transparency=0),
        "clear colour": saved(Image.fromarray(rgb), transparency=tuple(map(int, rgb[0, 0]))),
        "one bit": saved(Image.fromarray(grey > 100)),
        "CMYK": saved(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=100),
        "GIF": saved(Image.fromarray(rgb), "GIF", save_all=True, append_images=[Image.new("RGB", (32, 24))]),
    }
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found |= {
            f"{kind} {orientation}": saved(Image.fromarray(rgb), kind, exif=exif)
            for kind in ("JPEG", "PNG", "WEBP", "TIFF")
        }
    return found


DISGUISES = disguises()


@pytest.mark.parametrize("name", DISGUISES)
def test_an_opened_picture_is_read_as_its_file_is(name, tmp_path):
    (tmp_path / "photo").write_bytes(DISGUISES[name])
    by_path = read_image(tmp_path / "photo")
    with Image.open(tmp_path / "photo") as opened:
        assert np.array_equal(read_image(opened), by_path)
    loaded = Image.open(tmp_path / "photo")
    loaded.load()
    assert np.array_equal(read_image(loaded), by_path) and np.array_equal(read_image(loaded), by_path), (
        "and read again"
    )
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "photo"))
    assert np.array_equal(read_image(upright), by_path), "what was brought upright is not turned twice"


def test_floating_point_pictures(tmp_path):
    steps = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for name, scale in (("one", 1), ("bytes", 255)):
        Image.fromarray(steps * scale).save(tmp_path / f"{name}.tif")
        assert np.array_equal(
            read_image(tmp_path / f"{name}.tif")[..., 0], np.round(steps * 255).astype(np.uint8)
        )
    Image.fromarray(steps * 1000).save(tmp_path / "more.tif")
    with pytest.raises(ImageError, match="floating-point pixels of 0 to 1000"):
        read_image(tmp_path / "more.tif")


def test_a_crop_of_an_opened_picture_is_that_of_its_file(tmp_path):
    quarters = np.zeros((1024, 1024, 3), np.uint8)
    for value, (y, x) in enumerate([(0, 0), (0, 512), (512, 0), (512, 512)], 1):
        quarters[y : y + 512, x : x + 512] = 60 * value
    Image.fromarray(quarters).save(tmp_path / "photo.jpg", quality=95)

    def crop(source):
        (framed,) = faces.frame_faces(source, "as-is", size=112)
        return framed.crop.astype(int)

    by_path = crop(tmp_path / "photo.jpg")  # made half or a quarter as large by the decoder
    for loaded in (False, True):
        picture = Image.open(tmp_path / "photo.jpg")
        if loaded:
            picture.load()
        assert np.abs(crop(picture) - by_path).mean() < 2 and picture.size == (1024, 1024)
    how = Cropping(framing="dataset", size=112)
    assert np.abs(crop_image(picture, how).astype(int) - by_path).mean() < 2


def test_an_opened_picture_is_refused_as_its_file_is(tmp_path):
    jpeg = saved(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8)), "JPEG"
    )
    (tmp_path / "cut.jpg").write_bytes(jpeg[:-900])
    with pytest.raises(ImageError, match="cut.jpg: corrupt image"):
        read_image(Image.open(tmp_path / "cut.jpg"))
    with pytest.raises(ImageError, match="picture in memory: too many pixels"):
        read_image(Image.new("RGB", (100, 100)), max_pixels=9999)


@given(
    st.lists(
        st.text("aAbB_~/.\u00e9\u0301\u00df\u6f22" + "s", min_size=1, max_size=12).map("x{}.jpg".format)
        | st.sampled_from(
            [
                "a/b.jpg",
                "a__b.jpg",
                "x.jpg",
                "x.jpg.webp",
                "x.png",
                "X.JPG",
                "a/b.jpg.jpg",
                "y" * 300 + ".jpg",
            ]
        ),
        unique=True,
        max_size=12,
    )
)
def test_no_two_photographs_share_a_name(paths):
    names = faces.flat_names(paths)
    assert len({unicodedata.normalize("NFD", name.casefold()) for name in names}) == len(paths)
    assert all("/" not in name and len(name.encode()) < 200 for name in names)
    assert len({name.casefold() for name in faces.flat_names(paths, r"[^\w-]")}) == len(paths), (
        "nor where characters are replaced"
    )


def test_a_hundred_thousand_names_take_less_than_a_second():
    paths = [f"folder/{number}{ending}" for number in range(50_000) for ending in (".jpg", ".png")]
    start = time.process_time()
    names = faces.flat_names(paths)
    assert time.process_time() - start < 1 and len(set(names)) == 100_000
    assert faces.flat_names(["anna.jpg", "otto/1.png"]) == ["anna", "otto__1"], "plain names stay plain"


def test_what_is_no_photograph_of_a_folder(tmp_path):
    for name in (
        "a.jpg",
        "b/c.PNG",
        "b/._c.png",
        ".thumbs/a.jpg",
        "b/.x/y/z.jpg",
        "crops/a.jpg",
        "crops/mine.jpg",
        "other/d.jpg",
        "n.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "crops/crops.csv").write_text(
        "file,crop,status\nphotos/a.jpg,a.jpg,success\n../x.jpg,../a.jpg,success\nphotos/e.jpg,,no face\n"
    )
    (tmp_path / "other/crops.csv").write_text("field,crop\n7,wheat\n")

    def seen(*where, **options):
        return [
            p.relative_to(tmp_path).as_posix()
            for p in faces.visible_files(tmp_path.joinpath(*where), **options)
            if faces.is_photograph(p)
        ]

    assert seen() == ["a.jpg", "b/c.PNG", "crops/mine.jpg", "other/d.jpg"]
    assert seen(leave_out=tmp_path / "b") == ["a.jpg", "crops/mine.jpg", "other/d.jpg"]
    assert seen("crops") == ["crops/a.jpg", "crops/mine.jpg"], "a folder of crops that is asked for itself"
    assert (
        faces.listed_crops(tmp_path / "crops") == {"a.jpg": "photos/a.jpg"}
        and faces.listed_crops(tmp_path / "b") == {}
    )
    with pytest.raises(ValueError, match="other/crops.csv is no list of crops"):
        faces.listed_crops(tmp_path / "other")


def test_alpha_lies_on_white():
    rgb = gradient()
    alpha = np.zeros(rgb.shape[:2], np.uint8)
    alpha[:, 8:16], alpha[:, 16:] = 128, 255
    for image in (
        Image.fromarray(np.dstack([rgb, alpha])),
        Image.fromarray(np.dstack([rgb[..., 0], alpha]), "LA"),
    ):
        found = read_image(saved(image)).astype(int)
        solid = np.asarray(image.convert("RGBA"))[..., :3].astype(int)
        assert (found[:, :8] == 255).all() and np.array_equal(found[:, 16:], solid[:, 16:])
        assert np.abs(found[:, 8:16] - (solid[:, 8:16] * 128 + 255 * 127) / 255).max() <= 1
    palette = Image.fromarray(rgb).quantize(8)
    palette.info["transparency"] = 0
    clear = np.asarray(palette) == 0
    assert (read_image(saved(palette, transparency=0))[clear] == 255).all()


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("missing", "missing file"),
        ("folder", "unreadable file"),
        ("empty", "empty file"),
        ("text", "not an image"),
        ("cut", "corrupt image"),
        ("cut png", "corrupt image"),
        ("huge", "too many pixels"),
    ],
)
def test_bad_files_have_a_named_reason(tmp_path, kind, reason):
    path = tmp_path / "photo.jpg"
    jpeg = saved(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8)), "JPEG"
    )
    content = {
        "empty": b"",
        "text": b"<html>404</html>",
        "cut": jpeg[:-900],
        "huge": jpeg,
        "cut png": saved(Image.fromarray(gradient(99, 99)))[:-200],
    }
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(content[kind])
    with pytest.raises(ImageError) as caught:
        read_image(path, max_pixels=9800 if kind == "huge" else faces.MAX_PIXELS)
    assert caught.value.reason == reason and reason in faces.IMAGE_REASONS
    assert "photo.jpg" in str(caught.value)


def test_declared_size_is_checked_before_decoding():
    header = bytearray(saved(Image.fromarray(gradient())))
    header[16:24] = (30_000).to_bytes(4, "big") * 2  # width and height of the PNG header; checksum follows
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    with pytest.raises(ImageError) as caught:
        read_image(bytes(header))
    assert caught.value.reason == "too many pixels"


def test_errors_cross_processes():
    error = pickle.loads(pickle.dumps(CropError("too small", "a.jpg", "12 pixels")))
    assert (error.reason, error.source, error.detail) == ("too small", "a.jpg", "12 pixels")


def test_square_is_twice_the_longer_side_and_centred():
    assert face_square((10, 20, 50, 80)) == (30 - 60, 50 - 60, 120)
    assert face_square((10, 20, 70, 40), scale=1.5) == (40 - 45, 30 - 45, 90)
    for box in ((0, 0, 0, 5), (5, 5, 1, 9), (0, 0, float("nan"), 1), (1, 2, 3)):
        with pytest.raises(CropError, match="bad box"):
            face_square(box)


@pytest.mark.parametrize(
    "box, reason",
    [
        ((100, 100, 200, 200), None),
        ((50, 50, 150, 150), None),
        ((49.9, 50, 149.9, 150), "leaves the picture"),
        ((150, 150, 250, 250), None),
        ((150, 150.5, 250, 250.5), "leaves the picture"),
        ((140, 140, 239, 239), "too small"),
    ],
)
def test_border_and_size(box, reason):
    rgb = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    if reason is None:
        assert crop_face(rgb, box, size=64, min_side=200).shape == (64, 64, 3)
    else:
        with pytest.raises(CropError) as caught:
            crop_face(rgb, box, size=64, min_side=200)
        assert caught.value.reason == reason


def test_jittered_squares_stay_in_the_picture():
    """Far from every limit the moves are normal with the promised deviations; near one they stop there."""
    free = np.array([faces.jitter_square((400, 400, 200), 0.1, seed, 1000, 1000, 10) for seed in range(4000)])
    centre, logs = free[:, :2] + free[:, 2:] / 2, np.log(free[:, 2] / 200)
    np.testing.assert_allclose([logs.mean(), logs.std()], [0, 0.1], atol=0.005)
    np.testing.assert_allclose([*centre.mean(0), *centre.std(0)], [500, 500, 10, 10], atol=0.5)
    assert np.abs(np.corrcoef(np.c_[centre, logs].T) - np.eye(3)).max() < 0.06
    tight = np.array([faces.jitter_square((10, 20, 250), 0.1, seed, 270, 300, 240) for seed in range(500)])
    assert (
        (tight[:, :2] >= 0).all()
        and (tight[:, 0] + tight[:, 2] <= 270 + 1e-9).all()
        and (tight[:, 1] + tight[:, 2] <= 300 + 1e-9).all()
    )
    assert tight[:, 2].min() == 240 and tight[:, 2].max() == 270


def test_jitter_moves_the_crop_by_its_seed_and_refuses_as_without():
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 320, 3), dtype=np.uint8))
    paper = Cropping(framing="paper", size=112, min_side=100)
    plain, *moved = (
        crop_image(rgb, replace(paper, jitter=s), (100, 120, 156, 170), seed=k)
        for s, k in ((0, 3), (0.1, 3), (0.1, 3), (0.1, 4))
    )
    assert np.array_equal(plain, crop_image(rgb, paper, (100, 120, 156, 170)))
    assert (
        np.array_equal(moved[0], moved[1])
        and not np.array_equal(moved[0], moved[2])
        and not np.array_equal(moved[0], plain)
    )
    with pytest.raises(CropError, match="leaves the picture"):
        crop_image(rgb, replace(paper, jitter=0.1), (0, 120, 156, 170))
    framed = [crop_image(rgb, replace(paper, framing="dataset", jitter=s)) for s in (0, 0.1)]
    assert np.array_equal(*framed)


def test_crop_without_scaling_copies_pixels():
    rgb = np.random.default_rng(0).integers(0, 255, (300, 320, 3), dtype=np.uint8)
    assert np.array_equal(crop_face(rgb, (100, 120, 156, 170), size=112, min_side=112), rgb[89:201, 72:184])


@pytest.mark.filterwarnings("error")
def test_pictures_and_crops_become_tensors_without_a_warning():
    """Pillow's own memory is read-only, and torch warns of arrays that it may not write to."""
    import torch

    picture = read_image(Image.fromarray(gradient(300, 300)))
    for pixels in (picture, crop_face(picture, (100, 100, 200, 200), min_side=100)):
        assert torch.from_numpy(pixels).dtype == torch.uint8 and pixels.flags.writeable


def test_subpixel_geometry():
    """A linear ramp stays linear: pixel i of the crop shows the ramp at x0 + (i + 1/2) side / size."""
    ramp = np.repeat(np.repeat(np.linspace(0, 255, 400)[None, :, None], 400, 0), 3, 2)
    box, size = (130.3, 150.0, 230.7, 240.0), 50
    x0, _, side = face_square(box)
    expected = (x0 + (np.arange(size) + 0.5) * side / size - 0.5) * 255 / 399
    found = crop_face(ramp.round().astype(np.uint8), box, size=size, min_side=10)[size // 2, :, 0]
    assert np.abs(found - expected).max() < 1.5


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_reduced_decode_matches_the_full_one(orientation):
    noise = np.random.default_rng(1).normal(128, 50, (150, 190, 3)).clip(0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(
        Image.fromarray(noise).resize((1901, 1503), Image.Resampling.BICUBIC), "JPEG", quality=92, exif=exif
    )
    box = (501.5, 500, 1002.5, 1000)  # a square of 1002 pixels
    reduced = crop_square(open_image(data), face_square(box), 100)
    assert faces._reduction(open_image(data), 1002, 100) == (4 if orientation == 1 else 1)
    full = crop_face(read_image(data), box, size=100)
    difference = np.abs(reduced.astype(int) - full)
    assert difference.mean() < 1.5 and difference.max() < 20
    shifted = crop_face(read_image(data), [value + 8 for value in box], size=100)
    assert np.abs(reduced.astype(int) - shifted).mean() > 4 * difference.mean(), (
        "the test sees a shift of 0.8 pixels"
    )


def test_dropped_pictures_are_not_decoded(monkeypatch):
    data = saved(Image.fromarray(gradient(300, 300)), "JPEG")
    monkeypatch.setattr(faces, "decode", lambda *args: pytest.fail("was decoded"))
    with pytest.raises(CropError, match="leaves the picture"):
        crop_image(open_image(data), Cropping(framing="paper"), (0, 0, 250, 250))


def test_dataset_framing_is_the_centred_square():
    rgb = gradient(100, 160)
    found = crop_image(Image.fromarray(rgb), Cropping(framing="dataset", size=100, min_side=100))
    assert np.array_equal(found, rgb[:, 30:130])


@pytest.mark.parametrize(
    "width, height, box, used",
    [
        (
            300,
            300,
            (100, 100, 200, 200),
            {"paper": "paper", "shift": "paper", "pad": "paper", "auto": "paper"},
        ),
        (300, 300, (20, 100, 120, 200), {"paper": None, "shift": "shift", "pad": "pad", "auto": "shift"}),
        (300, 200, (100, 0, 200, 100), {"paper": None, "shift": "shift", "pad": "pad", "auto": "shift"}),
        (300, 199, (100, 0, 200, 99), {"paper": None, "shift": None, "pad": "pad", "auto": "pad"}),
        (150, 150, (20, 10, 120, 110), {"paper": None, "shift": None, "pad": "pad", "auto": "as-is"}),
        (151, 151, (20, 10, 120, 110), {"paper": None, "shift": None, "pad": "pad", "auto": "pad"}),
        (150, 149, (20, 10, 120, 110), {"paper": None, "shift": None, "pad": "pad", "auto": "pad"}),
    ],
)
def test_each_framing_takes_what_it_says(width, height, box, used):
    """A face fills a square picture from two thirds of its side on."""
    for framing, expected in used.items():
        if expected is None:
            with pytest.raises(CropError, match="leaves the picture"):
                faces.frame_square(box, width, height, framing, min_side=1)
            continue
        (x0, y0, side), found = faces.frame_square(box, width, height, framing, min_side=1)
        assert found == expected
        if found == "as-is":
            assert (x0, y0, side) == (0, 0, width)
            continue
        assert side == 200
        if found == "shift":
            assert faces.lies_inside((x0, y0, side), width, height) and x0 <= box[0] and box[2] <= x0 + side
        else:
            assert (x0, y0, side) == face_square(box)
    if width != height:
        with pytest.raises(CropError, match="not square"):
            faces.frame_square(None, width, height, "as-is")


def test_least_side_is_that_of_the_paper_in_the_papers_framing_only():
    box = (100, 100, 180, 180)
    with pytest.raises(CropError, match="too small .160.0 pixels, at least 224"):
        faces.frame_square(box, 300, 300, "paper")
    for framing in faces.FRAMINGS:
        square, _ = faces.frame_square(box, 300, 300, framing, min_side=100)
        assert square[2] == (300 if framing == "as-is" else 160)
        with pytest.raises(CropError, match="too small"):
            faces.frame_square(box, 300, 300, framing, min_side=301)
    assert faces.frame_square(box, 300, 300, "auto")[1] == "paper"
    with pytest.raises(
        ValueError, match="'papre' is unknown, expected one of paper, shift, pad, as-is, auto"
    ):
        faces.frame_square(box, 300, 300, "papre")


@pytest.mark.parametrize(
    "square", [(-40, -30, 200), (60, 70, 200), (-20, 20, 150), (20, -100.5, 333.3), (10, 10, 100)]
)
@pytest.mark.parametrize("size", [50, 224])
def test_padding_repeats_the_edge(square, size):
    """As padding the picture before the resampling, but for the pixels of the crop that the border cuts."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8))
    rgb = np.asarray(noise.resize((180, 160), Image.Resampling.BICUBIC))
    found = faces.resample_padded(Image.fromarray(rgb), square, size)
    before = np.pad(rgb, ((300, 300), (300, 300), (0, 0)), mode="edge")
    expected = faces.resample(Image.fromarray(before), (square[0] + 300, square[1] + 300, square[2]), size)
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() < 4
    if faces.lies_inside(square, 180, 160):
        assert np.array_equal(found, faces.resample(Image.fromarray(rgb), square, size))
    with pytest.raises(CropError, match="not one pixel"):
        faces.resample_padded(Image.fromarray(rgb), (-5000, 0, 100000), size)


def frame_one(*arguments, **options):
    (framed,) = faces.frame_faces(*arguments, **options)
    return framed


def test_a_photograph_becomes_a_crop_or_names_the_framing_that_would_use_it(detector):
    drawn = Image.fromarray(cartoon())
    tight, low = drawn.crop((150, 130, 362, 380)), drawn.crop((0, 200, 512, 512))
    (box,) = [face.box for face in detector.detect(np.asarray(drawn))]
    plain = frame_one(drawn, detector=detector)
    assert (plain.status, plain.framing, plain.faces, plain.advice, plain.others) == (
        "success",
        "paper",
        1,
        "",
        (),
    )
    assert plain.face.box == box and np.array_equal(plain.crop, crop_face(np.asarray(drawn), box))
    square = tight.resize((250, 250))
    refused = frame_one(square, detector=detector)
    assert (refused.status, refused.crop) == ("leaves the picture", None) and refused.face.score > 0.5
    assert refused.others == ("pad", "as-is", "auto")
    assert refused.advice.endswith("in 250 x 250; --framing pad, as-is or auto would use it")
    for other in faces.FRAMINGS:
        assert (frame_one(square, other, detector=detector).crop is not None) == (other in refused.others), (
            other
        )
    whole = frame_one(square, "as-is", size=250, detector=None)
    assert np.array_equal(whole.crop, np.asarray(square)) and whole.faces is None and whole.face is None
    assert "use --framing auto" in frame_one(low, "as-is").advice
    empty = frame_one(Image.new("RGB", (300, 300)), "auto", detector=detector)
    assert (empty.status, empty.faces, empty.others) == ("no face", 0, ("as-is",))
    assert "by hand" in frame_one(Image.new("RGB", (300, 200)), "auto", detector=detector).advice
    gone = frame_one("nowhere.jpg", "auto")
    assert gone.status == "missing file" and gone.faces is None and gone.advice
    assert set(faces.REMEDIES) == {*faces.IMAGE_REASONS, *faces.CROP_REASONS}


class Seen:
    """A detector that sees faces where it is told."""

    def __init__(self, *boxes):
        self.boxes = boxes

    def detect(self, rgb):
        return [
            faces.Face(box, 0.9 - i / 10, np.zeros((6, 2), np.float32)) for i, box in enumerate(self.boxes)
        ]


BORDER, SMALL, LARGE = (0.0, 0, 60, 60), (100.0, 100, 150, 150), (200.0, 200, 300, 300)


@pytest.mark.parametrize(
    "boxes, face, framing, expected",
    [
        ([SMALL, LARGE], "surest", "paper", SMALL),
        ([SMALL, LARGE], "largest", "paper", LARGE),
        ([BORDER, SMALL, LARGE], "surest", "paper", SMALL),
        ([BORDER, SMALL, LARGE], "surest", "shift", BORDER),
        ([SMALL, (380.0, 0, 500, 120)], "largest", "paper", SMALL),
        ([SMALL, BORDER], "largest", "pad", BORDER),
    ],
)
def test_the_next_face_where_the_first_does_not_fit(boxes, face, framing, expected):
    framed = frame_one(Image.new("RGB", (500, 500)), framing, face, min_side=1, detector=Seen(*boxes))
    assert framed.face.box == expected and framed.faces == len(boxes) and framed.crop.shape == (224, 224, 3)


def test_all_faces_and_what_is_said_where_none_fits():
    picture = Image.fromarray(gradient(400, 500))
    found = faces.frame_faces(picture, "paper", "all", min_side=1, detector=Seen(BORDER, SMALL, LARGE))
    assert [one.status for one in found] == ["leaves the picture", "success", "success"]
    assert [one.face.box for one in found] == [BORDER, SMALL, LARGE] and {one.faces for one in found} == {3}
    assert found[0].others == ("shift", "pad", "auto")
    assert np.array_equal(found[1].crop, crop_face(gradient(400, 500), SMALL, min_side=1))
    wide = (0.0, 0, 300, 300)
    refused = frame_one(picture, "paper", min_side=1, detector=Seen(wide, BORDER))
    assert refused.face.box == wide and refused.others == ("shift", "pad", "auto"), (
        "what any of the faces allows"
    )
    assert frame_one(picture, "paper", min_side=1, detector=Seen(wide)).others == ("pad", "auto")
    with pytest.raises(ValueError, match="'biggest' is unknown, expected one of surest, largest, all"):
        faces.frame_faces(picture, face="biggest")
    with pytest.raises(ValueError, match="face 'all' does nothing with framing 'as-is'"):
        faces.frame_faces(picture, "as-is", "all")


# --- small and doubtful faces
# ----------------------------------------------------------------------------------------


@given(
    st.integers(1, 3000), st.integers(1, 3000), st.sampled_from(faces.TILES), st.floats(0, 1), st.floats(0, 1)
)
def test_a_face_of_up_to_half_a_tile_is_whole_in_one(width, height, parts, right, down):
    cut = faces.tiles(width, height, parts)
    side = -(-max(width, height) // parts)
    assert all(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height for x0, y0, x1, y1 in cut)
    assert {max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in cut} <= {side}
    face = min(side // 2 - 1, width, height)
    x, y = int(right * (width - face)), int(down * (height - face))
    assert face < 1 or any(
        x0 <= x and y0 <= y and x + face <= x1 and y + face <= y1 for x0, y0, x1, y1 in cut
    )


def scene(*heads, size=(1600, 1200)):
    """Cartoons (left, top, side) in a wide picture."""
    image = Image.new("RGB", size, (150, 170, 190))
    for x, y, side in heads:
        image.paste(Image.fromarray(cartoon()).resize((side, side)), (x, y))
    return image


HEADS = (100, 80, 180), (710, 510, 190), (1390, 1000, 200), (300, 850, 220)  # two across the edges of tiles


def test_small_faces_are_found_once_and_in_pixels_of_the_picture(detector):
    rgb = np.asarray(scene(*HEADS))
    assert detector.detect(rgb) == [] == faces.find_faces(rgb)
    found = faces.find_faces(rgb, small_faces=True)
    assert len(found) == len(HEADS) and [f.score for f in found] == sorted(
        (f.score for f in found), reverse=True
    )
    for x, y, side in HEADS:
        eyes = np.array([x, y]) + np.array([(222, 238), (290, 238)]) * side / 512
        (face,) = [f for f in found if np.abs(f.keypoints[:2] - eyes).max() < side / 15]
        x0, y0, x1, y1 = face.box
        assert x0 < eyes[0, 0] < eyes[1, 0] < x1 and y0 < eyes[0, 1] < y1 and x1 - x0 < side
    near = scene((500, 200, 900), *HEADS[:1])
    (face,) = faces.find_faces(np.asarray(near), small_faces=True)
    assert face.box == detector.detect(np.asarray(near))[0].box, "no second look where the first finds a face"


def test_small_faces_are_framed(detector):
    picture = scene(*HEADS)
    plain = frame_one(picture, "auto")
    assert (plain.status, plain.others, plain.faces) == ("no face", (), 0)
    assert plain.advice.startswith("--small-faces looks for smaller ones; cut the face out")
    found = faces.frame_faces(picture, "auto", "all", small_faces=True)
    assert len(found) == 4 and {one.status for one in found} == {"success"}
    largest = frame_one(picture, "auto", "largest", small_faces=True)
    assert largest.face.box[0] == pytest.approx(300 + 72, abs=15)
    empty = frame_one(scene(), "auto", small_faces=True)
    assert empty.status == "no face" and empty.advice.startswith("none in its tiles either; ")
    with pytest.raises(ValueError, match="small_faces does nothing with framing 'as-is'"):
        faces.frame_faces(picture, "as-is", small_faces=True)


def test_of_a_face_seen_twice_the_surest_is_kept():
    def face(score, *box):
        return faces.Face(box, score, np.zeros((6, 2), np.float32))

    whole, part, inside = face(0.8, 10, 10, 50, 50), face(0.6, 30, 10, 52, 50), face(0.7, 20, 20, 40, 40)
    beside, apart = face(0.9, 48, 10, 90, 50), face(0.5, 200, 200, 240, 240)
    assert faces.without_duplicates([part, inside, apart, whole, beside]) == [beside, whole, apart]
    assert faces.without_duplicates([]) == []


class ByWidth:
    """A detector of a face in the middle, of a side and score that depend on the width of what it is shown.

    `answers`: (least width, side or None, score), the first that applies."""

    def __init__(self, *answers):
        self.answers = answers

    def detect(self, rgb):
        height, width = rgb.shape[:2]
        side, score = next((side, score) for least, side, score in self.answers if width >= least)
        if side is None:
            return []
        box = (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
        return [faces.Face(box, score, np.zeros((6, 2), np.float32))]


@pytest.mark.parametrize(
    "near, expected", [((1, 50, 0.3), {0.3}), ((1, 50, 0.95), {0.9}), ((1, None, 0), set())]
)
def test_the_lowest_score_from_near_counts(near, expected):
    rgb = np.zeros((800, 1600, 3), np.uint8)
    found = faces.faces_in_tiles(rgb, ByWidth((1600, None, 0), (400, 50, 0.99), (120, 50, 0.9), near))
    assert {face.score for face in found} == expected


def test_an_eye_in_a_doubtful_face_is_no_small_face():
    rgb, eye = np.zeros((512, 512, 3), np.uint8), (1, 40, 0.9)
    assert faces.faces_in_tiles(rgb, ByWidth(eye))[0].score == 0.9
    (face,) = faces.find_faces(rgb, small_faces=True, detector=ByWidth((512, 490, 0.45), eye))
    assert (face.score, face.box) == (0.45, (11.0, 11.0, 501.0, 501.0))


def test_real_portraits_that_are_missed_are_not_cut_into_eyes(shared):
    for name in ("f_040", "f_265", "f_377", "f_421", "f_499"):
        for small in (False, True):
            framed = frame_one(shared / f"bmi/vip/images/{name}.jpg", "auto", small_faces=small)
            assert framed.status == "low score" and framed.face.box[2] - framed.face.box[0] > 400, name


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 2), (130, 128)])
def test_pictures_of_odd_shapes_are_looked_at_twice(size):
    assert frame_one(Image.new("RGB", size), "auto", small_faces=True).status == "no face"


def test_a_face_below_the_threshold_has_a_status_of_its_own(detector):
    drawn = Image.fromarray(cartoon())
    (sure,) = detector.detect(np.asarray(drawn))
    asked = round(sure.score + 0.02, 3)
    doubtful = frame_one(drawn, min_score=asked)
    assert (doubtful.status, doubtful.faces, doubtful.others) == ("low score", 0, ("as-is",))
    assert doubtful.face.score == pytest.approx(sure.score, abs=0.01)
    (lower,) = re.findall(
        f"at least {asked} is asked for; --min-score (0.[0-9]+) would use it", doubtful.advice
    )
    assert frame_one(drawn, min_score=float(lower)).status == "success"
    assert "--small-faces" not in doubtful.advice, "it is large enough to be seen well"
    far = faces.Face((100.0, 100, 140, 140), 0.45, np.zeros((6, 2), np.float32))
    unsure = SimpleNamespace(detect=lambda rgb: [far])
    for small, named in ((False, True), (True, False)):
        refused = frame_one(drawn, "auto", small_faces=small, detector=unsure)
        assert refused.status == "low score" and ("--small-faces looks closer" in refused.advice) == named
    tight = drawn.crop((150, 130, 362, 380))
    doubtful = frame_one(tight, min_score=0.999)
    assert doubtful.status == "low score" and "would find it, and then: leaves the picture" in doubtful.advice
    small = frame_one(scene(*HEADS), "auto", min_score=0.999, small_faces=True)
    assert small.status == "low score" and small.face.box[2] - small.face.box[0] < 120
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert (
        0.25 < faces.find_faces(noise)[0].score < 0.4
        and frame_one(Image.fromarray(noise)).status == "no face"
    )
    with pytest.raises(ValueError, match="min_score 50: expected a number from 0 to 1"):
        frame_one(drawn, min_score=50)


def test_the_first_look_is_as_it_was(monkeypatch):
    """Where a face is found, neither tiles nor a lower threshold change its box."""
    monkeypatch.setattr(faces, "faces_in_tiles", lambda *_: pytest.fail("looked at tiles"))
    wanted = []
    real = faces.shared_detector
    monkeypatch.setattr(faces, "shared_detector", lambda score: wanted.append(score) or real(score))
    for small in (False, True):
        (face,) = faces.find_faces(cartoon(), small_faces=small)
        assert face.box == FaceDetector().detect(cartoon())[0].box
    assert wanted == [0.5, 0.5]


def test_threads_share_a_detector():
    pictures = [cartoon(200 + 10 * number, 250, 0.8) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda rgb: faces.shared_detector(0.45).detect(rgb)[0].box, pictures))
    assert found == [faces.shared_detector(0.45).detect(rgb)[0].box for rgb in pictures]


def test_real_small_faces_are_found(shared, detector):
    """Portraits far away: a face of about 60 pixels in a picture of 2,000."""
    canvas = Image.new("RGB", (2000, 1400), (120, 125, 130))
    paths = sorted((shared / "frll").glob("*.jpg"))[:6]
    corners = [(150 + 600 * (number % 3), 150 + 700 * (number // 3)) for number in range(6)]
    for path, corner in zip(paths, corners, strict=True):
        with Image.open(path) as portrait:
            canvas.paste(portrait.resize((150, 150), Image.Resampling.LANCZOS), corner)
    rgb = np.asarray(canvas)
    assert detector.detect(rgb) == []
    found = sorted(faces.find_faces(rgb, small_faces=True), key=lambda face: (face.box[1] > 700, face.box[0]))
    assert len(found) == 6
    for path, corner, face in zip(paths, corners, found, strict=True):
        alone = np.array(detector.detect(read_image(path))[0].box) * 150 / 1350 + np.tile(corner, 2)
        assert np.abs(np.subtract(face.box, alone)).max() < 12, path.name
    framed = faces.frame_faces(canvas, "auto", "all", small_faces=True)
    assert len(framed) == 6 and {one.framing for one in framed} == {"paper"}


def test_real_pictures_of_faces_are_seldom_doubtful(shared):
    statuses = [frame_one(path, "auto").status for path in sorted((shared / "bmi/vip/images").iterdir())[:80]]
    assert statuses.count("success") > 70 and set(statuses) <= {"success", "low score", "no face"}


def cartoon(x=256, y=256, unit=1.0, size=512):
    image = Image.new("RGB", (size, size), (150, 170, 190))
    pen = ImageDraw.Draw(image)
    for x0, y0, x1, y1, colour in [
        (-95, -130, 95, 130, (70, 50, 35)),
        (-80, -105, 80, 120, (224, 178, 150)),
        (-52, -28, -16, -8, (245, 240, 235)),
        (16, -28, 52, -8, (245, 240, 235)),
        (-43, -27, -25, -9, (50, 35, 25)),
        (25, -27, 43, -9, (50, 35, 25)),
        (-13, -15, 13, 40, (205, 155, 130)),
        (-32, 58, 32, 80, (180, 90, 85)),
    ]:
        pen.ellipse((x + x0 * unit, y + y0 * unit, x + x1 * unit, y + y1 * unit), fill=colour)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(3 * unit)))


def test_detector_finds_where_it_was_drawn(detector):
    for x, y, unit in ((256, 256, 1.0), (200, 300, 0.8)):
        face = detector.detect(cartoon(x, y, unit))[0]
        eyes = np.array([(x - 34 * unit, y - 18 * unit), (x + 34 * unit, y - 18 * unit)])
        assert np.abs(face.keypoints[:2] - eyes).max() < 15 and face.keypoints.shape == (6, 2)
        assert face.box[0] < x < face.box[2] and 0.5 <= face.score <= 1


def test_detector_takes_views_and_refuses_others(detector):
    flipped = cartoon()[:, ::-1]
    assert detector.detect(flipped)[0].score > 0.5
    assert detector.detect(np.zeros((40, 60, 3), np.uint8)) == []
    for wrong in (
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        "a.jpg",
    ):
        with pytest.raises(ValueError, match="uint8 array"):
            detector.detect(wrong)
    with pytest.raises(ValueError, match="short"):
        FaceDetector(range="long")
    with pytest.raises(ValueError, match="min_score"):
        FaceDetector(min_score=50)


def test_threshold_is_used():
    sure = FaceDetector(min_score=0.3).detect(cartoon())[0].score
    assert FaceDetector(min_score=min(sure + 0.05, 1)).detect(cartoon()) == []


def test_the_surest_face_wins(detector, monkeypatch):
    found = [
        faces.Face((10.0, 10, 20, 20), 0.6, np.zeros((6, 2))),
        faces.Face((100.0, 100, 200, 200), 0.9, None),
    ]
    detections = [type("D", (), {"bounding_box": None})] * 2
    monkeypatch.setattr(detector._task, "detect", lambda picture: type("R", (), {"detections": detections}))
    left = iter(found)
    monkeypatch.setattr(faces, "_as_face", lambda *args: next(left))
    assert [face.score for face in detector.detect(np.zeros((300, 300, 3), np.uint8))] == [0.9, 0.6]


def test_no_face():
    with pytest.raises(CropError) as caught:
        crop_face(np.full((300, 300, 3), 99, np.uint8))
    assert caught.value.reason == "no face"


def test_model_offline_says_what_to_do(tmp_path, monkeypatch):
    def offline():
        raise OSError("no network")

    monkeypatch.setenv("MEFEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "find_root", lambda: tmp_path)
    monkeypatch.setattr(faces.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(faces, "_from_storage", offline)
    monkeypatch.setattr(faces, "_from_wheel", offline)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / faces.MODEL_NAME).write_bytes(b"half a download")
    with pytest.raises(faces.ModelAbsent) as caught:
        faces.detector_model()
    text = str(caught.value)
    assert "By hand" in text and str(tmp_path / "cache") in text and faces.MODEL_SHA256 in text
    assert "half a download" not in text and "expected" in text, "the damaged file is named with both hashes"


def test_model_is_fetched_once_and_checked(tmp_path, monkeypatch):
    model = faces.detector_model().read_bytes()
    monkeypatch.setenv("MEFEM_CACHE", str(tmp_path))
    monkeypatch.setattr(files, "find_root", lambda: tmp_path)
    monkeypatch.setattr(faces.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(faces, "_from_storage", lambda: b"<html>captive portal</html>")
    monkeypatch.setattr(faces, "_from_wheel", lambda: model)
    path = faces.detector_model()
    assert path == tmp_path / faces.MODEL_NAME and path.read_bytes() == model
    monkeypatch.setattr(faces, "_from_wheel", lambda: pytest.fail("was fetched again"))
    assert faces.detector_model() == path


def test_wheel_failure_is_an_os_error(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution")
    monkeypatch.setattr(faces.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(OSError, match="No matching distribution"):
        faces._from_wheel()


def test_all_frontal_portraits_are_cropped(shared, detector):
    photos = sorted((shared / "frll").glob("*.jpg"))
    assert len(photos) == 24
    for path in photos:
        image = open_image(path)
        crop = crop_image(image, Cropping(framing="paper"), detector=detector)
        assert crop.shape == (224, 224, 3)
        again = detector.detect(crop)[0]
        center = np.array(again.box).reshape(2, 2).mean(0)
        assert np.abs(center - 112).max() < 12, f"{path.name}: the face is not in the middle"
        assert 90 < again.box[2] - again.box[0] < 135, f"{path.name}: the face does not fill half the crop"
