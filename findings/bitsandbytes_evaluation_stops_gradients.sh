#!/bin/sh
# SPDX-License-Identifier: MIT
#
# One evaluation makes a 4-bit layer of bitsandbytes stop gradients for good, on CPUs with AVX512-BF16.
# Seen in bitsandbytes 0.50.2. Where the CPU lacks avx512_bf16, the script says so and stops.
#
# One expects: eval() and a pass under no_grad, then train(): training goes on as before.
# What happens: the first pass in eval mode on an input without gradient repacks the weight for a kernel without a
#   backward. train() does not undo it: the inputs' gradient is None from then on, beside a general warning from
#   torch on the first backward. Beside a skip connection training goes on, with the wrong gradient. A layer with a
#   bias raises an error that does not name the cause. state_dict() packs the weight back, so a checkpoint after each
#   evaluation hides all this.
# Instead: call model.state_dict() after each evaluation, or evaluate in train mode with dropout 0.
set -eu
grep -q avx512_bf16 /proc/cpuinfo || { echo "skipped: this CPU has no avx512_bf16, so nothing is repacked"; exit 0; }
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/v"
"$d/v/bin/pip" install -q torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
"$d/v/bin/python" - 2>"$d/log" <<'PY' || { cat "$d/log"; exit 1; }
import warnings

import bitsandbytes as bnb
import torch
from torch import nn

torch.manual_seed(0)
print("torch", torch.__version__, "bitsandbytes", bnb.__version__)
lower, x = nn.Linear(64, 64), torch.randn(8, 64)

def stack(bias):
    quantized = bnb.nn.Linear4bit(64, 64, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    quantized.load_state_dict(nn.Linear(64, 64, bias=bias).state_dict())
    return nn.Sequential(lower, quantized.to("cpu").requires_grad_(False))  # moving the layer quantizes it

def evaluate(model):
    model.eval()
    with torch.no_grad():
        model(x)

def gradient(model, when):
    model.train()
    lower.zero_grad()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(x).square().sum().backward()
    norm = None if lower.weight.grad is None else lower.weight.grad.norm().item()
    print(f"{when}: |gradient| of the layer below = {norm}", *(str(w.message).split(".")[0] for w in said))
    return norm

model = stack(bias=False)
before = gradient(model, "before")
evaluate(model)
after = gradient(model, "after an evaluation")
model.state_dict()
again = gradient(model, "after state_dict()")
assert before > 0 and not after and abs(again / before - 1) < 0.05
model = stack(bias=True)
evaluate(model)
try:
    gradient(model, "with a bias")
    raise SystemExit("with a bias: no error")
except RuntimeError as error:
    print("with a bias, after an evaluation:", error)
PY
