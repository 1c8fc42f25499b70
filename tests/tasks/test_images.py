import numpy as np
import pytest
from foveate.tasks import TaskError
from foveate.tasks.images import find_images, read_image
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
