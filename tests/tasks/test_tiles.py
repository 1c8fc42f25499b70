"""Large pictures in tiles: what windows read, and what is merged, by predictors whose answers are known."""

import struct
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.data.coco import decode_masks, encode_mask
from foveate.tasks.data.images import DamagedImageError, read_image
from foveate.tasks.data.png import read_deep_png
from foveate.tasks.data.tiff import Tiff
from foveate.tasks.data.windows import Windows, own_parts, starts
from foveate.tasks.load import Model
from foveate.tasks.segment.predict import Predictor as Segmenter
from foveate.tasks.tiles import check_tiling, predict_tiled, write_png
from PIL import ExifTags, Image

NOISE = np.random.default_rng(0).integers(0, 256, (61, 47, 3), np.uint8)


def write_tiled(path, height, width, tile, pixels=None, depth=1, channels=3, predictor=1, big=False, planar=False):
    """Write a TIFF in tiles, deflated; of ``pixels`` [H, W, C], or else every tile is the same one of zeros."""
    across, down = -(-width // tile), -(-height // tile)
    parts = {}
    planes = channels if planar else 1
    for place in range(across * down * planes):
        plane, (y, x) = place // (across * down), divmod(place % (across * down), across)
        if pixels is None:
            parts[place] = parts.get(0) or zlib.compress(bytes(tile * tile * channels * depth))
            continue
        block = np.zeros((tile, tile, channels // planes), pixels.dtype)
        cut = pixels[y * tile : (y + 1) * tile, x * tile : (x + 1) * tile]
        block[: cut.shape[0], : cut.shape[1]] = cut[..., plane : plane + 1] if planar else cut
        if predictor == 2:
            block = np.diff(block, axis=1, prepend=np.zeros_like(block[:, :1]))
        parts[place] = zlib.compress(block.tobytes())
    offsets, content, seen = [], b"", {}
    for part in parts.values():
        if part not in seen:
            seen[part] = len(content)
            content += part
        offsets.append(seen[part])
    sizes = [len(part) for part in parts.values()]
    tags = [
        (256, [width]), (257, [height]), (258, [8 * depth] * channels), (259, [8]), (262, [2 if channels > 2 else 1]),
        (277, [channels]), (284, [2 if planar else 1]), (317, [predictor]), (322, [tile]), (323, [tile]),
        (324, offsets), (325, sizes), *([(338, [0] * (channels - 3))] if channels > 3 else []),
    ]  # fmt: skip
    entry, pointer, head = ("<HHQQ", "<Q", 16) if big else ("<HHII", "<I", 8)
    aux = head + (8 if big else 2) + len(tags) * (20 if big else 12) + struct.calcsize(pointer)
    room = struct.calcsize(pointer) // 4
    start = aux + sum(4 * len(values) for _, values in tags if len(values) > room)
    rows, extra = b"", b""
    for tag, values in tags:
        values = [value + start for value in values] if tag == 324 else values
        if len(values) > room:
            rows += struct.pack(entry, tag, 4, len(values), aux + len(extra))
            extra += struct.pack(f"<{len(values)}I", *values)
        else:
            packed = struct.pack(f"<{len(values)}I", *values).ljust(4 * room, b"\0")
            rows += struct.pack(entry, tag, 4, len(values), struct.unpack(pointer, packed)[0])
    first = (
        b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, len(tags)) if big else b"II*\0" + struct.pack("<IH", 8, len(tags))
    )
    path.write_bytes(first + rows + struct.pack(pointer, 0) + extra + content)


@pytest.mark.parametrize("big", [False, True])
def test_windows_of_a_tiled_tiff_are_those_of_the_whole(big, tmp_path):
    write_tiled(tmp_path / "a.tif", 61, 47, 16, NOISE, predictor=2, big=big)
    windows = Windows(tmp_path / "a.tif")
    assert windows._tiff.is_split
    assert (windows.height, windows.width) == (61, 47)
    whole = np.asarray(read_image(tmp_path / "a.tif"))
    assert (whole == NOISE).all()
    for box in ((0, 0, 47, 61), (5, 17, 33, 60), (46, 60, 47, 61)):
        assert (np.asarray(windows.read(*box)) == whole[box[1] : box[3], box[0] : box[2]]).all()


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg", "packbits"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P"])
def test_windows_of_strips_are_those_of_the_whole(compression, mode, tmp_path):
    if compression == "jpeg" and mode in ("RGBA", "P"):
        pytest.skip("JPEG has no such mode")
    Image.fromarray(NOISE).convert(mode).save(tmp_path / "a.tif", compression=compression, strip_size=900)
    for channels in (1, 3):
        whole = np.asarray(read_image(tmp_path / "a.tif", channels))
        assert (np.asarray(Windows(tmp_path / "a.tif", channels).read(3, 8, 40, 61)) == whole[8:61, 3:40]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "tif", "png"])
def test_windows_stand_upright(orientation, ending, tmp_path):
    image = Image.fromarray(NOISE)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    how = {"compression": "tiff_lzw", "strip_size": 900} if ending == "tif" else {}
    image.save(tmp_path / f"a.{ending}", exif=image.getexif(), **how)
    whole = np.asarray(read_image(tmp_path / f"a.{ending}"))
    windows = Windows(tmp_path / f"a.{ending}")
    assert (windows.height, windows.width) == whole.shape[:2]
    assert (np.asarray(windows.read(3, 8, 30, 40)) == whole[8:40, 3:30]).all()


def test_deep_and_transparent_pictures_are_read_as_the_whole(tmp_path):
    deep = np.random.default_rng(1).integers(0, 4096, (50, 40, 3)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "deep.tif"), deep)
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    cv2.imwrite(str(tmp_path / "grey.tif"), deep[..., 0])
    Image.fromarray(NOISE).convert("RGBA").rotate(20).save(tmp_path / "alpha.png")
    for name in ("deep.tif", "deep.png", "grey.tif", "alpha.png"):
        whole = np.asarray(read_image(tmp_path / name, 3, 4095))
        assert (np.asarray(Windows(tmp_path / name, 3, 4095).read(3, 8, 30, 40)) == whole[8:40, 3:30]).all(), name


def test_planes_are_read_one_by_one(tmp_path):
    deep = np.random.default_rng(1).integers(0, 4096, (50, 40, 3)).astype(np.uint16)
    write_tiled(tmp_path / "planar.tif", 50, 40, 16, deep, depth=2, planar=True, predictor=2)
    assert (Tiff(tmp_path / "planar.tif").values(3, 8, 30, 40) == deep[8:40, 3:30]).all()
    write_tiled(tmp_path / "whole.tif", 50, 40, 64, deep, depth=2)
    read = np.asarray(Windows(tmp_path / "planar.tif", 3, 4095).read(0, 0, 40, 50))
    assert (read == np.asarray(read_image(tmp_path / "whole.tif", 3, 4095))).all()


@pytest.mark.parametrize("cut", [4, 20, 100, -200])
def test_a_damaged_tiff_is_one_line(cut, tmp_path):
    write_tiled(tmp_path / "a.tif", 61, 47, 16, NOISE)
    (tmp_path / "b.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:cut])
    with pytest.raises(DamagedImageError, match=r"b\.tif: not an image, or damaged \([^\n]+\)$"):
        Windows(tmp_path / "b.tif").read(0, 0, 47, 61)


def test_tiles_cover_every_pixel_once():
    for length, size, overlap in ((100, 32, 4), (33, 32, 16), (31, 32, 0), (20000, 1024, 128), (97, 32, 0)):
        places = starts(length, size, overlap)
        assert places[0] == 0
        assert places[-1] + size >= length
        assert all(low + size - high >= overlap for low, high in pairwise(places))
        parts = own_parts(places, size, length)
        assert [low for low, _ in parts[1:]] == [high for _, high in parts[:-1]]
        assert (parts[0][0], parts[-1][1]) == (0, length)
        assert all(place <= low <= high <= place + size for place, (low, high) in zip(places, parts, strict=True))


class Finder:
    """Finds connected regions of the red channel: class 0 where it is bright, class 1 where it is grey."""

    threshold, channels, white, card = 0.5, 3, 65535, {"task": "detect"}
    classes = ("bright", "grey")

    def __init__(self, masks=True):
        self.masks = masks

    def __call__(self, images):
        return [self.find(np.asarray(image)[..., 0]) for image in images]

    def find(self, red):
        boxes, labels, scores, masks = [], [], [], []
        for label, inside in enumerate((red > 200, (red > 90) & (red < 200))):
            count, parts = cv2.connectedComponents(inside.astype(np.uint8))
            for part in range(1, count):
                mask = parts == part
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                labels.append(label)
                scores.append(min(0.99, 0.5 + mask.sum() / 20000))
                masks.append(encode_mask(mask))
        answer = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor(scores, dtype=torch.float32),
        }
        return answer | ({"masks": masks} if self.masks else {})


def scene():
    """Blobs smaller than the overlap, one across four tiles, and a bar through all columns of tiles."""
    pixels = np.zeros((230, 300), np.uint8)
    for y, x in ((20, 20), (80, 90), (60, 200), (150, 40), (200, 270), (120, 118)):
        cv2.circle(pixels, (x, y), 9, 255, -1)
    cv2.ellipse(pixels, (205, 150), (50, 22), 20, 0, 360, 255, -1)
    pixels[218:226, 5:295] = 120
    return np.repeat(pixels[..., None], 3, 2)


@pytest.mark.parametrize("masks", [True, False])
def test_objects_across_tiles_are_one(masks):
    pixels = scene()
    finder = Finder(masks)
    whole = finder.find(pixels[..., 0])
    found = predict_tiled(finder, Windows(Image.fromarray(pixels)), 96, 32).answer
    key = lambda answer: sorted(  # noqa: E731
        zip(answer["labels"].tolist(), map(tuple, answer["boxes"].tolist()), strict=True)
    )
    assert key(found) == key(whole)
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
    if masks:
        order = [key(found).index(entry) for entry in key(whole)]
        assert len(order) == 8
        mine = sorted(decode_masks(found["masks"], 230, 300).tolist())
        assert mine == sorted(decode_masks(whole["masks"], 230, 300).tolist())


def test_neighbors_of_one_class_stay_apart():
    pixels = np.zeros((100, 200, 3), np.uint8)
    for place, x in enumerate(range(4, 190, 14)):
        pixels[20 + place : 70 + place, x : x + 12] = 255
    found = predict_tiled(Finder(), Windows(Image.fromarray(pixels)), 64, 24).answer
    assert len(found["labels"]) == 14


def test_nothing_is_found_in_an_empty_picture():
    answer, overview, reduced = predict_tiled(Finder(), Windows(Image.new("RGB", (150, 130))), 64, 8)
    assert len(answer["boxes"]) == len(answer["masks"]) == len(reduced["masks"]) == 0
    assert overview.size == (150, 130)


class Labeller(Finder):
    """Labels pixels by their red channel; of segments, things are the connected bright regions."""

    card = {"task": "segment"}  # noqa: RUF012
    classes = ("bright", "grey", "dark")
    things = (True, False, False)

    def __init__(self, output):
        self.output = output

    def find(self, red):
        labels = np.where(red > 200, 0, np.where(red > 90, 1, 2))
        if self.output == "semantic":
            return torch.from_numpy(labels.astype(np.uint8))
        numbers = cv2.connectedComponents((labels == 0).astype(np.uint8))[1]
        numbers = np.where(labels == 0, numbers, 1000 + labels)
        return torch.from_numpy(np.stack([labels, numbers], -1).astype(np.int32))

    describe, headline, write_map, _shares, _to_plain = (
        getattr(Segmenter, name) for name in ("describe", "headline", "write_map", "_shares", "_to_plain")
    )


def test_classes_of_pixels_are_those_of_the_whole(tmp_path):
    labeller = Labeller("semantic")
    pixels = scene()
    whole = labeller.find(pixels[..., 0])
    found = predict_tiled(labeller, Windows(Image.fromarray(pixels)), 96, 32, tmp_path).answer
    assert (found.to_tensor() == whole).all()
    assert labeller.describe(found) == labeller.describe(whole)
    assert labeller.headline(found) == labeller.headline(whole)
    for name, answer in (("tiled", found), ("whole", whole)):
        labeller.write_map(answer, tmp_path / f"{name}.png")
    tiled, plain = (Image.open(tmp_path / f"{name}_labels.png") for name in ("tiled", "whole"))
    assert tiled.mode == plain.mode == "L"
    assert (np.asarray(tiled) == np.asarray(plain)).all()


def test_segments_across_tiles_are_one(tmp_path):
    labeller = Labeller("panoptic")
    pixels = scene()
    whole = labeller.find(pixels[..., 0])
    found = predict_tiled(labeller, Windows(Image.fromarray(pixels)), 96, 32, tmp_path).answer
    parts = found.to_tensor()
    assert (parts[..., 0] == whole[..., 0]).all()
    pairs = torch.unique(torch.stack([parts[..., 1], whole[..., 1]], -1).reshape(-1, 2), dim=0)
    assert len(pairs) == len(torch.unique(whole[..., 1])) == len(torch.unique(parts[..., 1]))
    areas = lambda answer: sorted(  # noqa: E731
        (entry["class"], entry["thing"], entry["area"]) for entry in labeller.describe(answer)["segments"]
    )
    assert areas(found) == areas(whole)
    labeller.write_map(found, tmp_path / "a.png")
    codes = np.asarray(Image.open(tmp_path / "a_map.png")).astype(int) @ [1, 256, 65536]
    assert (codes == parts[..., 1].numpy()).all()


def test_a_picture_of_large_answers_is_small():
    pixels = np.kron(scene(), np.ones((10, 10, 1), np.uint8))
    finder = Finder()
    finder.find = lambda red, find=finder.find: find(red)
    answer, overview, reduced = predict_tiled(finder, Windows(Image.fromarray(pixels)), 1000, 330)
    assert overview.size == (1500, 1150)
    assert len(reduced["masks"]) == len(answer["masks"]) == 8
    assert (np.abs(np.asarray(overview).astype(int) - pixels[1::2, 1::2]) == 0).mean() > 0.999
    whole, small = decode_masks(answer["masks"], *pixels.shape[:2]), decode_masks(reduced["masks"], 1150, 1500)
    assert (small == whole[:, 1::2, 1::2]).all()


def test_a_png_written_in_bands_is_read_by_others(tmp_path):
    write_png(tmp_path / "a.png", iter([NOISE[:20], NOISE[20:]]), 61, 47)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == NOISE).all()


def test_the_python_door_takes_tiles():
    pixels = scene()
    (result,) = Model(Finder.__new__(WithWords)).predict(pixels, tile=96, overlap=32)
    assert len(result.objects().labels) == 8
    assert sorted(entry["area"] for entry in result.to_coco())[-1] > 2000


class WithWords(Finder):
    masks = True

    def describe(self, answer):
        return {"objects": answer["labels"].tolist()}

    def headline(self, answer):
        return ""

    def draw(self, image, answer, path):
        return {}


@pytest.mark.parametrize(
    ("size", "overlap", "message"), [(64, 40, "overlap by 0 to 32, not 40"), (16, None, "too small; take 32")]
)
def test_tiles_that_cant_be_are_refused(size, overlap, message):
    with pytest.raises(TaskError, match=message):
        check_tiling(size, overlap, Finder())


def test_a_classifier_takes_no_tiles():
    finder = Finder()
    finder.card = {"task": "classify"}
    with pytest.raises(TaskError, match="a classifier names the picture as a whole"):
        check_tiling(64, None, finder)


MEASURE = """
import sys
from pathlib import Path
from PIL import Image
from foveate.tasks.data.windows import Windows
from foveate.tasks.tiles import predict_tiled
sys.path.insert(0, {folder!r})
from test_tiles import Labeller
labeller, path, folder = Labeller({output!r}), {path!r}, {scratch!r}
predict_tiled(labeller, Windows(Image.new("RGB", (512, 512))), 512, 64, folder)
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before = peak()
found = predict_tiled(labeller, Windows(path, white={white}), 512, 64, folder)
labeller.describe(found.answer)
labeller.write_map(found.answer, Path(folder) / "out.png")
print(peak() - before)
"""


def grown(path, output, scratch, white=65535):
    """Return by how many MB the memory of a process grows over what it needs for one tile."""
    code = MEASURE.format(
        folder=str(Path(__file__).parent), path=str(path), output=output, scratch=str(scratch), white=white
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@ON_LINUX
@pytest.mark.heavy
@pytest.mark.parametrize("output", ["semantic", "panoptic"])
def test_a_tiled_tiff_of_400_million_pixels_takes_little_memory(output, tmp_path):
    write_tiled(tmp_path / "a.tif", 20000, 20000, 512)
    assert grown(tmp_path / "a.tif", output, tmp_path) < 400


@ON_LINUX
@pytest.mark.heavy
def test_memory_doesnt_grow_with_a_tiled_tiff(tmp_path):
    write_tiled(tmp_path / "a.tif", 8000, 8000, 512)
    # Decoded it would be 192 MB, and 256 MB as Pillow holds it.
    assert grown(tmp_path / "a.tif", "semantic", tmp_path) < 190


@ON_LINUX
@pytest.mark.heavy
def test_other_pictures_take_less_than_half_again_of_themselves(tmp_path):
    Image.new("RGB", (7000, 7000)).save(tmp_path / "a.png", compress_level=1)
    assert grown(tmp_path / "a.png", "semantic", tmp_path) < 1.5 * 7000 * 7000 * 4 / 2**20


@ON_LINUX
@pytest.mark.heavy
def test_colours_of_16_bits_take_less_than_half_again_of_themselves(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((5000, 5000, 3), 900, np.uint16), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert grown(tmp_path / "a.png", "semantic", tmp_path, white=1023) < 1.5 * 5000 * 5000 * 6 / 2**20


@pytest.mark.parametrize("alpha", [False, True])
def test_pngs_of_16_bits_are_decoded_band_by_band(alpha, tmp_path, monkeypatch):
    monkeypatch.setattr("foveate.tasks.data.png.BAND_BYTES", 1000)
    pixels = np.random.default_rng(1).integers(0, 1 << 16, (30, 40, 3 + alpha)).astype(np.uint16)
    pixels[10:20] //= 4096
    path = tmp_path / "a.png"
    for filters in ("NONE", "SUB", "UP", "AVG", "PAETH"):
        options = [cv2.IMWRITE_PNG_FILTER, getattr(cv2, f"IMWRITE_PNG_FILTER_{filters}")]
        cv2.imwrite(str(path), pixels[..., [2, 1, 0, 3][: 3 + alpha]], options)
        assert np.array_equal(read_deep_png(path), pixels)
    content = path.read_bytes()
    half = len(content) // 2
    other = bytes([content[half] ^ 255])
    for damaged in (content[:half], content[:half] + other + content[half + 1 :], content[:33] + content[-12:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cut off|checksum|rows|decompressing|can't be decoded"):
            read_deep_png(path)
        with pytest.raises(DamagedImageError, match=r"a.png: not an image, or damaged"):
            Windows(path, white=1023)
    cv2.imwrite(str(path), np.zeros((4, 4, 3), np.uint8))
    assert read_deep_png(path) is None


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("alpha", [False, True])
def test_windows_of_deep_colours_are_those_of_the_whole(orientation, alpha, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 1024, (30, 40, 3 + alpha)).astype(np.uint16)
    if alpha:
        pixels[..., 3] *= 64
    cv2.imwrite(str(tmp_path / "plain.png"), pixels)
    path = tmp_path / "a.png"
    content = (tmp_path / "plain.png").read_bytes()
    exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([orientation, 0, 0, 0, 0, 0, 0])
    chunk = len(exif).to_bytes(4, "big") + b"eXIf" + exif + zlib.crc32(b"eXIf" + exif).to_bytes(4, "big")
    path.write_bytes(content[:33] + chunk + content[33:])
    whole = np.asarray(read_image(path, white=1023))
    assert whole.shape[:2] == ((40, 30) if orientation == 6 else (30, 40))
    windows = Windows(path, white=1023)
    assert (windows.height, windows.width) == whole.shape[:2]
    assert np.array_equal(np.asarray(windows.read(3, 5, 21, 29)), whole[5:29, 3:21])
    # By hand, where nothing is turned or seen through.
    if orientation == 1 and not alpha:
        expected = np.rint(pixels[..., ::-1].astype(float) * 255 / 1023)
        assert np.abs(whole - expected).max() <= 1
