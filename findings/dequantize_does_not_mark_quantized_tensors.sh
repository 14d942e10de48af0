#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Every torch.Tensor has dequantize(), and on a plain one it converts to float32. Seen in torch 2.13.0, with
# torchao 0.18.0 and optimum-quanto 0.2.7.
#
# One expects: hasattr(weight, "dequantize") tells the weights of torchao and optimum-quanto, which are tensor
#   subclasses with this method, from plain ones; or the method of a plain tensor raises, or returns it as it is.
# What happens: it is always there. Quantized weights come back in the model's dtype, plain bfloat16 ones in float32.
#   float64 loses half its digits in silence, and int8 codes become floats without a scale.
# Instead: ask for the class, `type(weight) in (torch.Tensor, nn.Parameter)`, before dequantize().
set -eu
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/v"
"$d/v/bin/pip" install -q torch==2.13.0 torchao==0.18.0 optimum-quanto==0.2.7 numpy==2.4.6
"$d/v/bin/python" - 2>"$d/log" <<'PY' || { cat "$d/log"; exit 1; }
from importlib.metadata import version

import torch
from optimum.quanto import freeze, qint8, quantize
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

def quanto(model):
    quantize(model, weights=qint8)
    freeze(model)

print("torch", torch.__version__, *(f"{p} {version(p)}" for p in ("torchao", "optimum-quanto")))
for name, dtype, change, result in (
    ("torchao", torch.bfloat16, lambda m: quantize_(m, Int8WeightOnlyConfig()), torch.bfloat16),
    ("quanto", torch.bfloat16, quanto, torch.bfloat16),
    ("plain", torch.bfloat16, lambda m: None, torch.float32),
    ("plain", torch.float64, lambda m: None, torch.float32),
):
    model = nn.Sequential(nn.Linear(64, 64, dtype=dtype))
    change(model)
    weight = model[0].weight
    got = weight.dequantize().dtype
    print(f"{name:7} model in {dtype}: hasattr {hasattr(weight, 'dequantize')}, dequantize() gives {got}")
    assert hasattr(weight, "dequantize") and got == result
codes = torch.tensor([-3, 100], dtype=torch.int8)
print("plain   int8 codes:", codes.tolist(), "become", codes.dequantize())
assert torch.equal(codes.dequantize(), codes.float())
PY
