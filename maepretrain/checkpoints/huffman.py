"""Canonical Huffman codes (Huffman 1952): of all prefix codes those of the fewest bits, each known
from its lengths alone.

A sequence of one kind of symbol takes no bits at all: its length is stored elsewhere.

The coder of constriction cannot write these bytes: its codes are not canonical, so that lengths,
which are all that a file holds, do not give them. Reading a file needs numpy alone.

Axes: k kinds of symbols, 0..k-1; n symbols.
"""

import heapq

import numpy as np
from jaxtyping import Int64, Integer

# So many bits can be read at any place of eight bytes. A longer code would need 10^12 symbols.
LONGEST = 57


def code_lengths(counts: Int64[np.ndarray, "k"]) -> Int64[np.ndarray, "k"]:
    """Bits of each symbol's code; 0 for symbols that do not occur, 1 where only one does.

    Args:
        counts: how often each symbol occurs.
    """
    lengths = np.zeros(len(counts), np.int64)
    occurring = np.flatnonzero(counts).tolist()
    if len(occurring) == 1:
        lengths[occurring] = 1
    # (count, its number as a tie-break, symbols below): the two rarest become one, a bit deeper.
    heap = [(int(counts[s]), s, [s]) for s in occurring]
    heapq.heapify(heap)
    for number in range(len(counts), len(counts) + len(heap) - 1):
        rare, _, left = heapq.heappop(heap)
        next_rare, _, right = heapq.heappop(heap)
        lengths[left + right] += 1
        heapq.heappush(heap, (rare + next_rare, number, left + right))
    return lengths


def canonical(
    lengths: Integer[np.ndarray, "k"],
) -> tuple[Int64[np.ndarray, "j"], Int64[np.ndarray, "j"]]:
    """The j symbols that have a code, in the order of their codes, and those codes as numbers: by
    length, then by symbol, each code one more than the last.

    Raises:
        ValueError: lengths of no complete prefix code (Kraft's sum is not 1).
    """
    order = np.lexsort((np.arange(len(lengths)), lengths))
    order = order[lengths[order] > 0]
    bits = lengths[order].astype(np.int64)
    if len(order) > 1 and (bits.max() > LONGEST or _kraft(bits) != 1 << LONGEST):
        raise ValueError("code lengths are of no complete prefix code")
    codes = np.zeros(len(order), np.int64)
    for i in range(1, len(order)):
        codes[i] = (codes[i - 1] + 1) << (bits[i] - bits[i - 1])
    return order, codes


def _kraft(bits: Int64[np.ndarray, "j"]) -> int:
    return sum(1 << (LONGEST - b) for b in bits.tolist())


def encode(symbols: Int64[np.ndarray, "n"], lengths: Integer[np.ndarray, "k"]) -> bytes:
    """The codes of the symbols one after another, filled up with zero bits to whole bytes.

    Raises:
        ValueError: a symbol without a code.
    """
    if len(symbols) and (symbols.max() >= len(lengths) or not lengths[symbols].all()):
        raise ValueError("a symbol has no code")
    order, codes = canonical(lengths)
    if len(order) < 2:
        return b""
    code = np.zeros(len(lengths), np.int64)
    code[order] = codes
    bits = lengths[symbols].astype(np.int64)
    # One entry a bit: how many bits of its code come after it.
    after = np.repeat(bits.cumsum(), bits) - np.arange(bits.sum()) - 1
    return np.packbits((np.repeat(code[symbols], bits) >> after & 1).astype(np.uint8)).tobytes()


def decode(
    stream: bytes, lengths: Integer[np.ndarray, "k"], count: int, piece: int = 1 << 20
) -> Int64[np.ndarray, "n"]:
    """`count` symbols out of what `encode` gave.

    At every bit of a piece of the stream the symbol that would begin there is looked up at once;
    what is left to do one by one is to go from code to code.

    Args:
        stream: codes.
        lengths: as `encode` had them.
        count: symbols.
        piece: bits looked at together.

    Raises:
        ValueError: lengths of no code, a stream that is too short or too long.
    """
    order, codes = canonical(lengths)
    if len(order) < 2:
        if stream or (count and not len(order)):
            raise ValueError(f"{len(stream)} bytes are no stream of {count} symbols of one kind")
        return np.full(count, order[0] if len(order) else 0, np.int64)
    bits = lengths[order].astype(np.int64)
    first = (codes << (LONGEST - bits)).astype(np.uint64)  # as the upper end of LONGEST bits
    padded = np.frombuffer(stream + bytes(8), np.uint8)
    end = len(stream) * 8
    position = 0
    decoded: list[np.ndarray] = []
    while count and position < end:
        begin = position - position % 8
        windows = _windows(padded, begin, min(piece, end - begin))
        which = np.searchsorted(first, windows, "right") - 1
        starts, following = _follow(bits[which].tolist(), position - begin, count)
        decoded.append(order[which[starts]])
        count -= len(starts)
        position = begin + following
    if count or (position + 7) // 8 != len(stream):
        raise ValueError(f"{len(stream)} bytes are no stream of so many symbols")
    return np.concatenate(decoded) if decoded else np.zeros(0, np.int64)


def _follow(steps: list[int], place: int, most: int) -> tuple[list[int], int]:
    """Go from code to code.

    Args:
        steps: bits of the code that would begin at each bit.
        place: where the first code begins.
        most: codes.

    Returns:
        Where codes begin, and where the one after them would.
    """
    starts: list[int] = []
    while place < len(steps) and len(starts) < most:
        starts.append(place)
        place += steps[place]
    return starts, place


def _windows(padded: np.ndarray, begin: int, size: int) -> np.ndarray:
    """The LONGEST bits from each of `size` bits on, as numbers; `begin` is a byte's first bit."""
    start = begin // 8
    n = -(-size // 8)
    words = np.zeros(n, np.uint64)
    for byte in range(8):
        words = words << np.uint64(8) | padded[start + byte : start + byte + n]
    shifts = np.arange(7, -1, -1, dtype=np.uint64)
    windows = words[:, None] >> shifts & np.uint64((1 << LONGEST) - 1)
    return windows.reshape(-1)[:size]
