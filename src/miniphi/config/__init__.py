"""The shape of a model: `ModelConfig`, read strictly from config.json or from GGUF metadata.

Owns every number that changes the model's maths, and the rule that a key we do not know is an error. Knows nothing of
tensors, files, tokenizers or chat.
"""

from miniphi.config.model import ModelConfig
from miniphi.config.rope import RopeScaling

__all__ = ["ModelConfig", "RopeScaling"]
