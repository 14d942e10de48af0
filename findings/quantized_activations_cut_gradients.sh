#!/bin/sh
# SPDX-License-Identifier: MIT
#
# A frozen layer whose activations are quantized on the fly passes no gradient back.
# Seen in compressed-tensors 0.20.1 and torchao 0.18.0.
#
# One expects: adapters can be trained below a frozen quantized layer, as they can below 4-bit layers of
#   bitsandbytes and weight-only int8 layers: the gradient goes through the dequantized weight.
# What happens: with dynamic activations (compressed-tensors' FP8 and W8A8 schemes, torchao's
#   Int8DynamicActivationInt8WeightConfig) the output does not require a gradient though the input does. In a
#   plain stack backward() then raises; beside a skip connection, as in every transformer, nothing is raised, and
#   the layers below train on the gradient of the skip path alone.
# Instead: train on the unquantized or weight-only model, or check `layer(x).requires_grad` for each layer first.
set -eu
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/v"
"$d/v/bin/pip" install -q torch==2.13.0 torchao==0.18.0 compressed-tensors==0.20.1 transformers==5.24.0 numpy==2.4.6
"$d/v/bin/python" - 2>"$d/log" <<'PY' || { cat "$d/log"; exit 1; }
from importlib.metadata import version

import torch
from compressed_tensors.quantization import (QuantizationArgs, QuantizationConfig, QuantizationScheme,
                                             QuantizationStatus, apply_quantization_config)
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

def compressed(kind, largest, dynamic):
    def quantize(layer):
        weights = QuantizationArgs(num_bits=8, type=kind, strategy="channel")
        inputs = QuantizationArgs(num_bits=8, type=kind, strategy="token", dynamic=True) if dynamic else None
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
        apply_quantization_config(nn.Sequential(layer), QuantizationConfig(config_groups={"all": scheme}))
        layer.weight_scale.data.copy_(layer.weight.abs().amax(1, keepdim=True) / largest)
        layer.quantization_status = QuantizationStatus.FROZEN
    return quantize

print("torch", torch.__version__, *(f"{p} {version(p)}" for p in ("compressed-tensors", "torchao")))
for name, dynamic, quantize in (
    ("compressed-tensors, FP8 weights only   ", False, compressed("float", 448, False)),
    ("compressed-tensors, FP8, dynamic inputs", True, compressed("float", 448, True)),
    ("compressed-tensors, W8A8, dynamic      ", True, compressed("int", 127, True)),
    ("torchao, int8 weights only             ", False, lambda m: quantize_(m, Int8WeightOnlyConfig())),
    ("torchao, int8, dynamic inputs          ", True, lambda m: quantize_(m, Int8DynamicActivationInt8WeightConfig())),
):
    torch.manual_seed(0)
    lower, upper = nn.Linear(32, 32), nn.Linear(32, 32).requires_grad_(False)  # one trains, one is frozen
    x, c = torch.randn(4, 32), torch.randn(4, 32)

    def gradient():  # of Σ c·(h + upper(h)), with a skip connection around `upper`
        lower.zero_grad()
        h = lower(x)
        ((h + upper(h)) * c).sum().backward()
        return lower.weight.grad.clone()

    exact = gradient()
    quantize(upper)
    got, skip_alone, passes = gradient(), c.T @ x, upper(lower(x)).requires_grad
    error = ((got - exact).norm() / exact.norm()).item()
    print(f"{name} output requires grad: {passes!s:5}  gradient below is off by {error:.0%}")
    assert passes is not dynamic
    assert torch.allclose(got, skip_alone, atol=1e-5) if dynamic else error < 0.05
PY
