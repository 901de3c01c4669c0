"""The input pipeline side by side with others: CPU time per image, to 224 x 224, one thread.

Makes 2,000 JPEGs of 500 x 375 from real photographs (scikit-image's and scikit-learn's), packs them
for each pipeline, and reads the same number of images through each of them in turn, several times.
What is compared is the median over the rounds of process CPU time, which neighbours on the machine
disturb less than the clock; the ratios are within a round. Needs the extra `bench`.
"""

import argparse
import io
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, cast

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import webdataset
from litdata import StreamingDataset, optimize
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional

from benchmarks.photographs import make_jpegs
from benchmarks.timing import entry, positive, progress
from maepretrain.data.decode import decode
from maepretrain.data.module import ShardData
from maepretrain.data.settings import Crop
from maepretrain.data.shards.sources import find_source
from maepretrain.data.shards.write import write_shards
from maepretrain.data.transforms import UNIFORMS, Augment
from maepretrain.randomness import uniform

BATCH, SIDE = 64, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# facebookresearch/mae, main_pretrain.py: its transform, written in torchvision's terms.
PAPER: Any = transforms.Compose(
    [
        transforms.RandomResizedCrop(
            SIDE, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
        ),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
)
Pass = Callable[[int], Iterator[int]]


def ours(shards: str, crops: int = 1) -> Pass:
    """maepretrain's loader."""
    data = ShardData(
        shards, global_batch=BATCH, image_size=SIDE, crop=Crop(per_image=crops), num_workers=0
    )
    data.plan(1_000_000, 1, 1)

    def run(images: int) -> Iterator[int]:
        for batch in data.train_dataloader():
            yield len(batch["position"])

    return run


def image_folder(folder: Path) -> Pass:
    """torchvision's ImageFolder with the official code's transform."""
    dataset = ImageFolder(str(folder), PAPER)

    def run(images: int) -> Iterator[int]:
        for batch, _ in DataLoader(dataset, BATCH, shuffle=True, drop_last=True):
            yield len(batch)

    return run


def plain_webdataset(shards: list[str]) -> Pass:
    """webdataset's pipeline with its PIL decoder and the official code's transform."""

    def run(images: int) -> Iterator[int]:
        pipeline = (
            cast(Any, webdataset)
            .WebDataset(shards, shardshuffle=len(shards), empty_check=False)
            .shuffle(1000)
            .decode("pil")
            .to_tuple("jpg", "cls")
            .map_tuple(PAPER, lambda label: label)
            .batched(BATCH, partial=False)
        )
        for batch, _ in pipeline:
            yield len(batch)

    return run


def _item(path: str) -> dict[str, Any]:
    return {"image": Path(path).read_bytes(), "label": int(Path(path).parent.name)}


def litdata_chunks(folder: Path, chunks: Path) -> None:
    """litdata's own format, in chunks as large as the shards."""
    if not (chunks / "index.json").exists():
        files = sorted(str(path) for path in folder.rglob("*.jpg"))
        optimize(_item, files, str(chunks), chunk_size=500, num_workers=1)


class LitData(StreamingDataset):
    """litdata's streaming data set, with our pixels or the official code's."""

    def __init__(self, chunks: Path, ours: bool) -> None:
        super().__init__(str(chunks), shuffle=True, drop_last=True)
        self.augment = Augment(SIDE, SIDE) if ours else None
        self.position = 0

    def __getitem__(self, index: Any) -> torch.Tensor:
        data = bytes(super().__getitem__(index)["image"])
        if self.augment is None:
            return PAPER(Image.open(io.BytesIO(data)).convert("RGB"))
        self.position += 1
        u = uniform(0, "crop", torch.tensor([self.position]), UNIFORMS)[0]
        return self.augment(decode(data, 3), u)


def litdata(chunks: Path, ours: bool) -> Pass:
    """litdata's reader and torch's loader."""

    def run(images: int) -> Iterator[int]:
        for batch in DataLoader(LitData(chunks, ours), BATCH, drop_last=True):
            yield len(batch)

    return run


def pixels_only(folder: Path, shards: str, images: int) -> Pass:
    """Decode, crop and flip of the bytes that our loader reads, from memory: what no loader can go
    below."""
    data = ShardData(shards, global_batch=BATCH, image_size=SIDE)
    names = data.training().names(list(range(images)))
    files = [(folder / f"{key}.jpg").read_bytes() for _, key in names]
    numbers = uniform(0, "crop", torch.arange(images), UNIFORMS).unbind()
    augment = Augment(SIDE, SIDE)

    def run(images: int) -> Iterator[int]:
        for one, u in zip(files, numbers, strict=True):
            augment(decode(one, 3), u)
            yield 1

    return run


class Timed:
    """Our decoder and crop, with the CPU time that they take."""

    def __init__(self, pixels: Any) -> None:
        self.pixels, self.numbers, self.seconds = pixels, pixels.numbers, 0.0

    def _timed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.process_time()
        result = function(*arguments)
        self.seconds += time.process_time() - begin
        return result

    def decode(self, *arguments: Any) -> Any:
        return self._timed(self.pixels.decode, *arguments)

    def cut_out(self, *arguments: Any) -> Any:
        return self._timed(self.pixels.cut_out, *arguments)


def overhead(shards: str, images: int) -> float:
    """What our loader costs on top of decode and crop, as a share of them, in one and the same
    pass: neighbours on the machine slow both alike."""
    data = ShardData(shards, global_batch=BATCH, image_size=SIDE, num_workers=0)
    data.plan(images // BATCH + 1, 1, 1)
    loader = data.train_dataloader()
    samples = cast(Any, loader.dataset)
    timed = samples.pixels = Timed(samples.pixels)
    begin = time.process_time()
    for _ in loader:
        pass
    return (time.process_time() - begin) / timed.seconds - 1


def cpu_microseconds(one_pass: Pass, images: int) -> float:
    """Process CPU time per image, in microseconds, the start of an epoch included."""
    begin, done = time.process_time(), 0
    while done < images:
        for more in one_pass(images):
            done += more
            if done >= images:
                break
    return (time.process_time() - begin) / done * 1e6


def psnr(folder: Path, images: int = 100) -> tuple[float, float]:
    """Median PSNR (dB) and mean absolute difference of our pixels to torchvision's on PIL images,
    at the same crops."""
    augment, decibels, differences = Augment(SIDE, SIDE), [], []
    for i, path in enumerate(sorted(folder.rglob("*.jpg"))[:images]):
        data, u = path.read_bytes(), uniform(0, "crop", torch.tensor([i]), UNIFORMS)[0]
        image = Image.open(io.BytesIO(data)).convert("RGB")
        top, left, height, width = augment.box(image.height, image.width, u.tolist())
        truth = functional.resized_crop(
            cast(Any, image),
            top,
            left,
            height,
            width,
            [SIDE, SIDE],
            functional.InterpolationMode.BICUBIC,
        )
        truth = functional.hflip(truth) if u[-1] < augment.flip else truth
        difference = augment(decode(data, 3), u).double() - functional.pil_to_tensor(truth)
        decibels.append(10 * np.log10(255**2 / max(1e-9, float(difference.square().mean()))))
        differences.append(float(difference.abs().mean()))
    return statistics.median(decibels), statistics.mean(differences)


def table(rows: dict[str, list[float]], base: str) -> str:
    """Markdown: median CPU time, images a second, and the median ratio to `base` in the rounds."""
    lines = ["| pipeline | CPU µs/image | images/s | x |", "|---|---|---|---|"]
    for name, times in rows.items():
        ratio = statistics.median(b / t for b, t in zip(rows[base], times, strict=True))
        median = statistics.median(times)
        lines.append(f"| {name} | {median:,.0f} | {1e6 / median:,.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks data", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/maepretrain-bench"))
    parser.add_argument("--images", type=positive, default=2000, help="JPEGs that are made")
    parser.add_argument(
        "--read", type=positive, default=512, help="images of each pipeline in a round"
    )
    parser.add_argument("--rounds", type=positive, default=7)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder, shards = arguments.folder / "jpeg", arguments.folder / "shards"
    make_jpegs(folder, arguments.images)
    source = find_source(str(folder), None, "train")
    write_shards(source, shards / "full", samples_per_shard=500)
    write_shards(source, shards / "short320", samples_per_shard=500, short_side=320)
    chunks = arguments.folder / "litdata"
    litdata_chunks(folder, chunks)
    full = f"{shards}/full/train-*.tar"
    reference = "ImageFolder, PIL, official transform"
    passes = {
        reference: image_folder(folder),
        "webdataset, PIL, official transform": plain_webdataset(
            sorted(str(path) for path in (shards / "full").glob("*.tar"))
        ),
        "litdata, PIL, official transform": litdata(chunks, ours=False),
        "litdata, our decoder and crop": litdata(chunks, ours=True),
        "**maepretrain**": ours(full),
        "our decoder and crop alone, from memory": pixels_only(folder, full, arguments.read),
        "maepretrain, 2 crops of each image": ours(full, 2),
        "maepretrain, 4 crops of each image": ours(full, 4),
        "maepretrain, shards written with short side 320": ours(f"{shards}/short320/train-*.tar"),
    }
    rows: dict[str, list[float]] = {name: [] for name in passes}
    for one_pass in passes.values():  # files into the page cache, imports done
        cpu_microseconds(one_pass, BATCH)
    for number in range(arguments.rounds):
        for name, one_pass in passes.items():
            rows[name].append(cpu_microseconds(one_pass, arguments.read))
        progress(f"round {number + 1} of {arguments.rounds}")
    costs = [overhead(full, arguments.read) for _ in range(arguments.rounds)]
    cost, (decibels, difference) = 100 * statistics.median(costs), psnr(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*.jpg")) / arguments.images
    print(
        f"{arguments.images:,} JPEGs of 500 x 375 (mean {size / 1000:.0f} KB), random resized crop "
        f"to {SIDE}, one thread, median CPU time of {arguments.rounds} interleaved rounds of "
        f'{arguments.read} images. "x" is the speed against the first row, the median of the '
        f"rounds' ratios. webdataset {metadata.version('webdataset')}, litdata "
        f"{metadata.version('litdata')}.\n\n{table(rows, reference)}\n\n"
        f"The loader costs {cost:.1f} % on top of decode and crop: order, reads, batches. Our "
        f"pixels against torchvision's on PIL images at the same crops: PSNR {decibels:.1f} dB "
        f"(median), mean absolute difference {difference:.3f} of 255. The PIL rows end in "
        "normalised float32, ours in uint8, which is normalised on the device. Several crops of an "
        "image and smaller images change what is trained on: those rows are no like-for-like "
        "comparison."
    )
    shutil.rmtree(arguments.folder / "litdata-cache", ignore_errors=True)


if __name__ == "__main__":
    entry(main)
