"""A random model of a given shape as OpenVINO IR, as its exporter would leave it: for measurements without a download.

    OPENVINO_PYTHON -m benchmarks.openvino_model SHAPE.json FOLDER

SHAPE.json is a config.json of a Phi-3- or Llama-shaped model. Layers are int4, symmetric, one scale per 128 weights
(64 or 32 where 128 does not divide a row); embeddings and lm_head are int8 with a scale and a zero point per row:
what `optimum-cli export openvino --weight-format int4 --sym --group-size 128` writes. Runs in OpenVINO's own
environment, so it imports nothing of miniphi. Peak memory is about the size of the file.

The attention mask lets everything through: GenAI replaces attention by PagedAttention, which is causal by itself and
drops the mask. So the model is for GenAI's pipelines only.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.op import Constant, Parameter

GROUP_SIZES = (128, 64, 32)
_INT4_SPREAD = 4.61  # standard deviation of -8 .. 7, all equally likely
_INT8_SPREAD = 73.9


class _Weights:
    """Random matrices; the same shape gives the same model."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = np.random.default_rng(seed)

    def int4(self, rows: int, columns: int) -> ov.Node:
        """Return a float matrix [rows, columns] that the runtime multiplies from its int4 codes."""
        size = next(size for size in GROUP_SIZES if columns % size == 0)
        shape = [rows, columns // size, size]
        packed = self._generator.integers(0, 256, rows * columns // 2, np.uint8)
        codes = Constant(ov.Tensor(packed, ov.Shape(shape), ov.Type.i4), shared_memory=False)
        scale = np.full((rows, columns // size, 1), columns**-0.5 / _INT4_SPREAD, np.float16)
        halves = ops.multiply(ops.convert(codes, "f16"), ops.constant(scale))
        return ops.convert(ops.reshape(halves, ops.constant([rows, columns]), special_zero=False), "f32")

    def int8(self, rows: int, columns: int) -> ov.Node:
        """Return a float matrix [rows, columns] from unsigned bytes with a zero point per row."""
        codes = ops.constant(self._generator.integers(0, 256, (rows, columns), np.uint8))
        zero = ops.constant(np.full((rows, 1), 128, np.uint8))
        scale = ops.constant(np.full((rows, 1), columns**-0.5 / _INT8_SPREAD, np.float16))
        centred = ops.subtract(ops.convert(codes, "f16"), ops.convert(zero, "f16"))
        return ops.convert(ops.multiply(centred, scale), "f32")


class _Builder:
    """The operations of one model. x is [batch, tokens, hidden] throughout."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.hidden = config["hidden_size"]
        self.num_heads, self.num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or self.hidden // self.num_heads
        self.weights = _Weights()
        self.sinks: list[ov.Node] = []

    def build(self) -> ov.Model:
        """Return the model with the inputs and the state that GenAI expects."""
        token_ids, mask, positions = (
            _parameter(name, "i64", [-1, -1]) for name in ("input_ids", "attention_mask", "position_ids")
        )
        self.beams = _parameter("beam_idx", "i32", [-1])
        self.batch = ops.gather(ops.shape_of(token_ids), ops.constant([0]), ops.constant(0))
        visible = ops.unsqueeze(ops.unsqueeze(ops.convert(mask, "f32"), ops.constant(1)), ops.constant(1))
        self.mask = ops.multiply(visible, ops.constant(np.float32(0)))
        self.cos, self.sin = self._rotation(positions)
        table = self.weights.int8(self.config["vocab_size"], self.hidden)
        x = ops.gather(table, ops.convert(token_ids, "i32"), ops.constant(0))
        for layer in range(self.config["num_hidden_layers"]):
            x = ops.add(x, self._attention(self._norm(x), layer))
            x = ops.add(x, self._mlp(self._norm(x)))
        head = table if self.config.get("tie_word_embeddings") else self.weights.int8(*_shape(table))
        logits = ops.result(_matmul(self._norm(x), head))
        logits.get_output_tensor(0).set_names({"logits"})
        return ov.Model([logits], self.sinks, [token_ids, mask, positions, self.beams])

    def _rotation(self, positions: ov.Node) -> tuple[ov.Node, ov.Node]:
        rotated = int(self.head_dim * self.config.get("partial_rotary_factor", 1.0))
        if rotated != self.head_dim:
            raise ValueError(f"{rotated} of {self.head_dim} values are rotated; this builder rotates all of them")
        frequencies = self.config["rope_theta"] ** -(np.arange(0, rotated, 2) / rotated)
        factors = (self.config.get("rope_scaling") or {}).get("short_factor", 1.0)
        inverse = ops.constant((frequencies / np.asarray(factors)).astype(np.float32).reshape(1, 1, -1))
        angles = ops.multiply(ops.convert(ops.unsqueeze(positions, ops.constant(-1)), "f32"), inverse)
        both = ops.concat([angles, angles], -1)
        heads = ops.constant(1)
        return ops.unsqueeze(ops.cos(both), heads), ops.unsqueeze(ops.sin(both), heads)

    def _norm(self, x: ov.Node) -> ov.Node:
        mean = ops.reduce_mean(ops.power(x, ops.constant(np.float32(2))), ops.constant([-1]), keep_dims=True)
        eps = ops.constant(np.float32(self.config["rms_norm_eps"]))
        inverse = ops.divide(ops.constant(np.float32(1)), ops.sqrt(ops.add(mean, eps)))
        return ops.multiply(ops.constant(np.ones((1, 1, self.hidden), np.float32)), ops.multiply(x, inverse))

    def _linear(self, x: ov.Node, *rows: int) -> ov.Node:
        """Multiply by one matrix of all these rows where the checkpoint has them fused, and by one each elsewhere."""
        columns = x.get_output_partial_shape(0)[-1].get_length()
        if self.config["model_type"] == "phi3" or len(rows) == 1:
            return _matmul(x, self.weights.int4(sum(rows), columns))
        return ops.concat([_matmul(x, self.weights.int4(count, columns)) for count in rows], -1)

    def _attention(self, x: ov.Node, layer: int) -> ov.Node:
        widths = [heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        qkv = ops.variadic_split(self._linear(x, *widths), ops.constant(-1), ops.constant(widths))
        q = self._rotate(self._heads(qkv.output(0), self.num_heads), self.num_heads)
        k = self._rotate(self._heads(qkv.output(1), self.num_kv_heads), self.num_kv_heads)
        v = self._heads(qkv.output(2), self.num_kv_heads)
        k, v = self._state(k, f"{layer}.key"), self._state(v, f"{layer}.value")
        attended = ops.scaled_dot_product_attention(q, self._repeat(k), self._repeat(v), self.mask, causal=False)
        merged = ops.transpose(attended, ops.constant([0, 2, 1, 3]))
        return self._linear(ops.reshape(merged, ops.constant([0, 0, widths[0]]), special_zero=True), self.hidden)

    def _heads(self, x: ov.Output, count: int) -> ov.Node:
        split = ops.reshape(x, ops.constant([0, 0, count, self.head_dim]), special_zero=True)
        return ops.transpose(split, ops.constant([0, 2, 1, 3]))

    def _rotate(self, x: ov.Node, count: int) -> ov.Node:
        half, end, step, axis = (ops.constant([n]) for n in (self.head_dim // 2, np.iinfo(np.int64).max, 1, 3))
        first = ops.slice(x, ops.constant([0]), half, step, axis)
        second = ops.slice(x, half, end, step, axis)
        turned = ops.concat([ops.multiply(second, ops.constant(np.float32(-1))), first], -1)
        return ops.add(ops.multiply(x, self.cos), ops.multiply(turned, self.sin))

    def _state(self, x: ov.Node, name: str) -> ov.Node:
        """Append x to a variable of all earlier tokens, [batch, kv heads, tokens, head_dim]."""
        shape = ops.concat([self.batch, ops.constant([self.num_kv_heads, 0, self.head_dim])], 0)
        empty = ops.broadcast(ops.constant(np.float32(0)), shape)
        variable = f"past_key_values.{name}present.{name}"
        past = ops.read_value(empty, variable, ov.Type.f32, ov.PartialShape([-1, self.num_kv_heads, -1, self.head_dim]))
        chosen = ops.gather(past, self.beams, ops.constant(0))
        together = ops.concat([chosen, x], 2)
        self.sinks.append(ops.assign(together, variable))
        return together

    def _repeat(self, x: ov.Node) -> ov.Node:
        """Give every query head its key or value head."""
        group = self.num_heads // self.num_kv_heads
        if group == 1:
            return x
        tokens = ops.gather(ops.shape_of(x), ops.constant([2]), ops.constant(0))
        shape = ops.concat(
            [self.batch, ops.constant([self.num_kv_heads, group]), tokens, ops.constant([self.head_dim])], 0
        )
        many = ops.broadcast(ops.unsqueeze(x, ops.constant(2)), shape, "BIDIRECTIONAL")
        return ops.reshape(many, ops.constant([0, self.num_heads, -1, self.head_dim]), special_zero=True)

    def _mlp(self, x: ov.Node) -> ov.Node:
        width = self.config["intermediate_size"]
        if self.config["model_type"] == "phi3":
            both = ops.variadic_split(self._linear(x, width, width), ops.constant(-1), ops.constant([width, width]))
            gate, up = both.output(0), both.output(1)
        else:
            gate, up = (self._linear(x, width).output(0) for _ in range(2))
        return self._linear(ops.multiply(up, ops.swish(gate)), self.hidden)


def _parameter(name: str, kind: str, shape: list[int]) -> Parameter:
    parameter = ops.parameter(shape, getattr(ov.Type, kind))
    parameter.set_friendly_name(name)  # GenAI looks for the inputs by either name
    parameter.get_output_tensor(0).set_names({name})
    return parameter


def _shape(node: ov.Node) -> list[int]:
    return list(node.get_output_shape(0))


def _matmul(x: ov.Node, matrix: ov.Node) -> ov.Node:
    return ops.matmul(x, matrix, False, True)


def main() -> None:
    """Write openvino_model.xml and openvino_model.bin."""
    shape, folder = Path(sys.argv[1]), Path(sys.argv[2])
    model = _Builder(json.loads(shape.read_text("utf-8"))).build()
    ov.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)


if __name__ == "__main__":
    main()
