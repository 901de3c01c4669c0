"""Images in files of a compression model's own: `maepretrain codec encode|decode`.

A file is a header, the checksum of all else, and the payload: the symbols of the model, written by
a range coder (Martin 1979; the library constriction's) with the probabilities of the model's prior,
channel after channel. The header names the model by a hash of its weights and probabilities: those
are needed bit for bit. What is decoded is the model's own reconstruction, bit for bit on the same
machine; another one may round otherwise, and refuses the file where the probabilities differ.

Axes: b images (here one), c channels, h w sides, k channels of the code, i j its sides, s symbols.
"""

import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import constriction
import numpy as np
import torch
import yaml
from jaxtyping import Float, Float64, Int64, UInt8
from PIL import Image
from torch import Tensor

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.checkpoints.run_config import run_of
from maepretrain.compression.autoencoder import table_bits
from maepretrain.data.images import decode as decode_image
from maepretrain.data.normalise import Normalise
from maepretrain.files import replacing
from maepretrain.parsing import make_parser, parse

MAGIC, VERSION = b"\x8fMAE", 1
# Magic, version, iterations, channels, height, width, the model's hash, bytes of the payload.
HEADER = struct.Struct("<4sBBBxII8sI")
CHECKSUM = struct.Struct("<I")
# Its types are not told to a type checker.
_stream = cast(Any, constriction).stream


@runtime_checkable
class Coder(Protocol):
    """What a model offers that files can be written by."""

    stride: int
    iterations: int

    def symbols(
        self, images: Float[Tensor, "b c h w"], iterations: int
    ) -> Int64[Tensor, "b k i j"]: ...

    def probabilities(self, iterations: int) -> Float64[Tensor, "k s"]: ...

    def decode_symbols(self, symbols: Int64[Tensor, "b k i j"]) -> Float[Tensor, "b c h w"]: ...


class Encoded(NamedTuple):
    """A file, and what the model's prior says of its payload."""

    data: bytes
    estimated_bits: float


@dataclass(frozen=True)
class Codec:
    """A trained model that writes and reads files.

    Args:
        model: in evaluation mode, on the CPU.
        normalise: from pixels to what the model was trained on, and back.
        channels: of the images.
    """

    model: Coder
    normalise: Normalise
    channels: int

    @classmethod
    def load(cls, spec: str) -> "Codec":
        """The model of a run of pretraining.

        Raises:
            ValueError: no run, or one of a model that writes no files.
        """
        run = run_of(spec)
        model = cast(Any, load_encoder(spec)).eval()
        if not hasattr(model, "symbols"):
            raise ValueError(
                f"{spec} is a run of {type(model).__name__}, which writes no files: "
                "take one of ae/compression or ae/compression_residual"
            )
        assert run is not None, "only a run holds such a model"
        data = yaml.safe_load((run / "config.yaml").read_text())["data"]
        normalise = Normalise(tuple(data["mean"]), tuple(data["std"]))
        return cls(model, normalise, data["channels"])

    def fingerprint(self) -> bytes:
        """Eight bytes of a hash of all weights and of the probabilities made of them."""
        state = cast(Any, self.model).state_dict()
        parts = [*state.values(), self.model.probabilities(self.model.iterations)]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.cpu().contiguous().numpy().tobytes())
        return digest.digest()[:8]

    def encode(self, image: UInt8[Tensor, "c h w"], iterations: int | None = None) -> Encoded:
        """The file of an image.

        Args:
            image: of any size.
            iterations: of a residual coder: fewer are fewer bits. None takes all.

        Raises:
            ValueError: iterations that the model does not have, or other channels.
        """
        most = self.model.iterations
        iterations = most if iterations is None else iterations
        if not 1 <= iterations <= most:
            raise ValueError(f"iterations {iterations} must be 1 to {most}, which the model has")
        if len(image) != self.channels:
            raise ValueError(f"the model takes {self.channels} channels, not {len(image)}")
        symbols = self.model.symbols(self.normalise(image[None]), iterations)
        probabilities = self.model.probabilities(iterations)
        payload = write_symbols(symbols[0].numpy(), probabilities.numpy())
        height, width = image.shape[1:]
        sizes = (iterations, self.channels, height, width)
        header = HEADER.pack(MAGIC, VERSION, *sizes, self.fingerprint(), len(payload))
        checksum = CHECKSUM.pack(zlib.crc32(header + payload))
        return Encoded(header + checksum + payload, float(table_bits(symbols, probabilities)))

    def decode(self, data: bytes) -> Float[Tensor, "c h w"]:
        """The image of a file, in the model's normalised values.

        Raises:
            ValueError: no such file, a damaged one, or one of another model.
        """
        iterations, height, width, payload = self._read(data)
        probabilities = self.model.probabilities(iterations)
        sides = [-(-side // self.model.stride) for side in (height, width)]
        symbols = read_symbols(payload, probabilities.numpy(), (sides[0], sides[1]))
        images = self.model.decode_symbols(torch.from_numpy(symbols)[None])
        return images[0, :, :height, :width]

    def _read(self, data: bytes) -> tuple[int, int, int, bytes]:
        """Iterations, height, width and payload of a file that is whole and this model's."""
        if data[: len(MAGIC)] != MAGIC:
            raise ValueError("it is no file that maepretrain codec wrote")
        start = HEADER.size + CHECKSUM.size
        if len(data) < start:
            raise ValueError(f"it is cut off: {len(data)} bytes are less than its header")
        fields = HEADER.unpack_from(data)
        _, version, iterations, channels, height, width, fingerprint, length = fields
        if version != VERSION:
            raise ValueError(f"it is of version {version}; this maepretrain reads {VERSION}")
        payload = data[start:]
        if len(payload) != length:
            raise ValueError(f"it holds {len(payload)} bytes of payload, not {length}")
        if zlib.crc32(data[: HEADER.size] + payload) != CHECKSUM.unpack_from(data, HEADER.size)[0]:
            raise ValueError("it is damaged: its checksum is wrong")
        if fingerprint != self.fingerprint():
            raise ValueError(
                "it was written by another model, or on a machine that computes other probabilities"
            )
        assert channels == self.channels and min(height, width) > 0, "the checksum is right"
        return iterations, height, width, payload

    def pixels(self, image: Float[Tensor, "c h w"]) -> UInt8[Tensor, "c h w"]:
        """Normalised values as pixels."""
        return (self.normalise.undo(image[None])[0] * 255).round().byte()


def write_symbols(
    symbols: Int64[np.ndarray, "k i j"], probabilities: Float64[np.ndarray, "k s"]
) -> bytes:
    """Range-code each channel's symbols with its own distribution."""
    encoder = _stream.queue.RangeEncoder()
    for channel, p in zip(symbols, probabilities, strict=True):
        encoder.encode(channel.ravel().astype(np.int32), _distribution(p))
    return encoder.get_compressed().astype("<u4").tobytes()


def read_symbols(
    payload: bytes, probabilities: Float64[np.ndarray, "k s"], sides: tuple[int, int]
) -> Int64[np.ndarray, "k i j"]:
    """The symbols that `write_symbols` was given.

    Raises:
        ValueError: bytes that are not its.
    """
    if len(payload) % 4:
        raise ValueError(f"{len(payload)} bytes of payload are no whole words")
    words = np.frombuffer(payload, "<u4").astype(np.uint32)
    decoder = _stream.queue.RangeDecoder(words)
    try:
        read = [decoder.decode(_distribution(p), sides[0] * sides[1]) for p in probabilities]
    except AssertionError as error:  # how constriction says it
        raise ValueError(f"the payload cannot be decoded: {error}") from error
    return np.stack(read).astype(np.int64).reshape(len(read), *sides)


def _distribution(p: Float64[np.ndarray, "s"]) -> Any:
    """Rounded to 24 bits by constriction, and no symbol impossible."""
    return _stream.model.Categorical(p, perfect=False)


def psnr(a: UInt8[Tensor, "c h w"], b: UInt8[Tensor, "c h w"]) -> float:
    """Peak signal-to-noise ratio in dB of two images of equal size, over all values."""
    mse = float((a.double() - b.double()).square().mean())
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def encode(encoder: str, image: Path, out: Path, iterations: int | None = None) -> int:
    """Write an image into a file of the model's own, and say how large and how good it is.

    Args:
        encoder: the run folder of ae/compression or ae/compression_residual.
        image: a JPEG, PNG, WebP or anything else that PIL reads.
        out: file to write; it replaces an older one, but not the image.
        iterations: of a residual coder: fewer are fewer bits. Default all.

    Returns:
        0.

    Raises:
        ValueError: no such model, no image, or iterations that the model does not have.
    """
    _check_paths(image, out)
    codec = Codec.load(encoder)
    try:
        pixels = decode_image(image.read_bytes(), codec.channels, exif=True)
    except ValueError as error:
        raise ValueError(f"{image}: {error}") from error
    encoded = codec.encode(pixels, iterations)
    with replacing(out) as file:
        file.write(encoded.data)
    quality = psnr(pixels, codec.pixels(codec.decode(encoded.data)))
    places = pixels[0].numel()
    print(
        f"{out}: {len(encoded.data):,} bytes for {pixels.shape[2]} x {pixels.shape[1]} pixels, "
        f"{8 * len(encoded.data) / places:.3f} bits per pixel "
        f"(payload by the model {encoded.estimated_bits / places:.3f}), PSNR {quality:.2f} dB"
    )
    return 0


def decode(encoder: str, file: Path, out: Path) -> int:
    """Read a file that `encode` wrote, by the same model.

    Args:
        encoder: the run folder that it was written by.
        file: what `encode` wrote.
        out: PNG to write; it replaces an older one.

    Returns:
        0.

    Raises:
        ValueError: a damaged or foreign file, another model, or another suffix than .png.
    """
    _check_paths(file, out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out} must end in .png, which loses nothing more")
    codec = Codec.load(encoder)
    try:
        pixels = codec.pixels(codec.decode(file.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    array = pixels.movedim(0, -1).squeeze(-1).numpy()
    with replacing(out) as target:
        Image.fromarray(array).save(cast(Any, target), "PNG")
    print(f"{out}: {pixels.shape[2]} x {pixels.shape[1]} pixels")
    return 0


def _check_paths(source: Path, out: Path) -> None:
    """Before the model is loaded: that there is something to read and a place to write."""
    if not source.is_file():
        raise ValueError(f"there is no file {source}")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}")
    if out.exists() and out.samefile(source):
        raise ValueError(f"{out} would replace what is read")


def codec_command(verb: str, argv: list[str]) -> int:
    """The verbs `codec encode` and `codec decode`."""
    function, source = (encode, "image") if verb == "encode" else (decode, "file")
    parser = make_parser(f"codec {verb}", config=False)
    parser.add_argument(source, type=Path, help="what is read")
    parser.add_argument("out", type=Path, help="what is written")
    parser.add_function_arguments(function, skip={source, "out"})
    return function(**parse(parser, argv))
