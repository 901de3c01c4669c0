"""JPEGs of real photographs, which scikit-image and scikit-learn ship."""

from pathlib import Path

import numpy as np
import skimage
from PIL import Image
from sklearn.datasets import load_sample_images

# Files come out about as large as ImageNet's (110 KB on average).
QUALITY = 97
PHOTOS = (
    *("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png"),
    *("rocket.jpg", "retina.jpg", "hubble_deep_field.jpg", "ihc.png"),
)


def photographs() -> list[Image.Image]:
    """Real colour photographs that two packages ship."""
    folder = Path(skimage.__file__).parent / "data"
    files = [Image.open(folder / name).convert("RGB") for name in PHOTOS]
    return files + [Image.fromarray(array) for array in load_sample_images().images]


def make_jpegs(folder: Path, number: int, size: tuple[int, int] = (500, 375)) -> None:
    """Crops of the photographs of this width and height, in ten classes: JPEG 4:2:0 as cameras
    write it. A folder that holds as many is left alone."""
    if folder.exists() and sum(1 for _ in folder.rglob("*.jpg")) == number:
        return
    random, photos = np.random.default_rng(0), photographs()
    for i in range(number):
        photo = photos[i % len(photos)]
        share = random.uniform(0.75, 1.0) * min(photo.width / 4, photo.height / 3)
        w, h = round(4 * share), round(3 * share)
        left = int(random.integers(0, photo.width - w + 1))
        top = int(random.integers(0, photo.height - h + 1))
        image = photo.resize(size, Image.Resampling.LANCZOS, (left, top, left + w, top + h))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = folder / str(i % 10) / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=QUALITY)
