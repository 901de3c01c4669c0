"""Inputs of applications: a pretrained model with its decoder, and the images that are named.

Images are named by files, by folders or by keys of held-out samples, and seen as the run's own
evaluation sees its images: decoded to its channels, centre-cropped, resized and normalised.
"""

import inspect
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Shaped
from PIL import Image
from torch import Tensor

from maepretrain.checkpoints.encoders import load_autoencoder
from maepretrain.data.errors import Unreadable
from maepretrain.data.module import ShardData, add_data, shard_data
from maepretrain.data.normalise import Normalise
from maepretrain.data.samples import Pixels, ShardIndex
from maepretrain.data.shards.tar import INPUT_EXTENSIONS
from maepretrain.data.transforms import CentreCrop
from maepretrain.evaluate.options import data_of_encoder
from maepretrain.models.protocol import Seeded
from maepretrain.parsing.parser import allow_bare_flags, make_parser
from maepretrain.ranks import say

# Of the section data: how an image is shown to a model, and where held-out ones are.
DATA_OPTIONS = {
    "val",
    "image_size",
    "channels",
    "crop",
    "exif",
    "mean",
    "std",
    "cache",
}
# Options that take several words: the type of each, and their help.
LIST_OPTIONS: dict[str, tuple[type, str]] = {
    "images": (str, "files, folders or keys of held-out samples; default the first of these"),
    "dimensions": (int, "numbers of the code; default the eight that vary most"),
}


def parse_application(
    verb: str, function: Callable[..., Any], argv: list[str], *, measures: bool = False
) -> dict[str, Any]:
    """The options of an application as the arguments of its function.

    Args:
        verb: its name.
        function: has the arguments `encoder` and `data`, and `images` where it takes some.
        argv: the options. Those of the section `data` come from the run behind `--encoder`.
        measures: it needs held-out samples even where all images are files.
    """
    parser = make_parser(verb, config=False)
    parser.add_function_arguments(function, skip={"data", *LIST_OPTIONS})
    for name, (kind, help_text) in LIST_OPTIONS.items():
        if name in inspect.signature(function).parameters:
            parser.add_argument(f"--{name}", nargs="*", type=kind, default=[], help=help_text)
    skip = set(inspect.signature(ShardData).parameters) - DATA_OPTIONS
    add_data(parser, skip=skip)
    data_of_encoder(parser, [*sorted(skip), "crop.per_image"])
    allow_bare_flags(parser)
    arguments = parser.parse_args(argv).as_dict()
    if not measures and not _reads_held_out(arguments):
        arguments["data"]["val"] = None  # a model may be on another machine than its shards
    return arguments | {"data": shard_data({"train": None} | arguments["data"])}


def _reads_held_out(arguments: dict[str, Any]) -> bool:
    """False where the application takes no images, or all of them are files or folders."""
    if "images" not in arguments:
        return False
    names = arguments["images"]
    return not names or not all(Path(name).exists() for name in names)


class Pretrained:
    """A pretrained model with its decoder, and the way from pixels to what it reads and back.

    Args:
        encoder: a run folder of pretraining, or a file of weights that has the decoder.
        data: how images are shown to it.
        seed: of the model's masks and noise; None leaves its own.

    Raises:
        ValueError: an encoder without decoder.
    """

    def __init__(self, encoder: str, data: ShardData, seed: int | None = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = cast(Any, load_autoencoder(encoder, data).eval().to(self.device))
        self.normalise = Normalise(data.mean, data.std).to(self.device)
        self.name = type(self.model).__name__
        if seed is not None and isinstance(self.model, Seeded):
            self.model.seed = seed

    def see(self, inputs: Shaped[Tensor, "n c *size"]) -> Float[Tensor, "n c *size"]:
        """Pixels or signals as the model takes them: normalised, on its device."""
        return self.normalise(inputs.to(self.device))

    def show(self, x: Float[Tensor, "n c *size"]) -> Float[Tensor, "n c *size"]:
        """Pixels in 0..1, or signals, on the CPU."""
        return self.normalise.undo(x.detach().float()).cpu()


class Inputs(NamedTuple):
    """Images or signals, and the name of each."""

    names: list[str]
    values: Shaped[Tensor, "n c *size"]


def read_images(names: list[str], data: ShardData, at_most: int | None = None) -> Inputs:
    """The images of these names as evaluation sees them. A line is printed for each kind of change
    that files needed.

    Args:
        names: files, folders (all images in them, sorted) or keys of held-out samples; empty takes
            the first held-out samples.
        data: has the size, the channels and the held-out samples.
        at_most: so many; a line is printed where some are left out.

    Raises:
        ValueError: a name that is nothing of these, a file that is no image, no images at all.
    """
    if at_most is not None and at_most < 1:
        raise ValueError(f"n {at_most} must be at least 1")
    if not names:
        if data.val_index is None or not len(data.val_index):
            raise ValueError("there are no held-out shards (data.val): name files with --images")
        count = min(at_most or len(data.val_index), len(data.val_index))
        return _of_numbers(list(range(count)), data)
    sources = [source for name in names for source in _sources(name, data)]
    if at_most is not None and len(sources) > at_most:
        say(f"images        the first {at_most} of {len(sources):,}; --n takes more")
        sources = sources[:at_most]
    changes: Counter[str] = Counter()
    read: list[Inputs] = []
    for source in sources:
        if isinstance(source, int):
            read.append(_of_numbers([source], data))
        else:
            read.append(_of_file(source, data, changes))
    for change, count in changes.items():
        say(f"images        {count} of {change}")
    if len({one.values.dtype for one in read}) > 1:
        raise ValueError("these are pixels (uint8) and arrays of other numbers: name one kind")
    return Inputs(
        [name for one in read for name in one.names], torch.cat([one.values for one in read])
    )


def _sources(name: str, data: ShardData) -> list[Path | int]:
    """The files of this name, or the number of the held-out sample with this key."""
    path = Path(name)
    if path.is_dir():
        endings = {f".{extension}" for extension in INPUT_EXTENSIONS if extension != "txt"}
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings)
        if not files:
            raise ValueError(f"the folder {path} holds no images ({', '.join(sorted(endings))})")
        return [*files]
    if path.is_file():
        return [path]
    number = None if data.val_index is None else find_key(name, data.val_index)
    if number is None:
        kinds = "no file, no folder" + ("" if data.val_index is None else ", no held-out key")
        raise ValueError(f"image {name}: {kinds} of that name")
    return [number]


def find_key(key: str, index: ShardIndex) -> int | None:
    """The number of the first sample with this key."""
    begin = 0
    for shard, count in enumerate(index.counts.tolist()):
        keys = index.columns(shard).keys
        if key in keys:
            return begin + list(keys).index(key)
        begin += count
    return None


def _of_numbers(numbers: list[int], data: ShardData) -> Inputs:
    assert data.val_index is not None
    samples = data.evaluation(data.val_index)
    read = samples.__getitems__(numbers)
    if errors := samples.pop_errors(read):
        raise ValueError(f"a held-out sample cannot be read: {errors[0]}")
    return Inputs([key for _, key in samples.names(numbers)], read["input"])


def _of_file(path: Path, data: ShardData, changes: Counter[str]) -> Inputs:
    content = path.read_bytes()
    pixels = Pixels(data.channels, data.centre_crop, data.exif, centred=True)
    try:
        decoded = pixels.decode(content, path.suffix.lower().removeprefix("."))
    except Unreadable as error:
        raise ValueError(f"{path}: {error}") from error
    cut = pixels.cut_out(decoded, torch.empty(0))
    if change := _change(content, decoded, cut, data):
        changes[change] += 1
    return Inputs([path.stem], cut[None])


def _change(content: bytes, decoded: Tensor, cut: Tensor, data: ShardData) -> str:
    """Changes made to an image or a signal, in words; empty for nothing."""
    size = "x".join(map(str, decoded.shape[1:]))
    cut_size = "x".join(map(str, cut.shape[1:]))
    taken_as = ("gray", "gray with alpha", "RGB", "RGBA")[min(data.channels, 4) - 1]
    mode = _colour_mode(content) or taken_as
    changes = []
    if mode != taken_as:
        changes.append(f"taken as {taken_as}")
    if size != cut_size and isinstance(data.centre_crop, CentreCrop):
        changes.append(f"the centre of it resized to {cut_size}")
    elif size != cut_size:
        changes.append(f"{cut_size} of it")
    return f"{size} {mode}: {', '.join(changes)}" if changes else ""


def _colour_mode(content: bytes) -> str | None:
    """Pillow's name of a picture's colours, in words; None for an array."""
    try:
        mode = Image.open(io.BytesIO(content)).mode
    except OSError:
        return None
    return {"L": "gray", "LA": "gray with alpha"}.get(mode, mode)
