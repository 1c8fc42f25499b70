"""The bundled micrograph: its left half trains, the right one is held out; 512x256 pixels each."""

data = dict(name="nuclei")
