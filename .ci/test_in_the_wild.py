# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of this repository
"""`lora_init.py` where its users are: the page's own code, other people's models and libraries.

Run in the project's root: `python -m pytest -q .ci/test_in_the_wild.py`. A test whose library is
not installed is skipped.
"""

import copy
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import test_lora_init
from lora_init import (
    LoRALinear,
    add_lora,
    init_cntlora,
    init_hrp,
    init_lora_da,
    lora_layers,
    merge_lora,
)
from test_lora_init import collect, mean_loss, near

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------------- other people's models


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
TOKENS = torch.arange(1, 22).view(3, 7)


def hf_loss(model, batch):
    return model.train()(**batch).loss  # no dropout; in eval mode there are no checkpoints


def hugging_face(name, kind, targets, **sizes):
    hf = pytest.importorskip("transformers")
    config = getattr(hf, f"{name}Config")(vocab_size=64, **sizes)
    model = getattr(hf, f"{name}For{kind}")(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, targets, {"input_ids": TOKENS, "labels": TOKENS}, hf_loss


def llama():
    """Its head shares its weight with the embedding."""
    targets = ["q_proj", "down_proj", "lm_head"]
    return hugging_face("Llama", "CausalLM", targets, tie_word_embeddings=True, **SIZES)


def half_llama():
    model, *others = llama()
    return model.bfloat16(), *others


def bert():
    no_dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    return hugging_face("Bert", "MaskedLM", ["query", "output.dense"], **no_dropout, **SIZES)


def t5():
    """It reads wo.weight.dtype."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    no_dropout = {"dropout_rate": 0, "decoder_start_token_id": 0}
    targets = ["q", "v", "wi", "wo"]
    return hugging_face("T5", "ConditionalGeneration", targets, **no_dropout, **sizes)


class Vision(nn.Module):
    """Outputs changed in place, through a view, too; a layer that computes its weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.qkv = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))

    def forward(self, x):
        h = self.qkv(self.embed(x).tanh())
        h[..., :4] *= 0.3
        return self.head(self.mlp(h))


def vision():
    batch = (torch.randn(4, 5, 3), torch.randint(3, (4, 5)))
    return Vision(), ["qkv", "0", "head"], batch, mean_loss


def eight_bit():
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    batch = (torch.randn(32, 64), torch.randint(3, (32,)))
    return model, ["0", "2"], batch, mean_loss


def quantized(linear):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(
    ("build", "rounding"),
    [
        (llama, 1e-4),
        (half_llama, 0.05),
        (bert, 1e-4),
        (t5, 1e-4),
        (vision, 1e-4),
        (eight_bit, 0.05),
    ],
)
def test_other_peoples_models_start_and_merge(build, rounding):
    """G = ∂loss/∂W; B = 0 keeps the function; the other starts lower the loss; merging keeps it."""
    torch.manual_seed(0)
    model, targets, batch, loss_fn = build()

    def loss():
        return loss_fn(model, batch).item()

    before = loss()
    if build is eight_bit:
        model[0] = quantized(model[0])
    adapters = add_lora(model, 2, alpha=4, targets=targets)
    statistics = collect(model, [batch], loss_fn)
    for name, layer in adapters.items():
        weight = layer.base_layer.weight
        quantized_or_computed = weight.dtype == torch.int8 or not isinstance(weight, nn.Parameter)
        if not quantized_or_computed and name != "lm_head":
            weight.requires_grad_(True)
            (G,) = torch.autograd.grad(loss_fn(model, batch), weight)
            assert near(statistics[name].gradient, G, rounding), name
    init_hrp(model, [batch, batch], loss_fn)
    assert loss() == pytest.approx(before, abs=rounding)
    if build is not eight_bit:
        init_cntlora(model, [batch, batch], loss_fn)
        assert loss() <= before + rounding
    init_lora_da(model, [batch, batch], loss_fn)
    after = loss()
    assert after < before - 0.003
    if build is eight_bit:
        with pytest.raises(TypeError, match="layer '0': Linear8bitLt"):
            merge_lora(model)
    else:
        assert not lora_layers(merge_lora(model))
    assert loss() == pytest.approx(after, abs=rounding)


# ---------------------------------------------------------------------------- their layers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def scheme(model, **options):
    """Quantize the linear layers as a checkpoint of compressed-tensors does."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    kinds = {
        name: quantization.QuantizationArgs(**arguments) for name, arguments in options.items()
    }
    group = quantization.QuantizationScheme(targets=["Linear"], **kinds)
    config = quantization.QuantizationConfig(config_groups={"all": group}, ignore=["2"])
    quantization.apply_quantization_config(model, config)
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.data.fill_(0.01)
            layer.quantization_status = quantization.QuantizationStatus.FROZEN


def fp8_dynamic(model):
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    scheme(model, weights=weights, input_activations=inputs)


def w8a8(model):
    weights = {"num_bits": 8, "strategy": "channel"}
    inputs = {"num_bits": 8, "strategy": "token", "dynamic": True}
    scheme(model, weights=weights, input_activations=inputs)


def torchao_dynamic(model):
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(model[:2], ao.Int8DynamicActivationInt8WeightConfig())


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("quantize", [fp8_dynamic, w8a8, torchao_dynamic])
def test_layers_that_round_their_inputs_are_refused_by_name(quantize):
    """They pass no gradient on, and the path around them hides it."""
    model = nn.Sequential(Block(), Block(), nn.Linear(32, 8))
    quantize(model)
    add_lora(model, 2, targets=["down"])
    batch = (torch.randn(64, 32), torch.randint(8, (64,)))
    for start in (init_lora_da, init_hrp):
        with pytest.raises(ValueError, match=r"layer '1\."):
            start(model, [batch, batch], mean_loss)


@pytest.mark.filterwarnings("ignore")  # theirs
def test_a_packed_layer_has_no_weight_and_is_refused_by_name():
    compressors = pytest.importorskip("compressed_tensors.compressors")
    model = nn.Sequential(nn.Linear(64, 64))
    scheme(model, weights={"num_bits": 4, "strategy": "group", "group_size": 32})
    compressor = compressors.ModelCompressor.from_pretrained_model(model, "pack-quantized")
    compressor.compress_model(model)
    with pytest.raises(TypeError, match="layer '0'"):
        add_lora(model, 2)


def torchao_weights(model):
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(model, ao.Int8WeightOnlyConfig())


def quanto_weights(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("quantize", [torchao_weights, quanto_weights])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_can_be_dequantized_start_and_merge(quantize, dtype):
    model = nn.Sequential(nn.Linear(32, 32)).to(dtype)
    quantize(model)
    x = torch.randn(64, 32, dtype=dtype)
    add_lora(model, 2)
    init_cntlora(model, [x], lambda model, x: model(x), step=1)
    assert model[0].lora_B.any()
    expected = model(x)
    assert near(merge_lora(model)(x), expected, 0.02)


def test_in_bfloat16_the_outputs_are_pefts():
    """Bit for bit, with the same factors."""
    peft = pytest.importorskip("peft")
    linear = nn.Linear(64, 64, dtype=torch.bfloat16)
    ours = LoRALinear(linear, 4)
    nn.init.normal_(ours.lora_B)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A)
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B)
    x = torch.randn(512, 64, dtype=torch.bfloat16)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("init", [init_lora_da, init_hrp])
def test_an_offloaded_model_is_refused_with_the_remedy_and_then_starts_as_any_other(init):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    whole = copy.deepcopy(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    batches = [(torch.randn(64, 8), torch.randint(4, (64,)))] * 2
    add_lora(model, 2)
    add_lora(whole, 2)
    with pytest.raises(ValueError, match="layer '0'.*to_empty"):
        init(model, batches, mean_loss)
    with pytest.raises(ValueError, match="to_empty"):
        model(batches[0][0])
    for adapter in lora_layers(model).values():
        adapter.to_empty(device="cpu", recurse=False)
    init(model, batches, mean_loss)
    init(whole, batches, mean_loss)
    for adapter, other in zip(
        lora_layers(model).values(), lora_layers(whole).values(), strict=True
    ):
        assert torch.equal(adapter.lora_A, other.lora_A)
        assert torch.equal(adapter.lora_B, other.lora_B)
    with pytest.raises(TypeError, match="layer '0'"):
        merge_lora(model)  # as W is not here


# ---------------------------------------------------------------------------- the page


PAGES = [ROOT / "README.md", ROOT / ".github" / "teaching.md"]
PAGE = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.exists())
BLOCKS = re.findall(r"```python\n(.*?)```\s*```text\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_the_readmes_python_prints_what_the_readme_says(block, tmp_path):
    """Each ```python block runs by itself, and prints the ```text block that follows it.

    Another version of torch draws other random numbers, so that it prints other digits.
    """
    code, expected = [textwrap.dedent(text) for text in BLOCKS[block]]  # some stand in lists
    for package in ("transformers", "peft", "bitsandbytes", "accelerate"):
        if package in code:
            pytest.importorskip(package)
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "block.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    if not torch.__version__.startswith(re.search(r"Tested with torch (\d+\.\d+)", PAGE)[1]):
        numbers = re.compile(r"[\d.]+")
        printed = numbers.sub("0", printed)
        expected = numbers.sub("0", expected)
    assert printed == expected


@pytest.mark.parametrize("budget", [None, 9])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_the_pages_recipe_for_peft_keeps_the_function(options, budget, tmp_path):
    """With equal ranks and with a rank budget: the adapter that PEFT saves gives the same y."""
    peft = pytest.importorskip("peft")
    (block,) = [code for code, _ in BLOCKS if "def to_peft" in code]
    page = {}
    exec(block.split("\nx = ")[0], page)
    model = page["pretrained"]()
    x = torch.randn(64, 16)
    adapters = add_lora(model, rank=2, alpha=6)
    init_cntlora(model, [x], lambda model, x: model(x), rank_budget=budget, step=1)
    expected = model(x)
    page["to_peft"](model, adapters, **options).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(page["pretrained"](), tmp_path)
    assert near(loaded(x), expected, 1e-5)


@pytest.mark.skipif(not PAGE, reason="README.md is not here")
def test_the_page_shows_every_output_and_selects_tests_that_exist():
    """A test is selected by words of its name: `-k words`."""
    assert len(BLOCKS) == PAGE.count("```python\n") > 0
    tests = [name for name in vars(test_lora_init) if name.startswith("test_")]
    words = re.findall(r"`-k (\w+)`", PAGE)
    assert words
    for word in words:
        assert any(word in test for test in tests), word


def test_the_results_on_the_page_are_those_of_the_committed_runs(tmp_path):
    """Each loss and each difference with its interval is printed by .evidence/report.py.

    And .evidence/tables.md is what it prints today.
    """
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ROOT / ".evidence" / "report.py"), "--figures", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / ".evidence" / "tables.md").read_text(encoding="utf-8")
    results = PAGE.split("\n## Results")[1].split("\n## The toy")[0]
    numbers = re.findall(
        r"[−+]\d\.\d{4} ± \d\.\d{4}|(?<!\d)\d\.\d{4}(?!\d)", results.replace("\n", " ")
    )
    assert len(numbers) > 50
    for number in numbers:
        assert number in done.stdout, number
