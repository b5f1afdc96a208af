"""Rounding with error feedback: each column of a matrix takes up the error of the columns rounded before it.

So the product with typical activations changes least. Owns the algorithm, LDLQ, which gives the result of GPTQ without
an inverse. With the second moment of the activations H = X^T X = R R^T, R upper triangular, and U = R diag(R)^-1,
column k is rounded to q_k = Q(w_k + Sum_{i<k} (w_i - q_i) U_ik). The error of the product, tr((W - Q) H (W - Q)^T), is
then Sum_k R_kk^2 |rounding error of column k|^2: R_kk^2 are the weights with which the scale of a block is fitted.

Sources: Frantar et al., "GPTQ", arXiv 2210.17323, section 3.3 (blocks, damping); Chee et al., "QuIP", arXiv 2307.13304,
section 3 (LDLQ, and that both are the same). Knows no model.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from miniphi.checkpoint import Format
from miniphi.checkpoint.codebook import Codebook
from miniphi.errors import CheckpointError

__all__ = ["Feedback", "quantize_with_feedback"]

Floats = NDArray[np.float32]

SHRINKAGE = 0.1
"""How far H is taken towards its diagonal: what columns have in common on the calibration text is only partly so on
another. GPTQ adds a part of the mean diagonal instead, which drowns most columns where a few are very large."""

_UNUSED = 1e-6  # the least mean square of a column, in parts of the mean of all
_ROWS_PER_TASK = 1024  # rows do not influence each other; so many errors of one block fit the second-level cache


class Feedback:
    """The order of the columns and how each takes up errors: the same for all matrices with the same activations."""

    def __init__(self, moment: Floats, fmt: Format, *, shrinkage: float = SHRINKAGE) -> None:
        """Factor a second moment X^T X, float32 [columns, columns], for blocks of `fmt`.

        Raises CheckpointError if it is not finite.
        """
        if not np.all(np.isfinite(moment)):
            raise CheckpointError("the activations of the calibration text are not finite")
        self.format = fmt
        diagonal = moment.diagonal().astype(np.float64)
        self.blocks, self.within = _order(diagonal.reshape(-1, fmt.block_size))
        self.columns = (self.blocks[:, None] * fmt.block_size + self.within).ravel()
        mean = float(diagonal.mean()) or 1.0
        shrunk = moment[np.ix_(self.columns, self.columns)].astype(np.float64) * ((1 - shrinkage) / mean)
        # Columns that are never used still need a positive pivot.
        shrunk[np.diag_indices(len(shrunk))] = diagonal[self.columns] / mean + _UNUSED
        # The ordinary Cholesky factor is lower triangular; with rows and columns reversed, an upper one comes out.
        factor = np.linalg.cholesky(shrunk[::-1, ::-1])[::-1, ::-1]
        pivots = factor.diagonal()
        self.weights: Floats = (pivots**2).astype(np.float32)
        """[columns], in the order of rounding: what a squared rounding error of the column costs."""
        self.taken_up: Floats = np.ascontiguousarray((factor / pivots).T, dtype=np.float32)
        """U^T [columns, columns]: row k has the share of each earlier column's error that column k takes up."""


def _order(blocks: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the blocks in the order of rounding [blocks], and the order inside each of them [blocks, block_size].

    Columns that matter most come first, since later ones take up their error. A block has one scale, which is fitted
    when its turn comes, so its columns stay together.
    """
    order = np.argsort(-blocks.sum(axis=1), kind="stable")
    return order, np.argsort(-blocks, axis=1, kind="stable")[order]


def quantize_with_feedback(
    values: Floats, feedback: Feedback, *, num_threads: int = 1
) -> tuple[NDArray[np.uint8], Floats]:
    """Quantise a matrix [rows, columns]; return its raw rows, uint8 [rows, row_bytes], and the values they stand for.

    The result does not depend on the number of threads. Raises CheckpointError if a value is not finite.
    """
    if not np.all(np.isfinite(values)):
        raise CheckpointError("holds values that are not finite")
    book = Codebook(feedback.format)
    raw = np.empty((len(values), feedback.format.row_bytes(values.shape[1])), np.uint8)
    stored = np.empty_like(values)

    def quantize(start: int) -> None:
        rows = slice(start, start + _ROWS_PER_TASK)
        _quantize_rows(values[rows], feedback, book, raw[rows], stored[rows])

    with ThreadPoolExecutor(num_threads, thread_name_prefix="miniphi-quantize") as pool:
        list(pool.map(quantize, range(0, len(values), _ROWS_PER_TASK)))
    return raw, stored


def _quantize_rows(values: Floats, feedback: Feedback, book: Codebook, raw: NDArray[np.uint8], stored: Floats) -> None:
    """Fill `raw` and `stored` block after block. Arrays are [columns, rows] here: a column is contiguous."""
    size, num_rows = feedback.format.block_size, len(values)
    wanted = np.ascontiguousarray(values.T[feedback.columns])
    error = np.empty_like(wanted)
    raw_blocks = raw.reshape(num_rows, -1, feedback.format.block_bytes)
    for position, block in enumerate(feedback.blocks):
        start, stop = position * size, (position + 1) * size
        taken_up = feedback.taken_up[start:stop]
        corrected = wanted[start:stop] + taken_up[:, :start] @ error[:start]
        error[start:stop] = wanted[start:stop]
        weights = np.broadcast_to(feedback.weights[start:stop], (num_rows, size))
        scales = book.fit_scales(np.ascontiguousarray(corrected.T), weights)
        codes = _round_block(corrected, taken_up[:, start:stop], book, scales, error[start:stop])
        in_place = np.empty_like(codes)
        in_place[feedback.within[position]] = codes
        block_codes = np.ascontiguousarray(in_place.T)
        book.pack(block_codes, scales, raw_blocks[:, block])
        stored[:, block * size : (block + 1) * size] = book.decode(block_codes, scales)


def _round_block(
    corrected: Floats,
    taken_up: Floats,
    book: Codebook,
    scales: NDArray[np.float16],
    error: Floats,
) -> NDArray[np.uint8]:
    """Round the columns of one block one after the other, and return codes [block_size, rows].

    `error` holds the original columns, and is left with their errors.
    """
    wide = scales.astype(np.float32)
    inverse = np.where(wide == 0, np.float32(0), 1 / np.where(wide == 0, np.float32(1), wide))
    codes = np.empty(corrected.shape, np.uint8)
    for column in range(len(corrected)):
        target = corrected[column] + taken_up[column, :column] @ error[:column]
        codes[column] = book.nearest_codes(target * inverse)
        error[column] -= book.levels[codes[column]] * wide
    return codes
