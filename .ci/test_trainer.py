# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of this repository
"""What the page says about Hugging Face's Trainer, tied heads and weights of 4 bits.

Run in the project's root: `python -m pytest -q .ci/test_trainer.py`. It needs transformers and
accelerate, and for 4 bits bitsandbytes and PEFT.
"""

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lora_init import (
    add_lora,
    init_cntlora,
    init_hrp,
    init_lora_da,
    lora_layers,
    merge_lora,
)

hf = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
TARGETS = ["q_proj", "v_proj"]


def llama(**options):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **options))


def samples():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(64, (64, 16), generator=generator)
    return [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows
    ]


def loss_fn(model, batch):
    return model(**batch, num_items_in_batch=int(batch["attention_mask"].sum())).loss


def trainer(model, folder):
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return hf.Trainer(model, hf.TrainingArguments(folder, **options), train_dataset=samples())


def same_factors(model, other):
    pairs = zip(lora_layers(model).values(), lora_layers(other).values(), strict=True)
    return all(
        torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B) for a, b in pairs
    )


@pytest.mark.parametrize("rank_budget", [None, 9])
def test_trainer_resumes_exactly_from_a_checkpoint_of_the_whole_model(rank_budget, tmp_path):
    """add_lora with the same rank and alpha, no start; the old ranks by set_factors."""
    first = llama()
    add_lora(first, 2, alpha=4, targets=TARGETS)
    run = trainer(first, tmp_path)
    batches = list(itertools.islice(run.get_train_dataloader(), 3))
    init_cntlora(first, batches, loss_fn, rank_budget=rank_budget, step=0.1)
    run.train()
    checkpoint = tmp_path / "checkpoint-2"
    whole_model = sum(p.numel() * p.element_size() for p in first.parameters())
    assert (checkpoint / "model.safetensors").stat().st_size >= whole_model

    second = llama()
    adapters = add_lora(second, 2, alpha=4, targets=TARGETS)
    for name, old in lora_layers(first).items():
        adapters[name].set_factors(torch.zeros_like(old.lora_B), torch.zeros_like(old.lora_A))
    trainer(second, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert same_factors(first, second)


def test_an_adapted_head_that_is_tied_fails_at_trainers_first_checkpoint(tmp_path):
    """The page says so; if this no longer fails, the page may drop the sentence."""
    model = llama(tie_word_embeddings=True)
    assert "lm_head" in add_lora(model, 2)
    with pytest.raises(RuntimeError, match="shared tensors"):
        trainer(model, tmp_path).train()


def test_weights_of_4_bits_start_and_are_trained_through_peft(tmp_path):
    """Trainer refuses our adapters on them; what reads W is a TypeError."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    llama().save_pretrained(tmp_path / "base")
    options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    model = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=hf.BitsAndBytesConfig(**options),
        device_map={"": "cpu"},
    )
    adapters = add_lora(model, 4, alpha=8, targets=TARGETS)
    tokens = [torch.stack([row["input_ids"] for row in samples()[i : i + 4]]) for i in (0, 4, 8)]
    batches = [
        {"input_ids": rows, "labels": rows, "attention_mask": torch.ones_like(rows)}
        for rows in tokens
    ]
    init_hrp(model, batches, loss_fn)
    init_lora_da(model, batches, loss_fn, step=0.5)
    with pytest.raises(TypeError, match="q_proj.*Linear4bit"):
        init_cntlora(model, batches, loss_fn)
    with pytest.raises(TypeError, match="q_proj.*Linear4bit"):
        merge_lora(model)
    model.state_dict()  # on CPUs with AVX512-BF16 evaluation has packed the weights anew
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)

    expected = model(tokens[0]).logits
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter.base_layer)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(adapters))
    through_peft = peft.get_peft_model(model, config)
    for name, adapter in adapters.items():
        layer = through_peft.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(adapter.lora_A)
        layer.lora_B["default"].weight.data.copy_(adapter.lora_B)
    assert torch.allclose(through_peft(tokens[0]).logits, expected, atol=1e-5)
    trainer(through_peft, tmp_path).train()
    for name, adapter in adapters.items():
        trained = through_peft.base_model.model.get_submodule(name).lora_B["default"].weight
        assert not torch.equal(trained, adapter.lora_B)
