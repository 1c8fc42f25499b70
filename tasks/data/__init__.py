"""Reading data: formats, checks of annotations, pixels, augmentation, bundled samples."""
