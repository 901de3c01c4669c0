"""Masked tokens: BERT and the masked autoencoder on bytes of text, one trainer.

    python examples/text.py [--out text] [--library FOLDER] [--epochs N]

The text is the docstrings of Python's standard library; those of one module in ten are held out.
Prints the accuracy of masked held-out bytes of two models, mask tokens in the encoder (BERT) and in
a decoder (MAE), beside what the training text's counts guess for the same masks: the usual byte,
the usual byte after the left neighbour, and between both neighbours where they are visible; and
some held-out lines with holes, filled in. A quarter of an hour of one core; .590 and .567, counts
.154, .222 and .411.
"""

import argparse
import ast
import hashlib
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.data.decode import PADDING
from maepretrain.data.samples import Samples, ShardIndex
from maepretrain.data.shards.index import open_shards
from maepretrain.data.shards.sources import ImageFolder
from maepretrain.data.shards.write import write_shards
from maepretrain.data.transforms import SignalCrop
from maepretrain.workflows.pretrain import pretrain_command

MODELS = {"mask tokens in the encoder": "masked_bytes", "in the decoder": "mae_bytes"}
# Options of recipe/masked_bytes by which it becomes a masked autoencoder.
IN_DECODER = ["--model.depth", "2", "--model.decoder_depth", "1"]
IN_DECODER += ["--model.mask_tokens_in_encoder", "false"]
LENGTH = 64
# Held-out lines that are printed.
SHOWN = 4
# Folders of the standard library that are not part of it, or hold its tests.
PASSED_OVER = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

Guesses = dict[str, float]


def docstrings(library: Path) -> Iterator[tuple[str, str]]:
    """(module, docstring) of each module, class and function below a folder."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if PASSED_OVER & set(inside.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and samples of what is no Python
            continue
        module = inside.parts[0].removesuffix(".py")
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text:
                yield module, text


def is_held_out(module: str) -> bool:
    """One in ten, by name."""
    return hashlib.sha256(module.encode()).digest()[0] % 10 == 0


def write(library: Path, out: Path) -> None:
    """Shards train-*.tar and test-*.tar, one sample a docstring, each text once."""
    known: set[str] = set()
    for number, (module, text) in enumerate(docstrings(library)):
        if text not in known:
            folder = out / "texts" / ("test" if is_held_out(module) else "train") / module
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:05d}.txt").write_bytes(text.encode())
        known.add(text)
    for split in ("train", "test"):
        write_shards(ImageFolder(out / "texts" / split), out / "shards", split)


class Counts:
    """Bytes of a training text: how often, after which byte, and between which two."""

    def __init__(self, texts: list[bytes]) -> None:
        self.alone: Counter[int] = Counter()
        self.after: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self.before: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self.between: defaultdict[tuple[int, int], Counter[int]] = defaultdict(Counter)
        for text in texts:
            self.alone.update(text)
            for left, byte in pairwise(text):
                self.after[left][byte] += 1
                self.before[byte][left] += 1
            for left, byte, right in zip(text, text[1:], text[2:], strict=False):
                self.between[left, right][byte] += 1

    def guess(self, left: int | None, right: int | None) -> int:
        """The usual byte beside those neighbours that are known, or without those that never
        occurred."""
        choices = [self.alone]
        if right is not None:
            choices.append(self.before.get(right, Counter()))
        if left is not None:
            choices.append(self.after.get(left, Counter()))
        if left is not None and right is not None:
            choices.append(self.between.get((left, right), Counter()))
        return next(c for c in reversed(choices) if c).most_common(1)[0][0]


def with_holes(tokens: Tensor, places: Tensor) -> list[int | None]:
    """The bytes of one window up to its end, None where one is masked."""
    masked = set(places.tolist())
    ids = tokens[tokens != PADDING].tolist()
    return [None if i in masked else byte for i, byte in enumerate(ids)]


def baselines(counts: Counts, tokens: Tensor, places: Tensor) -> Guesses:
    """Share of the masked bytes that counts guess, of windows (n, t) and masked places (n, m)."""
    right: Counter[str] = Counter()
    asked = 0
    for window, hidden in zip(tokens, places, strict=True):
        seen = with_holes(window, hidden)
        for i, byte in enumerate(seen):
            if byte is not None:
                continue
            before = seen[i - 1] if i else None
            after = seen[i + 1] if i + 1 < len(seen) else None
            truth = int(window[i])
            asked += 1
            right["unigram"] += counts.guess(None, None) == truth
            right["bigram, left neighbour"] += counts.guess(before, None) == truth
            right["both neighbours"] += counts.guess(before, after) == truth
    return {name: number / asked for name, number in right.items()}


@torch.no_grad()
def filled(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Masked places of held-out windows, as validation masks them, and the likeliest bytes."""
    places = []
    likeliest = []
    for first in range(0, len(tokens), 256):
        part = tokens[first : first + 256]
        prediction = model.predict(part[:, None], torch.arange(first, first + len(part)))
        places.append(prediction.places)
        likeliest.append(prediction.logits.argmax(-1))
    return torch.cat(places), torch.cat(likeliest)


def accuracy(tokens: Tensor, places: Tensor, guesses: Tensor) -> float:
    """Share of the masked bytes, those after a text's end not counted."""
    truth = tokens.gather(1, places)
    return float((guesses == truth).sum() / (truth != PADDING).sum())


def as_line(values: list[int | None]) -> str:
    """Text in one line; a hole is an underscore."""
    line = bytes(95 if value is None else value for value in values)
    return line.decode(errors="replace").replace("\n", "|")


def show(tokens: Tensor, places: Tensor, guesses: dict[str, Tensor]) -> None:
    """Print full windows with holes, and each model's guesses there."""
    full = (tokens[:, -1] != PADDING).nonzero().flatten()
    for i in full[:SHOWN].tolist():
        print(f"\n{'holes':<27} {as_line(with_holes(tokens[i], places[i]))}")
        for name, guessed in guesses.items():
            filled_in = tokens[i].scatter(0, places[i], guessed[i])
            print(f"{name:<27} {as_line(filled_in.tolist())}")
        print(f"{'original':<27} {as_line(tokens[i].tolist())}")


def report(out: Path) -> None:
    """Print the table and some lines, of the runs and shards of a folder."""
    index = ShardIndex(open_shards(f"{out}/shards/test-*.tar"))
    held_out = Samples(index, 1, SignalCrop(LENGTH)).__getitems__(list(range(len(index))))
    tokens = held_out["input"][:, 0]
    texts = [path.read_bytes() for path in sorted((out / "texts/train").rglob("*.txt"))]
    rows: dict[str, float] = {}
    guesses: dict[str, Tensor] = {}
    places = torch.empty(0)
    for name, config in MODELS.items():
        model = cast(Any, load_encoder(str(out / config)).eval())
        places, guesses[name] = filled(model, tokens)
        rows[name] = accuracy(tokens, places, guesses[name])
    rows |= baselines(Counts(texts), tokens, places)
    print("accuracy of masked held-out bytes")
    for name, share in rows.items():
        print(f"{name:<27} {share:.3f}")
    show(tokens, places, guesses)


def main(argv: list[str] | None = None) -> int:
    """Train both models and print their table; 0 when both trainings came to their end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("text"), help="folder of what is made")
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--epochs", type=int, help="default: as the configs say")
    options = parser.parse_args(argv)
    if next(options.library.rglob("*.py"), None) is None:
        parser.error(f"--library {options.library} holds no Python files")
    shards = options.out / "shards"
    write(options.library, options.out)
    for config in MODELS.values():
        command = ["-c", "data/text", "-c", "recipe/masked_bytes"]
        command += IN_DECODER if config == "mae_bytes" else []
        command += ["--run", str(options.out / config), "--overwrite"]
        command += ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
        if options.epochs:
            command += ["--trainer.max_epochs", str(options.epochs)]
        code = pretrain_command(command)
        if code:
            return code
    report(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
