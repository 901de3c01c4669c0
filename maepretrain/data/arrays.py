"""Arrays in shards: the bytes of a `.npy` file as plain numbers. Nothing here imports torch."""

import io
import math

import numpy as np
from numpy.lib import format as npy

MAGIC = npy.MAGIC_PREFIX
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_array(data: bytes) -> np.ndarray:
    """The array of one `.npy` file: uint8, int64 or float32, writable, in C order.

    uint8 stays, booleans become 0 and 1 in uint8, other integers int64, floats float32. Either byte
    order and Fortran order are read; nothing is unpickled.

    Raises:
        ValueError: damaged bytes, too few or too many of them, no elements, another dtype (complex,
            object, structured, ...), NaN or infinity, or a number beyond the range of the result.
    """
    try:
        return _plain(_view(data))
    except ValueError as error:
        raise ValueError(f"cannot read the array: {error}") from error


def _view(data: bytes) -> np.ndarray:
    """The array as stored. numpy.load would allocate what a damaged header says, and unpickle."""
    file = io.BytesIO(data)
    try:
        shape, fortran, dtype = _HEADERS[npy.read_magic(file)](file)
    except Exception as error:  # numpy's parser raises anything, and names objects by their address
        raise ValueError("it has no header of a .npy file, version 1 or 2") from error
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise ValueError(f"dtype {dtype} is no boolean, integer or float of at most 64 bits")
    if not shape or min(shape) < 1:
        raise ValueError(f"shape {shape} must have axes, each of at least 1")
    start = file.tell()
    held, needed = len(data) - start, math.prod(shape) * dtype.itemsize
    if held != needed:
        raise ValueError(f"it holds {held} bytes of data, its header says {needed}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran else "C")


def _plain(array: np.ndarray) -> np.ndarray:
    small = array.dtype.kind == "b" or array.dtype == np.uint8
    wide = np.float32 if array.dtype.kind == "f" else np.int64
    with np.errstate(over="ignore"):
        plain = array.astype(np.uint8 if small else wide, order="C")
    if array.dtype.kind == "f" and not np.isfinite(plain).all():
        raise ValueError("it holds NaN, infinity or numbers beyond float32")
    if array.dtype.kind == "u" and plain.min() < 0:
        raise ValueError("it holds integers beyond int64")
    return plain
