#!/bin/sh
# SPDX-License-Identifier: MIT
#
# transformers' Trainer multiplies the gradient of T5, BART and BERT by gradient_accumulation_steps.
# Seen in transformers 5.24.0.
#
# One expects: one batch of 8 and 8 accumulated batches of 1 give the same loss and gradient (all rows are equally
#   long, dropout is off), as they do for Llama.
# What happens: Trainer leaves the division to a model whose forward() takes **kwargs (unless the model sets
#   accepts_loss_kwargs), and sends it num_items_in_batch. T5, BART and BERT take **kwargs but compute a plain mean, so
#   nobody divides: gradient and logged loss are 8 times too large. Adam and the default clipping at norm 1 hide it
#   from the update; plain SGD does not, and losses logged with different settings cannot be compared.
# Instead: set `trainer.model_accepts_loss_kwargs = False` before train(), or pass a `compute_loss_func` that
#   divides by num_items_in_batch.
set -eu
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/v"
"$d/v/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
HF_HUB_OFFLINE=1 "$d/v/bin/python" - 2>"$d/log" <<'PY' || { cat "$d/log"; exit 1; }
import accelerate
import torch
import transformers as t

LLAMA = lambda: t.LlamaForCausalLM(t.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))
T5 = lambda: t.T5ForConditionalGeneration(t.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1,
    num_heads=2, decoder_start_token_id=0, dropout_rate=0))
BART = lambda: t.BartForConditionalGeneration(t.BartConfig(vocab_size=64, d_model=16, encoder_layers=1,
    decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
    decoder_ffn_dim=16, dropout=0))
BERT = lambda: t.BertForMaskedLM(t.BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=16, hidden_dropout_prob=0, attention_probs_dropout_prob=0))

torch.manual_seed(0)
rows = [{"input_ids": row, "labels": row.clone()} for row in torch.randint(3, 60, (8, 10))]

def first_update(build, batch, accumulate, remedy=False):
    torch.manual_seed(0)
    args = t.TrainingArguments("out", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=1, logging_steps=1, max_grad_norm=1e9, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True)
    trainer = t.Trainer(build(), args, train_dataset=rows)
    trainer.remove_callback(t.PrinterCallback)
    if remedy:
        trainer.model_accepts_loss_kwargs = False
    trainer.train()
    return torch.tensor([trainer.state.log_history[0][key] for key in ("loss", "grad_norm")])

print("torch", torch.__version__, "transformers", t.__version__, "accelerate", accelerate.__version__)
for name, build, factor in (("Llama", LLAMA, 1), ("T5", T5, 8), ("BART", BART, 8), ("BERT", BERT, 8)):
    whole = first_update(build, 8, 1)
    ratio = first_update(build, 1, 8) / whole
    mended = first_update(build, 1, 8, remedy=True) / whole
    print(f"{name:5} 8 batches of 1 against 1 of 8: loss times {ratio[0]:.2f}, gradient norm times {ratio[1]:.2f};"
          f" with the remedy {mended[0]:.2f} and {mended[1]:.2f}")
    assert torch.allclose(ratio, torch.tensor([factor, factor]).float(), rtol=0.01)
    assert torch.allclose(mended, torch.ones(2), rtol=0.01)
PY
