"""From a checkpoint and a text to matrices in 4 bits that keep the model's products on that text.

Owns the walk through the model: at each product the second moment of the activations is taken, the matrices are
quantised with error feedback, and the text goes on through the quantised ones, so that later layers correct what
earlier ones lost. Only 4-bit formats gain by it; tensors that become something else are left to `quantize_checkpoint`.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from miniphi.checkpoint import Checkpoint, Format, QuantizationError
from miniphi.checkpoint.formats import LEVELS
from miniphi.checkpoint.quantize_model import Prepared
from miniphi.errors import CheckpointError, InvalidRequestError
from miniphi.kernels import default_num_threads
from miniphi.quantization.activations import Floats, run_layers
from miniphi.quantization.error_feedback import Feedback, quantize_with_feedback

__all__ = ["NUM_WINDOWS", "WINDOW", "calibrate", "sample_windows"]

WINDOW = 512
NUM_WINDOWS = 32
_COLUMNS_PER_TASK = 512
_SAMPLED_ROWS = 256


def sample_windows(
    token_ids: Sequence[int],
    *,
    num_windows: int = NUM_WINDOWS,
    window: int = WINDOW,
    bos_token_id: int | None = None,
) -> NDArray[np.int32]:
    """Return windows spread evenly over a text, int32 [windows, window]; fewer where the text is short.

    Each begins with `bos_token_id` if there is one. Raises InvalidRequestError if the text does not fill one window.
    """
    prefix = [] if bos_token_id is None else [bos_token_id]
    length = window - len(prefix)
    if len(token_ids) < length:
        raise InvalidRequestError(
            f"the calibration text has {len(token_ids):,} tokens; give at least {length:,}, better "
            f"{num_windows * window:,}"
        )
    count = min(num_windows, len(token_ids) // length)
    starts = np.linspace(0, len(token_ids) - length, count).astype(int)
    return np.array([[*prefix, *token_ids[start : start + length]] for start in starts], np.int32)


def calibrate(
    checkpoint: Checkpoint,
    token_ids: NDArray[np.int32],
    formats: Mapping[str, Format],
    *,
    num_threads: int | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> dict[str, Prepared]:
    """Return the matrices that `formats` gives a 4-bit format with a table of levels, quantised for this text.

    Shapes: token_ids int32 [sequences, length]. `on_progress` is called after each matrix with its name and the
    fraction of values done. Needs memory for the result and for the activations of one layer.

    Raises CheckpointError if a tensor or its activations hold values that are not finite.
    """
    wanted = {name: fmt for name, fmt in formats.items() if fmt in LEVELS and len(checkpoint.tensors[name].shape) > 1}
    num_threads = num_threads or default_num_threads()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="miniphi-calibrate") as pool:
        quantizer = _Quantizer(checkpoint, wanted, num_threads, pool, on_progress)
        run_layers(checkpoint, token_ids, quantizer.visit, pool=pool)
    return quantizer.prepared


class _Quantizer:
    """Quantises the matrices of each product on the way and computes the product with the result."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        formats: Mapping[str, Format],
        num_threads: int,
        pool: ThreadPoolExecutor,
        on_progress: Callable[[str, float], None] | None,
    ) -> None:
        self._tensors, self._formats = checkpoint.tensors, formats
        self._num_threads, self._pool = num_threads, pool
        self._on_progress = on_progress
        self._num_values = sum(int(np.prod(checkpoint.tensors[name].shape)) for name in formats)
        self._done = 0
        self.prepared: dict[str, Prepared] = {}

    def visit(self, names: tuple[str, ...], x: Floats) -> Floats:
        """See `activations.Visitor`."""
        moment = self._second_moment(x) if any(name in self._formats for name in names) else None
        feedbacks: dict[Format, Feedback] = {}
        products = []
        for name in names:
            weight = self._tensors[name].to_float32()
            if moment is not None and name in self._formats:
                weight = self._quantize(name, weight, moment, feedbacks)
            self._tensors[name].release_pages()
            products.append(self._product(x, weight))
        return np.concatenate(products, axis=-1)

    def _quantize(self, name: str, weight: Floats, moment: Floats, feedbacks: dict[Format, Feedback]) -> Floats:
        fmt = self._formats[name]
        try:
            if fmt not in feedbacks:
                feedbacks[fmt] = Feedback(moment, fmt)
            raw, stored = quantize_with_feedback(weight, feedbacks[fmt], num_threads=self._num_threads)
        except CheckpointError as problem:
            raise CheckpointError(f"{name}: {problem}") from None
        self.prepared[name] = Prepared(
            raw=raw,
            format=fmt,
            error=QuantizationError.between(weight, stored),
            output_error=_output_error(weight, stored, moment),
        )
        self._done += weight.size
        if self._on_progress is not None:
            self._on_progress(name, self._done / self._num_values)
        return stored

    def _second_moment(self, x: Floats) -> Floats:
        """Return X^T X / tokens, [K, K]; it is symmetric, so only blocks on and above the diagonal are computed."""
        num_tokens, num_columns = x.shape
        moment = np.empty((num_columns, num_columns), np.float32)

        def block(start: int) -> None:
            stop = min(start + _COLUMNS_PER_TASK, num_columns)
            part = x[:, start:stop].T @ x[:, start:]
            moment[start:stop, start:] = part
            moment[start:, start:stop] = part.T

        list(self._pool.map(block, range(0, num_columns, _COLUMNS_PER_TASK)))
        moment /= np.float32(num_tokens)
        return moment

    def _product(self, x: Floats, weight: Floats) -> Floats:
        """Return x W^T, the tokens divided among the threads: the command line runs BLAS on one."""
        parts = np.array_split(x, self._num_threads)
        return np.concatenate(list(self._pool.map(lambda part: part @ weight.T, parts)))


def _output_error(weight: Floats, stored: Floats, moment: Floats) -> float:
    """Return sqrt(tr(E H E^T) / tr(W H W^T)), E = W - W', on rows spread over the matrix: all of them cost too much."""
    step = max(1, len(weight) // _SAMPLED_ROWS)
    sample, difference = weight[::step], weight[::step] - stored[::step]
    before, lost = (float(np.sum(rows @ moment * rows, dtype=np.float64)) for rows in (sample, difference))
    return (lost / before) ** 0.5 if before else 0.0
