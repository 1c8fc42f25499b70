import cv2
import numpy as np
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.data.augment import IGNORE, Augment, PhotometricDistortion, fit_size, resize_within


def test_sizes_are_those_of_the_published_rule(golden_folder):
    rows = np.load(golden_folder / "dense" / "preprocess.npz")
    for name, short, long in (("det_1333x800", 800, 1333), ("ade_2048x512", 512, 2048), ("city_2048x1024", 1024, 2048)):
        for width, height, new_width, new_height, *_ in rows[f"{name}.value"].reshape(-1, 8).astype(int).tolist():
            assert fit_size(height, width, short, long) == (new_height, new_width)


def test_aligned_resize_is_two_resizes():
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    once = cv2.resize(image, (92, 64), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(resize_within(image, 64, 400), once)
    np.testing.assert_array_equal(resize_within(image, 64, 400, 32), cv2.resize(once, (96, 64)))


def scene():
    """An image whose pixels say where they are, with three objects: a block, a far one and one of a single pixel."""
    y, x = np.mgrid[:61, :90]
    image = np.stack([x, y, x + y], -1).astype(np.uint8)
    masks = np.zeros((3, 61, 90), np.uint8)
    masks[0, 10:30, 5:45], masks[1, 50:60, 70:90], masks[2, 0, 0] = 1, 1, 1
    boxes = np.array([[5, 10, 45, 30], [70, 50, 90, 60], [0, 0, 1, 1]], np.float64)
    return image, boxes, masks


@pytest.mark.parametrize("seed", range(8))
def test_boxes_masks_and_pixels_move_together(seed):
    image, boxes, masks = scene()
    augment = Augment(
        {"shorts": (61, 122), "long": 400, "crop": (50, 70), "flip": 0.5, "flip_vertical": 0.5, "rotate": 0.5}
    )
    torch.manual_seed(seed)
    pixels, boxes, masks, left = augment.instances(image, boxes, masks)
    assert pixels.shape[:2] == masks.shape[1:]
    assert len(boxes) == len(masks) == len(left)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(box, around, atol=1.01)


def test_objects_of_which_nothing_is_left_are_dropped():
    image, boxes, masks = scene()
    counts = set()
    for seed in range(20):
        torch.manual_seed(seed)
        _, kept, _, left = Augment({"crop": 30, "flip": 0.0}).instances(image, boxes, masks)
        counts.add(len(left))
        assert (kept[:, 2:] > kept[:, :2]).all()
    assert {0, 1} <= counts
    pixels, none, no_masks, left = Augment({"crop": 30}).instances(image, boxes[:0], masks[:0])
    assert (pixels.shape, none.shape, no_masks.shape, left.shape) == ((30, 30, 3), (0, 4), (0, 30, 30), (0,))


def test_torch_s_seed_decides_and_steps_are_independent():
    image, boxes, _ = scene()
    augment = Augment({"shorts": (61, 122), "crop": 40, "distortion": True})
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment.instances(image, boxes, None)[0])
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    both = set()
    for seed in range(24):
        torch.manual_seed(seed)
        pixels = Augment({"flip": 0.5, "flip_vertical": 0.5})(image, np.zeros(image.shape[:2], np.uint8))[0]
        both.add((bool(pixels[0, 0, 0]), bool(pixels[0, 0, 1])))
    assert len(both) == 4


def test_a_crop_avoids_windows_of_one_class():
    labels = np.zeros((60, 200), np.uint8)
    labels[:, 150:] = 1
    image = np.zeros((60, 200, 3), np.uint8)
    shares = []
    for share in (1.0, 0.75):
        mixed = 0
        for seed in range(30):
            torch.manual_seed(seed)
            _, cut = Augment({"crop": 40, "max_share": share, "flip": 0.0})(image, labels)
            mixed += 0 < (cut == 1).mean() < 1
        shares.append(mixed)
    assert shares[1] > 2 * shares[0]


def test_a_label_map_keeps_its_values_when_resized():
    image, _, _ = scene()
    labels = np.full(image.shape[:2], IGNORE, np.int32)
    labels[20:40, 20:60] = 149
    pixels, resized = Augment({"shorts": (97,), "long": 1000})(image, labels)
    assert pixels.shape[:2] == resized.shape == (97, 143)
    assert set(np.unique(resized)) == {149, IGNORE}


def test_distortion_changes_pixels_within_bounds():
    image, _, _ = scene()
    distort = PhotometricDistortion()
    distort.set_random_seed(0)
    seen = [distort(image=image)["image"] for _ in range(6)]
    assert all(pixels.dtype == np.uint8 and pixels.shape == image.shape for pixels in seen)
    assert sum(not np.array_equal(pixels, image) for pixels in seen) >= 4
    plain = distort.apply(image, None, None, False, None, None)
    np.testing.assert_array_equal(plain, image)
    assert distort.apply(image, 10.0, None, False, None, None)[5, 5].tolist() == [15, 15, 20]


@pytest.mark.parametrize(
    ("settings", "reason"), [({"corp": 3}, "did you mean 'crop'"), ({"flip": 2.0}, "data.augment")]
)
def test_wrong_settings_are_refused(settings, reason):
    with pytest.raises(TaskError, match=reason):
        Augment(settings)


def test_contrast_comes_before_or_after_saturation_by_a_coin():
    """SSD's two orders differ where colours are clipped or rounded between them."""
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    fixed = {"shift": None, "contrast": 1.4, "saturation": 0.6, "hue": None}
    scale = lambda x, factor: np.clip(x.astype(np.float32) * factor, 0, 255).astype(np.uint8)  # noqa: E731

    def saturated(x):
        hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = scale(hsv[..., 1], 0.6)
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)

    first, last = saturated(scale(image, 1.4)), scale(saturated(image), 1.4)
    assert (first != last).any()
    distortion = PhotometricDistortion()
    np.testing.assert_array_equal(distortion.apply(image, contrast_last=False, **fixed), first)
    np.testing.assert_array_equal(distortion.apply(image, contrast_last=True, **fixed), last)
    distortion.set_random_seed(0)
    assert {distortion.get_params()["contrast_last"] for _ in range(20)} == {False, True}


def test_what_has_no_area_in_float32_goes_whatever_the_transform():
    # Borders of windows cut boxes to widths that float64 tells from nothing and float32 doesn't.
    draw = np.random.default_rng(0)
    chains = (
        {"crop": 33},
        {"shorts": (37, 61), "long": 90, "crop": 31},
        {"crop_policy": True},
        {"rotate": 1.0, "crop": 29},
    )
    image = np.zeros((97, 131, 3), np.uint8)
    for settings in chains:
        augment = Augment(settings)
        for seed in range(40):
            torch.manual_seed(seed)
            low = np.column_stack([draw.integers(0, 130, 60), draw.integers(0, 96, 60)]).astype(float)
            sides = 10.0 ** draw.uniform(-12, 1.5, (60, 2))
            boxes = np.concatenate([low, np.minimum(low + sides, [131, 97])], 1)
            boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
            _, found, _, left = augment.instances(image, boxes, None)
            found = found.astype(np.float32)
            assert len(found) == len(left)
            assert (found[:, 2:] > found[:, :2]).all()
            masks = np.zeros((len(boxes), 97, 131), np.uint8)
            masks[:, 40, 50] = 1
            _, found, cut, left = augment.instances(image, boxes, masks)
            assert len(found) == len(cut) == len(left)
            assert cut.any((1, 2)).all()


def test_a_line_keeps_a_pixel():
    assert fit_size(1, 3000, 600, 800) == (1, 800)
    assert resize_within(np.zeros((1, 3000, 3), np.uint8), 600, 800).shape == (1, 800, 3)


def test_any_transform_of_albumentations_is_taken_with_what_is_annotated():
    """A quarter turn to the left moves image, boxes, masks and labels alike; what is left empty is no class."""
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    labels = (image[..., 0] > 127).astype(np.int32)
    turn = {"flip": 0, "transforms": [{"type": "Rotate", "limit": (90, 90), "p": 1, "interpolation": 0}]}
    pixels, turned = Augment(turn)(image, labels)
    np.testing.assert_array_equal(turned, pixels[..., 0] > 127)
    np.testing.assert_array_equal(pixels, np.rot90(image))
    masks = np.zeros((2, 20, 20), np.uint8)
    masks[0, 2:5, 3:9] = masks[1, 10:18, 1:4] = 1
    boxes = np.array([[3, 2, 9, 5], [1, 10, 4, 18]], np.float64)
    pixels, found, moved, left = Augment(turn).instances(image, boxes, masks)
    np.testing.assert_array_equal(moved, [np.rot90(mask) for mask in masks])
    np.testing.assert_allclose(found, [[2, 11, 5, 17], [10, 16, 18, 19]], atol=1e-4)
    assert left.tolist() == [0, 1]
    shift = {"flip": 0, "transforms": [{"type": "Affine", "translate_px": {"x": 8, "y": 0}, "p": 1}]}
    _, shifted = Augment(shift)(image, labels)
    assert (shifted[:, :8] == IGNORE).all()
    assert (shifted[:, 8:] != IGNORE).all()
    numbers = (labels + 1).astype(np.uint16)
    assert (Augment(shift)(image, numbers, empty=0)[1][:, :8] == 0).all()


def test_transforms_draw_from_torch_s_generator():
    chain = {"transforms": [{"type": "OneOf", "transforms": [{"type": "GaussNoise"}, {"type": "Blur"}], "p": 1}]}
    image, labels, augment = np.full((9, 9, 3), 100, np.uint8), np.zeros((9, 9), np.int32), Augment(chain)

    def run(seed):
        torch.manual_seed(seed)
        return [augment(image, labels)[0] for _ in range(6)]

    np.testing.assert_array_equal(run(1), run(1))
    assert not np.array_equal(run(1), run(2))


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        ({"type": "GausNoise"}, r"transforms\[0\]: albumentations has no 'GausNoise'; did you mean 'GaussNoise'"),
        ({"type": "Blur", "limit": 3}, r"transforms\[0\]: Blur: .*'?limit"),
        ("Blur", r"transforms\[0\] is 'Blur'; a transform is dict"),
        ({"type": "Normalize", "p": 1}, "make images of 0 to 255 as uint8, not float32"),
    ],
)
def test_wrong_transforms_are_named(described, reason):
    with pytest.raises(TaskError, match=reason):
        Augment({"transforms": [described]})(np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.int32))
