#!/bin/sh
# SPDX-License-Identifier: MIT
#
# PEFT puts the adapters of a model that accelerate has offloaded on the meta device, and the CPU model then computes
# with factors that do not exist. Seen in PEFT 0.21.2 with accelerate 1.15.0 and torch 2.13.0.
#
# One expects: adapters on the execution device (B = 0, so that outputs stay), or an error.
# What happens: an offloaded weight is a meta tensor between two calls; PEFT creates A and B where the weight is, so
#   their values are gone. accelerate's hook fills in the base weight, not the factors. With the execution device
#   "cpu" nothing is raised: torch's matrix product of a CPU tensor and a meta tensor returns a CPU tensor that
#   nobody has written to, while the elementwise product of the two raises. Only backward() notices.
# Instead: wrap first and offload then, or check that no parameter with requires_grad is_meta.
set -eu
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/v"
"$d/v/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
"$d/v/bin/python" - <<'PY'
import warnings

import accelerate
import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

config = LoraConfig(r=4, target_modules=["0", "2"])
torch.manual_seed(0)
x = torch.randn(8, 64)

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))

def unchanged(model):  # some passes over memory that has just held other numbers; B = 0 must not change an output
    for _ in range(5):
        [torch.full((8, n), 1e3) for n in (4, 64) for _ in range(100)]
        if not torch.allclose(model(x), expected, atol=1e-5):
            return False
    return True

print("torch", torch.__version__, "PEFT", peft.__version__, "accelerate", accelerate.__version__)
expected = build()(x).detach()
offload_first, wrap_first = build(), get_peft_model(build(), config)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    accelerate.disk_offload(offload_first, "one", execution_device=torch.device("cpu"))
    offload_first = get_peft_model(offload_first, config)
    output = offload_first(x)
factors = {p.device.type for n, p in offload_first.named_parameters() if "lora_" in n}
print(f"offloaded, then wrapped: factors on {factors}, output on {output.device}, {len(said)} warnings")
print("  outputs as before wrapping:", unchanged(offload_first))
try:
    output.sum().backward()
    raise SystemExit("backward: no error")
except RuntimeError as error:
    print("  backward:", error)
accelerate.disk_offload(wrap_first, "two", execution_device=torch.device("cpu"))
print("wrapped, then offloaded: outputs as before wrapping:", unchanged(wrap_first))
assert factors == {"meta"} and output.device.type == "cpu" and not said
assert not unchanged(offload_first) and unchanged(wrap_first)
PY
