"""Random calls of the operators: every backend that can run gives what the reference does in double precision."""

import torch
from foveate.kernels import (
    multi_scale_deformable_attention,
    na1d,
    na2d,
    na3d,
    quadtree_scores,
    quadtree_values,
    routed_attention,
)
from trial import Trial, Wrong


def run(trial: Trial) -> None:
    for number in trial.numbers():
        torch.manual_seed(trial.draw.getrandbits(32))
        kind = trial.draw.choice(("neighborhood", "neighborhood", "routing", "deformable", "quadtree"))
        trial.check(kind, number, lambda: globals()[f"_{kind}"](trial.draw))  # noqa: B023 (called at once)


def _tensor(draw, *shape: int, strange: bool = True) -> torch.Tensor:
    """Return values that lie anyhow in memory."""
    x = torch.randn(shape)
    how = draw.choice(("as it is", "transposed", "cut", "expanded")) if strange else "as it is"
    if how == "transposed":
        first, second = draw.randrange(len(shape)), draw.randrange(len(shape))
        return x.transpose(first, second).contiguous().transpose(first, second)
    if how == "cut":
        return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : shape[-1]]
    return x[:1].expand(shape) if how == "expanded" and shape[0] else x


def _compare(operator, tensors: list[torch.Tensor], backends, reference: str = "reference") -> None:
    """Compare values and gradients of backends with those of the reference in double precision."""
    exact = _differentiate(operator, [x.double() if x.is_floating_point() else x for x in tensors], reference)
    for backend in backends:
        try:
            results = _differentiate(operator, tensors, backend)
        except ValueError as error:
            if "cannot run here" in str(error):
                continue
            raise
        for place, (result, expected) in enumerate(zip(results, exact, strict=True)):
            if result.shape != expected.shape:
                raise Wrong(f"{backend}: shape {tuple(result.shape)}, not {tuple(expected.shape)}")
            same_nan = result.isnan() == expected.isnan()
            difference = (result.double() - expected).nan_to_num(0.0, 0.0, 0.0).abs()
            allowed = 2e-4 * (1 + expected.nan_to_num(0.0, 0.0, 0.0).abs().amax()) if expected.numel() else 1
            if not same_nan.all() or not bool((difference <= allowed).all()):
                raise Wrong(f"{backend}: result {place} differs by {difference.max():.1e}")


def _differentiate(operator, tensors, backend) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    out = operator(*leaves, backend=backend)
    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    wanted = [x for x in leaves if x.requires_grad]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), wanted)]


def _neighborhood(draw) -> None:
    rank = draw.choice((1, 2, 2, 3))
    sizes = [draw.randint(2, 14 if rank < 3 else 6) for _ in range(rank)]
    kernel, dilation, stride, causal = [], [], [], []
    for size in sizes:
        kernel.append(draw.randint(2, min(size, 9)))
        dilation.append(draw.randint(1, size // kernel[-1]))
        stride.append(draw.randint(1, kernel[-1]))
        causal.append(draw.random() < 0.25)
    batch, heads, dim = draw.choice((0, 1, 1, 2)), draw.randint(1, 3), draw.randint(1, 19)
    tensors = [_tensor(draw, batch, *sizes, heads, dim) for _ in range(3)]
    if batch and draw.random() < 0.1:
        tensors[draw.randrange(3)] = (
            tensors[0].clone().index_fill(1, torch.tensor(0), draw.choice((torch.inf, torch.nan)))
        )
    options = dict(stride=tuple(stride), dilation=tuple(dilation), is_causal=tuple(causal))
    operator = {1: na1d, 2: na2d, 3: na3d}[rank]
    _compare(
        lambda q, k, v, backend: operator(q, k, v, tuple(kernel), backend=backend, **options),
        tensors,
        (None, "native", "tiled", "boxes", "reference"),
    )


def _routing(draw) -> None:
    region = draw.randint(1, 4), draw.randint(1, 4)
    rows, columns = draw.randint(1, 4), draw.randint(1, 4)
    batch, heads, dim = draw.choice((0, 1, 2)), draw.randint(1, 3), draw.randint(1, 9)
    count = rows * columns
    tensors = [_tensor(draw, batch, rows * region[0], columns * region[1], heads, dim) for _ in range(3)]
    routes = torch.stack(
        [torch.randperm(count) for _ in range(batch * count)] or [torch.zeros(count, dtype=torch.long)]
    )
    routes = routes[: batch * count].view(batch, count, count)[..., : draw.randint(1, count)]
    _compare(
        lambda q, k, v, backend: routed_attention(q, k, v, routes, region, backend=backend),
        tensors,
        (None, "chunked", "reference"),
    )


def _deformable(draw) -> None:
    shapes = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(1, 3))]
    batch, queries, heads, dim, points = (
        draw.randint(low, high) for low, high in ((0, 2), (0, 9), (1, 3), (1, 9), (1, 4))
    )
    value = _tensor(draw, batch, sum(height * width for height, width in shapes), heads, dim)
    # The slope changes at cells' centres: kinks are kept away from by a grid of odd parts.
    locations = (torch.randint(-8, 40, (batch, queries, heads, len(shapes), points, 2)) + 0.3517) / 33
    weights = torch.rand(batch, queries, heads, len(shapes), points)
    _compare(
        lambda v, x, w, backend: multi_scale_deformable_attention(v, shapes, x, w, backend=backend),
        [value, locations, weights],
        (None, "native", "bags", "gathers", "reference"),
    )


def _quadtree(draw) -> None:
    batch, heads, dim, parents = draw.choice((0, 1, 2)), draw.randint(1, 3), draw.randint(1, 9), draw.randint(1, 9)
    tokens, chosen = draw.randint(1, 9), draw.randint(1, 6)
    index = torch.randint(tokens, (batch, heads, parents, chosen))
    _compare(
        lambda q, k, backend: quadtree_scores(q, k, index, backend=backend),
        [_tensor(draw, batch, heads, parents, 4, dim), _tensor(draw, batch, heads, tokens, 4, dim)],
        (None, "chunked", "reference"),
    )
    _compare(
        lambda w, v, backend: quadtree_values(w, v, index, backend=backend),
        [_tensor(draw, batch, heads, parents, 4, 4 * chosen), _tensor(draw, batch, heads, tokens, 4, dim)],
        (None, "chunked", "reference"),
    )
