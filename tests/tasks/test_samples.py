from importlib.resources import files

import numpy as np
from foveate.tasks.data.samples import load_digits, load_nuclei


def test_digits_are_the_1797_of_uci():
    images, labels = load_digits()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.uint8
    assert images.max() == 16
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_nuclei_are_125_instances_on_a_micrograph_of_the_same_size():
    image, instances = load_nuclei()
    assert image.shape == instances.shape == (512, 512)
    assert image.dtype == instances.dtype == np.uint16
    assert len(np.unique(instances)) == 126
    assert image[instances > 0].mean() > 2 * image[instances == 0].mean()


def test_every_sample_is_installed_with_its_license():
    folder = files("foveate.tasks.data.samples")
    for name in ("digits_LICENSE.txt", "nuclei_LICENSE.txt"):
        assert "BSD 3-Clause License" in (folder / name).read_text()
    assert "CC BY 4.0" in (folder / "README.md").read_text()
