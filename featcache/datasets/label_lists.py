"""Class indices as the Arrow lists that a manifest keeps."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def one_or_none(labels: npt.NDArray[np.int64]) -> pa.Array:
    """(N,) lists with each row's class; empty where the index is negative."""
    offsets = np.concatenate([[0], np.cumsum(labels >= 0)])
    values = pa.array(labels[labels >= 0], pa.int32())
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)
