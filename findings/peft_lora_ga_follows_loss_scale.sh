#!/bin/sh
# SPDX-License-Identifier: MIT
#
# PEFT's LoRA-GA start is in units of the gradient: it changes with the scale of the loss. Seen in PEFT 0.21.2.
#
# One expects: LoRA-GA takes directions from the gradient, and its default "stable" scale takes the size from the
#   layer's width and gamma. In the reference code that PEFT's loraga.py names, A and B are singular vectors times one
#   number. So a loss that is summed rather than averaged, or multiplied by a constant, gives the same start.
# What happens: PEFT multiplies B (not A) by the gradient's singular values. With the loss times 1000, B is 1000
#   times larger; "unit" does the same. With a mean loss of small gradients, BA is close to 0.
# Instead: scale="weight_svd", which divides by the largest singular value again; or compare |s·BA| with |W|.
set -eu
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/v"
"$d/v/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
"$d/v/bin/python" -W ignore - <<'PY'
import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from torch import nn

def start(scale, factor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    x, y = torch.randn(256, 32), torch.randint(8, (256,))
    W = model[0].weight.detach().clone()
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights="lora_ga",
                        lora_ga_config=LoraGAConfig(scale=scale))
    preprocess_loraga(model, config, lambda: (factor * nn.functional.cross_entropy(model(x), y)).backward())
    layer = get_peft_model(model, config).base_model.model[0]
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    return A.norm().item(), B.norm().item(), ((B @ A).norm() / W.norm()).item()

print("torch", torch.__version__, "PEFT", peft.__version__)
for scale, follows in (("stable", True), ("unit", True), ("weight_svd", False)):
    results = [start(scale, factor) for factor in (1, 1000)]
    for factor, (a, b, share) in zip((1, 1000), results):
        print(f"scale={scale:10} loss times {factor:4}: |A| {a:.3f}  |B| {b:8.4f}  |BA| / |W| {share:.4f}")
    assert abs(results[1][0] / results[0][0] - 1) < 1e-3
    assert abs(results[1][1] / results[0][1] - (1000 if follows else 1)) < 0.01 * (1000 if follows else 1)
PY
