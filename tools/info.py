"""Describe a model, ours or timm's: parameters, cost, inputs, feature maps, weights, recipes."""

import argparse

from .arguments import at_least

# By timm's name of how an image that isn't square is fitted.
_CROPS = {"squash": "to a square whatever the shape, central crop", "border": "padded, central crop"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="such as nat_tiny, or with a tag nat_tiny.shi_in1k")
    parser.add_argument(
        "--size", type=at_least(1), help="side of the image for the cost, in pixels; the model's own by default"
    )


def run(args: argparse.Namespace) -> None:
    """Print the facts."""
    from timm.models import get_pretrained_cfg

    from ..configs import recipes_of_model
    from ..zoo.backbone import check_name, dense_settings_of

    check_name(args.name)
    arch = args.name.split(".")[0]
    cfg = get_pretrained_cfg(args.name)
    facts = [*_of_the_code(arch), *_of_the_model(args, cfg), *_of_the_weights(arch)]
    for label, value in (("origin", cfg.origin_url), ("paper", cfg.paper_ids)):
        if value:
            facts.append((label, value if isinstance(value, str) else ", ".join(value)))
    dense = dense_settings_of(arch)
    if dense:
        facts.append(("dense", f"create_backbone({arch!r}, setting=...): {', '.join(dense)}"))
    facts += [("recipe", f"foveate train {name}") for name in recipes_of_model(arch)]
    for label, fact in facts:
        print(f"{label:<11} {fact}")


def _of_the_code(arch: str) -> list[tuple[str, str]]:
    """Return what a model is, and of ours what its code was compared with."""
    from timm.models import model_entrypoint

    from ..zoo.states import code_state

    code = code_state(arch)
    if code is None:
        return [("model", arch)]
    words = (model_entrypoint(arch).__doc__ or "").strip().partition("\n")[0].replace("``", "`")
    return [("model", f"{arch}: {words}" if words else arch), ("code", code)]


def _of_the_model(args: argparse.Namespace, cfg) -> list[tuple[str, str]]:
    """Return its size, its cost, the images that it takes and the maps that it gives."""
    import timm
    import torch

    from ..tasks import TaskError
    from ..tasks.cost import count_macs

    channels, height, width = cfg.input_size
    if args.size is not None:
        if cfg.fixed_input_size and (args.size, args.size) != (height, width):
            raise TaskError(f"{args.name}: takes {height}x{width} images only")
        height = width = args.size
    with torch.device("meta"):
        model = timm.create_model(args.name).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        macs = count_macs(model, (channels, height, width))
        count = f"{macs / 1e9:.2f} GMACs" if macs >= 1e8 else f"{macs / 1e6:.3g} MMACs"
        cost = f"{count} at {height}x{width}, as executed on the CPU"
    except NotImplementedError as error:
        cost = f"not counted: {str(error).splitlines()[0]}"
    facts = [
        ("parameters", f"{parameters / 1e6:.2f} M, with {model.num_classes} classes"),
        ("forward", cost),
        ("input", f"{channels}x{cfg.input_size[1]}x{cfg.input_size[2]}, {_size_rule(cfg)}"),
        ("", f"mean {_numbers(cfg.mean)}, std {_numbers(cfg.std)} of pixels 0..1"),
        ("", f"{cfg.interpolation} resize, {_CROPS.get(cfg.crop_mode, 'central crop')} of {cfg.crop_pct:.1%}"),
    ]
    maps = getattr(model, "feature_info", None)
    if maps:
        levels = [(entry["reduction"], entry["num_chs"]) for entry in _entries(maps)]
        facts.append(("features", ", ".join(f"1/{reduction}: {count}" for reduction, count in levels) + " channels"))
    return facts


def _of_the_weights(arch: str) -> list[tuple[str, str]]:
    """Return where a model's published weights are, and what is stated of them."""
    import timm
    from timm.models import get_pretrained_cfg

    from ..zoo.states import file_state
    from ..zoo.weights import table

    facts = []
    tags = [name for name in timm.list_models(f"{arch}.*", include_tags=True) if get_pretrained_cfg(name).has_weights]
    for name in tags:
        weights = get_pretrained_cfg(name)
        source = weights.url or (f"hub: {weights.hf_hub_id}" if weights.hf_hub_id else weights.file)
        source = source[0] if isinstance(source, tuple) else source
        notes = "; ".join(weights.notes or ())
        facts += [
            ("weights", f"{name} ({weights.num_classes} classes, {weights.input_size[-1]} pixels): {source}"),
            ("", f"license {weights.license or 'not stated'}{'; ' + notes if notes else ''}"),
        ]
        if name in table():
            facts.append(("", f"file: {file_state(table()[name])}"))
    others = [name for name, entry in table().items() if entry.model == arch and name not in tags]
    facts += [("weights", f"{name}: `foveate weights info {name}`") for name in others]
    return facts or [("weights", "none published; train it, or give a checkpoint")]


def _size_rule(cfg) -> str:
    if cfg.fixed_input_size:
        return "this size only, or another given as img_size"
    least = f" from {cfg.min_input_size[-2]}x{cfg.min_input_size[-1]}" if cfg.min_input_size else ""
    return f"or any other size{least}"


def _numbers(values) -> str:
    return " ".join(f"{value:g}" for value in values)


def _entries(maps) -> list[dict]:
    return maps if isinstance(maps, list) else maps.get_dicts()
