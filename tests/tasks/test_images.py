import numpy as np
import pytest
from foveate.tasks import TaskError
from foveate.tasks.data.images import (
    EXTENSIONS,
    DamagedImageError,
    find_images,
    list_images,
    read_image,
    read_size,
    read_values,
)
from foveate.tasks.data.windows import Windows
from PIL import Image

GRADIENT = np.linspace(0, 255, 7 * 5).astype(np.uint8).reshape(5, 7)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_any_mode_becomes_grey_or_rgb_of_the_same_size(tmp_path, mode, channels):
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
    Image.fromarray(GRADIENT).convert(mode).save(path)
    image = read_image(path, channels)
    assert image.mode == ("L" if channels == 1 else "RGB")
    assert image.size == (7, 5)
    grey = np.asarray(image.convert("L"), dtype=float)
    assert np.corrcoef(grey.ravel(), GRADIENT.ravel().astype(float))[0, 1] > 0.7


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    Image.fromarray(GRADIENT.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.png", 1)), GRADIENT)


def test_transparent_pixels_are_white_whatever_their_hidden_colour(tmp_path):
    pixels = np.zeros((3, 4, 4), np.uint8)
    pixels[:, 2:, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    grey = np.asarray(read_image(tmp_path / "clear.png", 1))
    assert (grey[:, :2] == 255).all()
    assert (grey[:, 2:] == 0).all()


def test_a_photo_taken_sideways_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GRADIENT).save(tmp_path / "phone.jpg", exif=exif)
    assert read_image(tmp_path / "phone.jpg").size == (5, 7)


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:500])
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    Image.fromarray(GRADIENT.astype(np.float32)).save(tmp_path / "float.tif")
    for path, reason in (
        (cut, "damaged"),
        (text, "not an image"),
        (tmp_path / "absent.png", "no such file"),
        (tmp_path / "float.tif", "floating-point"),
    ):
        with pytest.raises(TaskError, match=reason) as caught:
            read_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_files_folders_and_globs_expand_in_order_and_once(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.JPG", "deep/c.tif", "notes.txt"):
        (tmp_path / name).touch()
    found = find_images([tmp_path / "b.png", tmp_path, str(tmp_path / "*.png")])
    assert [path.name for path in found] == ["b.png", "a.JPG", "c.tif"]
    with pytest.raises(TaskError, match="no such file or folder"):
        find_images([tmp_path / "absent.png"])
    with pytest.raises(TaskError, match="matches no file"):
        find_images([str(tmp_path / "*.bmp")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match="no image in this folder"):
        find_images([tmp_path / "empty"])


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("ending", EXTENSIONS)
def test_a_size_by_the_header_is_that_of_the_image(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo{ending}"
    mode = {".pbm": "1", ".pgm": "L"}.get(ending, "RGB")
    Image.fromarray(np.zeros((30, 47, 3), np.uint8)).convert(mode).save(path, exif=exif)
    image = read_image(path)
    size, turned = read_size(path)
    assert size == (image.height, image.width)
    assert turned == (size == (47, 30))


def test_exif_behind_the_pixels_of_a_png_is_found(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GRADIENT).save(tmp_path / "front.png", exif=exif)
    whole = (tmp_path / "front.png").read_bytes()
    start = whole.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(whole[start : start + 4], "big")
    tail = whole.index(b"IEND") - 4
    (tmp_path / "behind.png").write_bytes(whole[:start] + whole[end:tail] + whole[start:end] + whole[tail:])
    assert read_image(tmp_path / "behind.png").size == (5, 7)
    assert read_size(tmp_path / "behind.png") == ((7, 5), True)


def test_the_limit_of_pixels_is_named_and_can_be_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = tmp_path / "large.png"
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(path)
    for read in (read_image, read_size, read_values):
        with pytest.raises(TaskError, match=r"large\.png: has more than 200 pixels, .* FOVEATE_MAX_PIXELS") as caught:
            read(path)
        assert "damaged" not in str(caught.value)
    monkeypatch.setenv("FOVEATE_MAX_PIXELS", "400")
    assert read_image(path).size == (20, 20)
    monkeypatch.setenv("FOVEATE_MAX_PIXELS", "399")
    with pytest.raises(TaskError, match="more than 399 pixels"):
        read_size(path)
    monkeypatch.setenv("FOVEATE_MAX_PIXELS", "many")
    with pytest.raises(TaskError, match="FOVEATE_MAX_PIXELS is 'many'"):
        read_image(path)


def test_folders_are_searched_through_links_but_not_where_systems_keep_things(tmp_path):
    for name in (
        "data/a.jfif",
        "data/deep/b.JPG",
        "away/c.png",
        "data/.ipynb_checkpoints/a.png",
        "data/@eaDir/a.png",
        "data/__MACOSX/a.png",
        "data/._a.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "away", target_is_directory=True)
    (tmp_path / "data" / "deep" / "up").symlink_to(tmp_path / "data", target_is_directory=True)
    for found in (list_images(tmp_path / "data"), find_images([tmp_path / "data"])):
        assert [path.relative_to(tmp_path / "data").as_posix() for path in found] == [
            "a.jfif",
            "deep/b.JPG",
            "link/c.png",
        ]


def test_pictures_that_are_left_out_are_counted(tmp_path):
    for name in ("a.png", "b.heic", "c.HEIC", "d.svg", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"formats that aren't read are left out: 2 \.heic, 1 \.svg"):
        assert [path.name for path in list_images(tmp_path)] == ["a.png"]


def test_floating_point_numbers_are_refused_by_name_whole_and_in_parts(tmp_path):
    values = np.random.default_rng(0).random((40, 30)).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "whole.tif")
    Image.fromarray(values).save(tmp_path / "strips.tif", compression="tiff_lzw", strip_size=400)
    message = r"\.tif: holds floating-point numbers of unknown range; save it with 8 or 16 bits"
    for name in ("whole.tif", "strips.tif"):
        with pytest.raises(DamagedImageError, match=message):
            read_image(tmp_path / name)
        with pytest.raises(DamagedImageError, match=message):
            Windows(tmp_path / name).read(0, 0, 30, 20)
