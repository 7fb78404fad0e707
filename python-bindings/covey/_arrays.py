"""Checks on the arrays a caller hands in. covey reads and writes numpy memory in place, so an array that would need a
copy (another dtype, order or shape) is refused with a sentence that names the argument; nothing is converted
silently."""
from __future__ import annotations

from typing import Any, Sequence

import numpy as np


def array(value: Any, argument: str, dtype: Any, shape: Sequence[int | None] | None = None, *,
          writable: bool = False, contiguous: bool = True) -> np.ndarray:
    """Returns `value` as it is if it is a numpy array of `dtype` (one or several) and of `shape` (None in a place: any
    number), C-contiguous and writable where asked for."""
    dtypes = [np.dtype(d) for d in (dtype if isinstance(dtype, (tuple, list)) else [dtype])]
    names = " or ".join(d.name for d in dtypes)
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{argument}: expected a numpy array of {names}, got {type(value).__name__}; covey works in "
                        f"the caller's memory, so make it with numpy.array(..., dtype=numpy.{dtypes[0].name})")
    if value.dtype not in dtypes:
        raise TypeError(f"{argument}: expected dtype {names}, got {value.dtype}; convert it with "
                        f"{argument}.astype(numpy.{dtypes[0].name})")
    if shape is not None:
        wanted = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"
        if value.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, value.shape)):
            raise ValueError(f"{argument}: expected shape {wanted}, got {value.shape}")
    if contiguous and not value.flags.c_contiguous:
        raise ValueError(f"{argument}: the array is not contiguous (strides {value.strides} for shape {value.shape}); "
                         f"pass numpy.ascontiguousarray({argument})")
    if writable and not value.flags.writeable:
        raise ValueError(f"{argument}: the array is read-only, and covey writes into it; pass a copy")
    return value


def address(value: np.ndarray | None) -> int | None:
    """Where the elements lie; None stays NULL."""
    return None if value is None else value.ctypes.data


def row_stride(value: np.ndarray, argument: str) -> int:
    """Checks that a two-dimensional float array has whole rows, one after the other, and returns their distance in
    floats. A slice of columns of a wider matrix is fine."""
    rows, columns = value.shape
    apart, between = value.strides if value.size else (columns * value.itemsize, value.itemsize)
    if rows == 1:
        apart = columns * value.itemsize  # numpy leaves the strides of single rows and columns open
    if (columns > 1 and between != value.itemsize) or apart < columns * value.itemsize or apart % value.itemsize:
        raise ValueError(f"{argument}: each row must lie in one piece and after the one before (strides "
                         f"{value.strides} for shape {value.shape}); pass numpy.ascontiguousarray({argument})")
    return apart // value.itemsize
