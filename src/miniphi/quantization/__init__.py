"""Quantisation that looks at what a model does with text, instead of at its weights alone."""

from miniphi.quantization.calibrate import calibrate, sample_windows
from miniphi.quantization.error_feedback import Feedback, quantize_with_feedback

__all__ = ["Feedback", "calibrate", "quantize_with_feedback", "sample_windows"]
