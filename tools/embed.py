"""Write the embeddings of a folder's images for other tools: one pooled vector an image, without augmentation.

  .npz      arrays: paths [n], embeddings [n, dim] of float32, and model, a text
  .parquet  columns path and embedding; needs pyarrow

Paths are relative to FOLDER. An image that can't be read is reported and left out; the exit code is then 2.
"""

import argparse
import sys
from pathlib import Path

from .arguments import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="images, in folders below it too")
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="a timm name with weights, or a classifier's file"
    )
    parser.add_argument("--output", required=True, metavar="FILE", type=Path, help="file.npz or file.parquet")
    parser.add_argument("--untrained", action="store_true", help="of a name: random weights")
    parser.add_argument("--size", type=at_least(1), help="side of the input, in pixels; the model's own by default")
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="images at once; %(default)s by default")
    parser.add_argument(
        "--workers", type=at_least(1), default=4, help="threads that read images; %(default)s by default"
    )
    parser.add_argument(
        "--white", type=int, help="value of 16-bit pixels that is white; as in training if known, else by the images"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is one), cpu, cuda:1, ...; %(default)s by default"
    )


def run(args: argparse.Namespace) -> int:
    """Embed."""
    import importlib.util

    import numpy as np
    import torch
    from tqdm import tqdm

    from ..tasks import TaskError, one_line
    from ..tasks.checkpoints import write_whole
    from ..tasks.data.images import check_white, choose_white, find_images, read_image
    from ..tasks.devices import choose_device
    from ..tasks.features import open_encoder, read_batches

    writers = {".npz": _write_npz, ".parquet": _write_parquet}
    if args.output.suffix not in writers:
        raise TaskError(f"{args.output}: its ending says what is written: .npz or .parquet")
    if args.output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise TaskError(
            f"{args.output}: parquet needs pyarrow, which isn't installed: pip install pyarrow, or write .npz"
        )
    if not args.folder.is_dir():
        raise TaskError(f"{args.folder}: no such folder")
    device, paths = choose_device(args.device), find_images([args.folder])
    torch.manual_seed(0)  # of random weights
    encoder, rule, white = open_encoder(args.model, args.size, args.untrained)
    encoder.to(device)
    transform = rule.transform()
    white = check_white(args.white) or white or choose_white(paths)
    unreadable = []

    class Images(torch.utils.data.Dataset):
        def __getitem__(self, index: int):
            try:
                return paths[index], transform(read_image(paths[index], rule.channels, white))
            except TaskError as error:
                unreadable.append(str(error))
                return None

    names, vectors = [], []
    with tqdm(total=len(paths), unit="image", desc="embedding", disable=not sys.stderr.isatty()) as bar:
        for batch in read_batches(Images(), range(len(paths)), args.batch_size, args.workers):
            read = [item for item in batch if item is not None]
            if read:
                vectors.append(encoder(torch.stack([image for _, image in read]).to(device))[0].cpu().numpy())
                names += [path.relative_to(args.folder).as_posix() for path, _ in read]
            bar.update(len(batch))
    if vectors:
        vectors = np.concatenate(vectors)
        write_whole(args.output, lambda file: writers[args.output.suffix](file, names, vectors, args.model))
        print(f"{args.output}: {len(vectors)} embeddings of {vectors.shape[1]} numbers, by {args.model}")
    for message in sorted(unreadable):
        print(f"foveate: error: {one_line(message)}", file=sys.stderr)
    return 2 if unreadable else 0


def _write_npz(file: str, names: list[str], vectors, model: str) -> None:
    import numpy as np

    np.savez(file, paths=np.array(names), embeddings=vectors, model=np.array(model))


def _write_parquet(file: str, names: list[str], vectors, model: str) -> None:
    import pyarrow
    from pyarrow import parquet

    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1])
    # Parquet's texts are UTF-8, which names of files needn't be.
    names = [name.encode(errors="backslashreplace").decode() for name in names]
    table = pyarrow.table({"path": names, "embedding": column}).replace_schema_metadata({"model": model})
    parquet.write_table(table, file)
