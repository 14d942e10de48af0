#!/bin/sh
# SPDX-License-Identifier: MIT
#
# PEFT's LoRA-GA becomes plain LoRA without a word; the gradient is used up by the first adapter.
# Seen in PEFT 0.21.2.
#
# One expects: a config with init_lora_weights="lora_ga" gives a LoRA-GA start, or an error as CorDA's does ("please
#   run `preprocess_corda` first"). And an adapter added to the same preprocessed model gets the same kind of start.
# What happens: creating an adapter deletes the gradient that preprocess_loraga has stored. A second add_adapter with
#   the same config, or get_peft_model without preprocessing, gives A random, B = 0 and W unchanged. Nothing is
#   warned, and peft_config still says lora_ga: a comparison then lists plain LoRA under LoRA-GA's name.
# Instead: preprocess again before every adapter, and check that lora_B is not 0 after it.
set -eu
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/v"
"$d/v/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6 attrs==26.1.0
"$d/v/bin/python" - <<'PY'
import warnings

import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from torch import nn

torch.manual_seed(0)
x, y = torch.randn(64, 16), torch.randn(64, 16)

def config(start):
    return LoraConfig(r=2, target_modules=["0"], init_lora_weights=start,
                      lora_ga_config=LoraGAConfig() if start == "lora_ga" else None,
                      corda_config=CordaConfig() if start == "corda" else None)

print("torch", torch.__version__, "PEFT", peft.__version__)
base = nn.Sequential(nn.Linear(16, 16))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's note on backward hooks
    preprocess_loraga(base, config("lora_ga"), lambda: nn.functional.mse_loss(base(x), y).backward())
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = get_peft_model(base, config("lora_ga"), adapter_name="first")
    model.add_adapter("second", config("lora_ga"))
    bare = get_peft_model(nn.Sequential(nn.Linear(16, 16)), config("lora_ga"), adapter_name="bare")
norms = {}
for name, m in (("first", model), ("second", model), ("bare", bare)):
    norms[name] = m.base_model.model[0].lora_B[name].weight.norm().item()
    print(f"adapter {name!r}: |B| = {norms[name]:.4f}, init_lora_weights = {m.peft_config[name].init_lora_weights!r}")
print("warnings:", [str(w.message) for w in said])
try:
    get_peft_model(nn.Sequential(nn.Linear(16, 16)), config("corda"))
    raise SystemExit("CorDA without preprocessing: no error")
except ValueError as error:
    print("CorDA without preprocessing: ValueError:", str(error)[:80])
assert norms["first"] > 0 and norms["second"] == norms["bare"] == 0 and not said
PY
