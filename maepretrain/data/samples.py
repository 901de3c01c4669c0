"""From a position to a sample: where it lies, its bytes, its pixels."""

from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from maepretrain.data.batch import Batch
from maepretrain.data.decode import as_image, as_signal, decode, decode_array, decode_text
from maepretrain.data.errors import (
    CORRUPT_INPUT,
    KINDS,
    WRONG_LABEL_ERROR,
    ErrorRow,
    ShardError,
    Unreadable,
)
from maepretrain.data.order import Order
from maepretrain.data.shards.index import Shard
from maepretrain.data.shards.reader import Store
from maepretrain.data.shards.tar import INPUT_EXTENSIONS, NO_LABEL, WRONG_LABEL, Columns
from maepretrain.data.stores.remote import shown
from maepretrain.data.transforms import UNIFORMS, Augment, CentreCrop, SignalCrop
from maepretrain.randomness import uniform

# Of so many shards a reader keeps the columns: more than the streams of a batch touch at a time.
REMEMBERED_SHARDS = 256


class ShardIndex:
    """All samples of the shards, addressed by (shard, sample in it) or by one number.

    Numbers go through the shards in their order. Columns are read when first needed.

    Args:
        shards: the shards in the order of their patterns.
        chosen: int64 numbers of the samples to keep (a labelled fraction, say); None keeps all.
            Kept samples are numbered anew: by shard, then in the order given.

    Raises:
        ValueError: a chosen number that no sample has.
    """

    def __init__(self, shards: list[Shard], chosen: Int64[Tensor, "n"] | None = None) -> None:
        self.shards = shards
        self._columns: dict[int, Columns] = {}
        counts = torch.tensor([shard.samples for shard in shards], dtype=torch.int64)
        self._first_of_all = counts.cumsum(0) - counts
        self._chosen: Tensor | None = None
        if chosen is not None:
            _check_range(chosen, int(counts.sum()))
            shard = torch.searchsorted(counts.cumsum(0), chosen, right=True)
            self._chosen = chosen[shard.argsort(stable=True)]
            counts = torch.bincount(shard, minlength=len(shards))
        self.counts = counts
        self._ends = counts.cumsum(0)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def choose(self, numbers: Int64[Tensor, "n"]) -> "ShardIndex":
        """An index of some of these samples only."""
        if self._chosen is not None:
            _check_range(numbers, len(self))
            numbers = self._chosen[numbers]
        return ShardIndex(self.shards, numbers)

    def columns(self, shard: int) -> Columns:
        """The columns of a shard; the last ones are remembered."""
        if shard not in self._columns:
            if len(self._columns) >= REMEMBERED_SHARDS:
                del self._columns[next(iter(self._columns))]
            self._columns[shard] = self.shards[shard].columns()
        return self._columns[shard]

    def rows(self, shard: Int64[Tensor, "n"], sample: Int64[Tensor, "n"]) -> Int64[Tensor, "n"]:
        """The row of each sample in the columns of its shard."""
        if self._chosen is None:
            return sample
        return self._chosen[(self._ends - self.counts)[shard] + sample] - self._first_of_all[shard]

    def row(self, shard: int, sample: int) -> int:
        """The row of one sample in the columns of its shard."""
        if self._chosen is None:
            return sample
        return int(self.rows(torch.tensor([shard]), torch.tensor([sample])))

    def locate(self, number: Int64[Tensor, "n"]) -> tuple[Tensor, Tensor]:
        """(shard, sample in it) of samples numbered through all shards.

        Raises:
            IndexError: a number that no sample has.
        """
        if len(number) and not 0 <= int(number.min()) <= int(number.max()) < len(self):
            raise IndexError(f"sample {int(number.max())} is not one of {len(self)}")
        shard = torch.searchsorted(self._ends, number, right=True)
        return shard, number - (self._ends - self.counts)[shard]

    def labels(self) -> Int64[Tensor, "n"]:
        """The label of every sample in order, -1 where there is none, -2 where it is wrong."""
        labels = [torch.empty(0, dtype=torch.int64)]
        for s, count in enumerate(self.counts.tolist()):
            if count:
                column = torch.from_numpy(self.columns(s).label.astype("int64"))
                labels.append(column[self.rows(torch.full((count,), s), torch.arange(count))])
        return torch.cat(labels)

    def require_labels(self, purpose: str) -> Int64[Tensor, "n"]:
        """The labels, -2 where one is wrong: such a sample will be replaced.

        Raises:
            ValueError: a sample has none.
        """
        labels = self.labels()
        if not len(labels):
            raise ValueError(f"{purpose} needs samples with an index (not exact: false)")
        if (labels == NO_LABEL).any():
            raise ValueError(f"{purpose} needs a label for every sample; some have none")
        return labels


def _check_range(numbers: Int64[Tensor, "n"], samples: int) -> None:
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < samples:
        raise ValueError(
            f"chosen samples {int(numbers.min())}..{int(numbers.max())} must be in 0..{samples - 1}"
        )


@dataclass(frozen=True)
class Pixels:
    """From the bytes of an input to what the model is given.

    Args:
        channels: of the images or signals.
        augment: what is cut out of an image or a signal.
        exif: turn images as their orientation tag says.
        seed: of the crops.
        centred: signals are cut out at the centre.
    """

    channels: int
    augment: Augment | CentreCrop | SignalCrop
    exif: bool = False
    seed: int = 0
    centred: bool = False

    def numbers(self, position: Int64[Tensor, "b"]) -> tuple[Tensor, ...]:
        """The uniform numbers that decide about the crop at each position."""
        return uniform(self.seed, "crop", position, UNIFORMS).unbind()

    def decode(self, data: bytes, extension: str) -> Tensor:
        """Image (c, h, w) or signal (c, t); a text is a signal of one channel, its bytes.

        Raises:
            Unreadable: bytes that are none, or of another shape than asked for.
        """
        try:
            if not isinstance(self.augment, SignalCrop):
                if extension == "npy":
                    return as_image(decode_array(data), self.channels)
                return decode(data, self.channels, self.exif)
            if extension == "txt":
                return as_signal(decode_text(data, self.augment.length), self.channels)
            if extension != "npy":
                raise ValueError("it is an image; 1-D signals are .npy arrays or .txt")
            signal = as_signal(decode_array(data), self.channels)
            if signal.shape[1] < self.augment.length:
                raise ValueError(f"its length {signal.shape[1]} is below {self.augment.length}")
            return signal
        except ValueError as error:
            raise Unreadable(CORRUPT_INPUT, str(error)) from error

    def cut_out(self, decoded: Tensor, u: Tensor, instead: Augment | None = None) -> Tensor:
        """The crop that the numbers of a position choose; with `instead`, by that augmentation."""
        if isinstance(self.augment, CentreCrop):
            return self.augment(decoded)
        if isinstance(self.augment, SignalCrop):
            return self.augment(decoded, None if self.centred else u)
        return (instead or self.augment)(decoded, u)


class Samples(Dataset[Batch]):
    """Position -> sample.

    With an order, positions of the run and random crops; without, plain numbers and centre crops.
    A sample that cannot be read is replaced by the next readable one of its shard, and no other
    sample moves.

    Args:
        index: where the samples lie.
        channels: of the images or signals.
        augment: what is cut out of an image or a signal.
        order: maps positions to samples; None reads the samples in the order of the index.
        seed: of the crops.
        crops: positions that show the same image, one after the other, each with its own crop.
        exif: turn JPEG images as their orientation tag says.
        labelled: a sample with a wrong label counts as unreadable.
        store: reads the bytes.
        low_resolution: the crop, of a smaller size, of positions below `low_until`.
        low_until: a position at which a batch begins.
    """

    def __init__(
        self,
        index: ShardIndex,
        channels: int,
        augment: Augment | CentreCrop | SignalCrop,
        order: Order | None = None,
        seed: int = 0,
        crops: int = 1,
        exif: bool = False,
        labelled: bool = False,
        store: Store | None = None,
        low_resolution: Augment | None = None,
        low_until: int = 0,
    ) -> None:
        self.index = index
        self.order = order
        self.crops = crops
        self.labelled = labelled
        self.low_resolution = low_resolution
        self.low_until = low_until
        self.pixels = Pixels(channels, augment, exif, seed, centred=order is None)
        self.store = store or Store()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([position]).items()}

    def __getitems__(self, positions: list[int]) -> Batch:
        """A whole batch.

        `input` uint8 (b, c, h, w) or as the arrays are, `position` int64 (b,), `label` int64 (b,),
        -1 without one, `error` int64 (b, 2): the kind (0: none) and the row in its shard of the
        sample that was read instead.

        Raises:
            ShardError: a shard that holds no readable sample, or was changed since it was indexed.
        """
        position = torch.tensor(positions, dtype=torch.int64)
        inputs = []
        labels = []
        errors = []
        is_low = bool(positions) and positions[0] < self.low_until
        augment = self.low_resolution if is_low else None
        crops = zip(self._locate(position), self.pixels.numbers(position), strict=True)
        for (shard, sample), crops_of_image in groupby(crops, itemgetter(0)):
            decoded, label, error = self._read(shard, sample)
            for _, u in crops_of_image:
                inputs.append(self.pixels.cut_out(decoded, u, augment))
                labels.append(label)
                errors.append(error)
        return {
            "input": default_collate(inputs),  # in a loader process, straight to shared memory
            "position": position,
            "label": torch.tensor(labels),
            "error": torch.tensor(errors),
        }

    def _read(self, shard_number: int, sample: int) -> tuple[Tensor, int, tuple[int, int]]:
        """Pixels, label and error of a sample, or of the next one that can be read."""
        shard = self.index.shards[shard_number]
        columns = self.index.columns(shard_number)
        count = int(self.index.counts[shard_number])
        first_error: Unreadable | None = None
        for ahead in range(count):
            row = self.index.row(shard_number, (sample + ahead) % count)
            try:
                decoded = self._decode(shard, columns, row)
            except Unreadable as error:
                first_error = first_error or error
                continue
            kind = "" if first_error is None else first_error.kind
            label = max(NO_LABEL, int(columns.label[row]))
            return decoded, label, (KINDS.index(kind), row)
        reason = "" if first_error is None else f"{first_error.kind}, {first_error}"
        raise ShardError(f"{shown(shard.url)}: none of its {count} samples can be read: {reason}")

    def _decode(self, shard: Shard, columns: Columns, row: int) -> Tensor:
        if self.labelled and columns.label[row] == WRONG_LABEL:
            raise Unreadable(WRONG_LABEL_ERROR, "its label is no integer >= 0")
        data = self.store.read(shard, columns, row)
        return self.pixels.decode(data, INPUT_EXTENSIONS[columns.extension[row]])

    def pop_errors(self, batch: Batch) -> list[ErrorRow]:
        """The errors of a batch, with names; takes them out of it."""
        errors = batch.pop("error").cpu()
        replaced = errors[:, 0].nonzero().flatten()
        if not len(replaced):
            return []
        position = batch["position"].cpu()[replaced]
        return [
            self._error_row(kind, *located, at, row)
            for located, at, (kind, row) in zip(
                self._locate(position), position.tolist(), errors[replaced].tolist(), strict=True
            )
        ]

    def _error_row(
        self, kind: int, shard_number: int, sample: int, position: int, row: int
    ) -> ErrorRow:
        """The line about a sample in whose stead the sample of `row` was read."""
        keys = self.index.columns(shard_number).keys
        key = keys[self.index.row(shard_number, sample)]
        url = shown(self.index.shards[shard_number].url)
        return ErrorRow(KINDS[kind], url, key, position, replaced_by=keys[row])

    def names(self, positions: list[int]) -> list[tuple[str, str]]:
        """(shard, sample key) at these positions."""
        names = []
        for shard_number, sample in self._locate(torch.tensor(positions, dtype=torch.int64)):
            row = self.index.row(shard_number, sample)
            key = self.index.columns(shard_number).keys[row]
            names.append((self.index.shards[shard_number].url, key))
        return names

    def shards(self, positions: Int64[Tensor, "n"]) -> list[Shard]:
        """The shards in which these positions lie, each once, as they come."""
        numbers = dict.fromkeys(shard_number for shard_number, _ in self._locate(positions))
        return [self.index.shards[shard_number] for shard_number in numbers]

    def _locate(self, position: Int64[Tensor, "n"]) -> list[tuple[int, int]]:
        """(shard, sample in the shard) of each position."""
        locate = self.index.locate if self.order is None else self.order.locate
        shard, sample = locate(position // self.crops)
        return list(zip(shard.tolist(), sample.tolist(), strict=True))
