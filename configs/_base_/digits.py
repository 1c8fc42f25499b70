"""The bundled digits: 1400 train, 397 are held out; 8x8 pixels are resized to 32x32."""

data = dict(
    name="digits",
    num_classes=10,
    size=32,
    channels=1,
    mean=(0.69,),
    std=(0.38,),
    crop_pct=1.0,
    augment=dict(no_aug=True, affine=dict(degrees=12, translate=(0.08, 0.08), scale=(0.85, 1.15), shear=12, fill=255)),
)
