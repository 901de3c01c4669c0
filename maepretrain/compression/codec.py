"""`maepretrain codec encode|decode`: an image in a small file that a compression model writes.

A file is a header, the checksum of all else, and the payload: the symbols of the model, written by
a range coder (Martin 1979; that of the library constriction, which the extra `compression`
installs) with the probabilities of the model's prior, channel after channel. The header names the
model by a hash of its weights and probabilities: those are needed bit for bit. The decoded image is
the model's own reconstruction, bit for bit on the same machine; another machine may round
otherwise, and refuses the file where the probabilities differ.

Axes: b images (here one), c channels, h w sides, k channels of the code, i j its sides, s symbols.
"""

import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
import yaml
from jaxtyping import Float, Float64, Int64, UInt8
from PIL import Image
from torch import Tensor

from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.checkpoints.run_config import run_of
from maepretrain.compression.autoencoder import table_bits
from maepretrain.data.decode import decode as decode_image
from maepretrain.data.normalise import Normalise
from maepretrain.files import replacing
from maepretrain.parsing.parser import make_parser, parse

MAGIC, VERSION = b"\x8fMAE", 1
# Magic, version, iterations, channels, height, width, the model's hash, bytes of the payload.
HEADER = struct.Struct("<4sBBBxII8sI")
CHECKSUM = struct.Struct("<I")


@runtime_checkable
class SymbolModel(Protocol):
    """A model that turns images into symbols, and knows the probabilities of these."""

    stride: int
    iterations: int

    def symbols(
        self, images: Float[Tensor, "b c h w"], iterations: int
    ) -> Int64[Tensor, "b k i j"]: ...

    def probabilities(self, iterations: int) -> Float64[Tensor, "k s"]: ...

    def decode_symbols(self, symbols: Int64[Tensor, "b k i j"]) -> Float[Tensor, "b c h w"]: ...


class Encoded(NamedTuple):
    """The bytes of a file, and the length of its payload by the model's prior."""

    data: bytes
    estimated_bits: float


class _Header(NamedTuple):
    """The fields of a file's header, in their order."""

    magic: bytes
    version: int
    iterations: int
    channels: int
    height: int
    width: int
    fingerprint: bytes
    payload_bytes: int


@dataclass(frozen=True)
class Codec:
    """A trained model that writes and reads files.

    Args:
        model: in evaluation mode, on the CPU.
        normalise: from pixels to what the model was trained on, and back.
        channels: of the images.
    """

    model: SymbolModel
    normalise: Normalise
    channels: int

    @classmethod
    def load(cls, spec: str) -> "Codec":
        """The model of a run of pretraining.

        Raises:
            ValueError: constriction is not installed, no run, or one of a model that writes no
                files.
        """
        _constriction()  # before the model is read
        run = run_of(spec)
        model = cast(Any, load_encoder(spec)).eval()
        if not isinstance(model, SymbolModel):
            raise ValueError(
                f"{spec} is a run of {type(model).__name__}, which writes no files: "
                "take one of recipe/compression or recipe/compression_residual"
            )
        assert run is not None, "only a run holds such a model"
        data = yaml.safe_load((run / "config.yaml").read_text())["data"]
        normalise = Normalise(tuple(data["mean"]), tuple(data["std"]))
        return cls(model, normalise, data["channels"])

    def fingerprint(self) -> bytes:
        """Eight bytes of a hash of all weights and of the probabilities made of them."""
        state = cast(Any, self.model).state_dict()
        probabilities = self.model.probabilities(self.model.iterations)
        digest = hashlib.sha256()
        for tensor in [*state.values(), probabilities]:
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.digest()[:8]

    def encode(self, image: UInt8[Tensor, "c h w"], iterations: int | None = None) -> Encoded:
        """The file of an image.

        Args:
            image: of any size.
            iterations: of a residual coder; fewer make a smaller file. None takes all.

        Raises:
            ValueError: iterations that the model does not have, or other channels.
        """
        most = self.model.iterations
        if iterations is None:
            iterations = most
        if not 1 <= iterations <= most:
            raise ValueError(f"iterations {iterations} must be 1 to {most}, which the model has")
        if len(image) != self.channels:
            raise ValueError(f"the model takes {self.channels} channels, not {len(image)}")
        symbols = self.model.symbols(self.normalise(image[None]), iterations)
        probabilities = self.model.probabilities(iterations)
        payload = write_symbols(symbols[0].numpy(), probabilities.numpy())
        height, width = image.shape[1:]
        fields = _Header(
            MAGIC,
            VERSION,
            iterations,
            self.channels,
            height,
            width,
            self.fingerprint(),
            len(payload),
        )
        header = HEADER.pack(*fields)
        checksum = CHECKSUM.pack(zlib.crc32(header + payload))
        return Encoded(header + checksum + payload, float(table_bits(symbols, probabilities)))

    def decode(self, data: bytes) -> Float[Tensor, "c h w"]:
        """The image of a file, in the model's normalised values.

        Raises:
            ValueError: no such file, a damaged one, or one of another model.
        """
        header, payload = self._read(data)
        probabilities = self.model.probabilities(header.iterations)
        rows = math.ceil(header.height / self.model.stride)
        columns = math.ceil(header.width / self.model.stride)
        symbols = read_symbols(payload, probabilities.numpy(), (rows, columns))
        images = self.model.decode_symbols(torch.from_numpy(symbols)[None])
        return images[0, :, : header.height, : header.width]

    def _read(self, data: bytes) -> tuple[_Header, bytes]:
        """Header and payload of a file that is whole and this model's."""
        header, payload = _split(data)
        if header.fingerprint != self.fingerprint():
            raise ValueError(
                "it was written by another model, or on a machine that computes other probabilities"
            )
        assert header.channels == self.channels, "the checksum is right"
        assert min(header.height, header.width) > 0, "the checksum is right"
        return header, payload

    def pixels(self, image: Float[Tensor, "c h w"]) -> UInt8[Tensor, "c h w"]:
        """Normalised values as pixels."""
        return (self.normalise.undo(image[None])[0] * 255).round().byte()


def _split(data: bytes) -> tuple[_Header, bytes]:
    """Header and payload of a whole file of any model.

    Raises:
        ValueError: another or a damaged file.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError("it is no file that maepretrain codec wrote")
    start = HEADER.size + CHECKSUM.size
    if len(data) < start:
        raise ValueError(f"it is cut off: {len(data)} bytes are less than its header")
    header = _Header(*HEADER.unpack_from(data))
    if header.version != VERSION:
        raise ValueError(f"it is of version {header.version}; this maepretrain reads {VERSION}")
    payload = data[start:]
    if len(payload) != header.payload_bytes:
        raise ValueError(f"it holds {len(payload)} bytes of payload, not {header.payload_bytes}")
    (checksum,) = CHECKSUM.unpack_from(data, HEADER.size)
    if zlib.crc32(data[: HEADER.size] + payload) != checksum:
        raise ValueError("it is damaged: its checksum is wrong")
    return header, payload


def write_symbols(
    symbols: Int64[np.ndarray, "k i j"], probabilities: Float64[np.ndarray, "k s"]
) -> bytes:
    """Range-code each channel's symbols with its own distribution."""
    encoder = _constriction().stream.queue.RangeEncoder()
    for channel, p in zip(symbols, probabilities, strict=True):
        encoder.encode(channel.ravel().astype(np.int32), _distribution(p))
    return encoder.get_compressed().astype("<u4").tobytes()


def read_symbols(
    payload: bytes, probabilities: Float64[np.ndarray, "k s"], sides: tuple[int, int]
) -> Int64[np.ndarray, "k i j"]:
    """The symbols in a payload of `write_symbols`.

    Raises:
        ValueError: another payload.
    """
    if len(payload) % 4:
        raise ValueError(f"{len(payload)} bytes of payload are no whole words")
    words = np.frombuffer(payload, "<u4").astype(np.uint32)
    decoder = _constriction().stream.queue.RangeDecoder(words)
    try:
        read = [decoder.decode(_distribution(p), sides[0] * sides[1]) for p in probabilities]
    except AssertionError as error:  # constriction's own kind
        raise ValueError(f"the payload cannot be decoded: {error}") from error
    return np.stack(read).astype(np.int64).reshape(len(read), *sides)


def _distribution(p: Float64[np.ndarray, "s"]) -> Any:
    """Rounded to 24 bits by constriction, and no symbol impossible."""
    return _constriction().stream.model.Categorical(p, perfect=False)


def _constriction() -> Any:
    """The library of the range coder, which is optional.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import constriction
    except ModuleNotFoundError as error:
        raise ValueError(
            "codec needs constriction: pip install 'maepretrain[compression]'"
        ) from error
    return constriction


def psnr(a: UInt8[Tensor, "c h w"], b: UInt8[Tensor, "c h w"]) -> float:
    """Peak signal-to-noise ratio in dB of two images of equal size, over all values."""
    mse = float((a.double() - b.double()).square().mean())
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def encode(encoder: str, image: Path, out: Path, iterations: int | None = None) -> int:
    """Write an image into a small file, and print its size and quality.

    Args:
        encoder: the run folder of recipe/compression or recipe/compression_residual.
        image: a JPEG, PNG, WebP or anything else that PIL reads.
        out: file to write; it replaces an older one, but not the image.
        iterations: of a residual coder; fewer make a smaller file. Default all.

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
    height, width = pixels.shape[1:]
    print(
        f"{out}: {len(encoded.data):,} bytes for {width} x {height} pixels, "
        f"{8 * len(encoded.data) / (height * width):.3f} bits per pixel "
        f"(payload by the model {encoded.estimated_bits / (height * width):.3f}), "
        f"PSNR {quality:.2f} dB"
    )
    return 0


def decode(encoder: str, file: Path, out: Path) -> int:
    """Read a file that `encode` wrote, by the same model.

    Args:
        encoder: the run folder that it was written by.
        file: a file of `encode`.
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
    """Refuse, before the model is read, a missing source and a folder that is not there."""
    if not source.is_file():
        raise ValueError(f"there is no file {source}")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}")
    if out.exists() and out.samefile(source):
        raise ValueError(f"{out} would replace what is read")


def codec_command(verb: str, argv: list[str]) -> int:
    """The verbs `codec encode` and `codec decode`."""
    if verb == "encode":
        function, source = encode, "image"
    else:
        function, source = decode, "file"
    parser = make_parser(f"codec {verb}", config=False)
    parser.add_argument(source, type=Path, help="file to read")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_function_arguments(function, skip={source, "out"})
    return function(**parse(parser, argv))
