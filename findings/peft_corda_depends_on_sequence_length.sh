#!/bin/sh
# SPDX-License-Identifier: MIT
#
# PEFT's CorDA start depends on how the calibration rows are cut into sequences. Seen in PEFT 0.21.2.
#
# One expects: CorDA reads the inputs' second moments, so that the same 512 rows give the same A and B, whether they
#   come as 64 sequences of 8 tokens or as 8 sequences of 64.
# What happens: preprocess_corda sums over a sequence's tokens, divides by the number of sequences, and the unit of
#   that matrix goes into the split: the product BA stays, but A shrinks and B grows with the root of the length.
#   The first update of BA differs, though model, data and product are the same.
# Also: the module imports `attr`, which PEFT does not declare: after a plain `pip install peft` it raises
#   ModuleNotFoundError until attrs is installed.
# Instead: install attrs, calibrate with the sequence length you compare at, or rescale A and B to equal norms.
set -eu
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/v"
"$d/v/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
if "$d/v/bin/python" -c "import peft.tuners.lora.corda" 2>"$d/log"; then exit 1; fi
tail -n 1 "$d/log"
grep -q "No module named 'attr'" "$d/log"
"$d/v/bin/pip" install -q attrs==26.1.0
"$d/v/bin/python" - <<'PY'
import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn

torch.manual_seed(0)
W, target = torch.randn(16, 16), torch.randn(512, 16)
rows = torch.randn(512, 16) @ torch.randn(16, 16)
i = rows.abs().argmax(1, keepdim=True)
rows = rows / rows.gather(1, i)  # each row's largest entry is 1: CorDA's division by the largest does nothing

def start(length):
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    model[0].weight.data.copy_(W)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig())
    preprocess_corda(model, config, lambda: [model(s[None]) for s in rows.split(length)])
    model = get_peft_model(model, config)
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    product = (B @ A).detach().clone()
    norms = A.norm().item(), B.norm().item()
    nn.functional.mse_loss(model(rows), target).backward()
    torch.optim.SGD([A, B], lr=1e-3).step()
    return product, *norms, (B @ A).detach() - product

print("torch", torch.__version__, "PEFT", peft.__version__)
(P8, a8, b8, step8), (P64, a64, b64, step64) = start(8), start(64)
for length, a, b, step in ((8, a8, b8, step8), (64, a64, b64, step64)):
    print(f"sequences of {length:2}: |A| {a:.3f}, |B| {b:6.3f}; one SGD update moves BA by {step.norm():.4f}")
print(f"the products differ by {(P8 - P64).norm() / P8.norm():.0e}, the A's by a factor of {a8 / a64:.3f} = √8")
assert torch.allclose(P8, P64, rtol=1e-3, atol=1e-3)
assert abs(a8 / a64 - 8**0.5) < 0.01 and abs(b64 / b8 - 8**0.5) < 0.01
assert (step8 - step64).norm() > 0.5 * step8.norm()
PY
