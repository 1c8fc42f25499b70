"""The bundled digits: 1400 train, 397 are held out; 8x8 pixels are resized to 32x32."""

data = dict(
    name="digits",
    num_classes=10,
    size=32,
    channels=1,
    mean=(0.69,),
    std=(0.38,),
    crop_pct=1.0,
    augment=dict(scale=(0.6, 1.0), ratio=(0.75, 1.3333), hflip=0.0),
)
