# SPDX-License-Identifier: MIT
"""The theorems of `lora_init.py`, as properties.

Each test's name is the claim, its docstring the equation, its oracle independent of the code: a
dense Kronecker solve, autograd, an SVD, brute force. Arithmetic is float64, tolerances relative;
subspaces are compared as projectors. A claimed optimum meets random and perturbed rivals.
"""

import contextlib
import copy
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_init
from lora_init import (
    LoRALinear, add_lora, allocate_ranks, cntlora, collect_statistics, hrp, init_cntlora, init_hrp,
    init_lora_da, line_search, lora_da, lora_layers, merge_lora, monge_map)

settings.register_profile("here", deadline=None, max_examples=50)
settings.load_profile("here")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
INITS = [init_lora_da, init_hrp, init_cntlora]

eye = partial(torch.eye, dtype=torch.float64)
torch.set_num_threads(1)  # the matrices are small: threads would only wait for each other

class Problem(NamedTuple):
    """Sizes, a rank, and the random matrices that every theorem starts from."""
    n_out: int
    n_in: int
    rank: int
    condition: float  # of spd()
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def orthogonal(self, n: int, k: int | None = None) -> Tensor:
        return torch.linalg.qr(self.normal(n, n)).Q[:, :k]

    def spd(self, n: int) -> Tensor:
        Q = self.orthogonal(n)
        return (Q * torch.logspace(0, -math.log10(self.condition), n, dtype=torch.float64)) @ Q.mT

    def low_rank(self) -> Tensor:
        return self.normal(self.n_out, self.rank) @ self.normal(self.rank, self.n_in)

    def positive(self, n: int) -> Tensor:
        return self.normal(n).exp()

@st.composite
def problems(draw: st.DrawFn, smallest: int = 1) -> Problem:
    n_out, n_in = draw(st.integers(smallest, 9)), draw(st.integers(smallest, 9))
    limit = min(n_in, n_out)
    rank = draw(st.sampled_from([1, limit, draw(st.integers(1, limit))]))
    return Problem(n_out, n_in, rank, draw(st.sampled_from([1.0, 10.0, 1e3])),
                   torch.Generator().manual_seed(draw(st.integers(0, 2**32))))

def fixed(n_out: int, n_in: int, rank: int, condition: float = 10.0) -> Problem:
    return Problem(n_out, n_in, rank, condition, torch.Generator().manual_seed(0))

def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-8) -> bool:
    return bool((actual - expected).norm() <= tolerance * (expected.norm() + 1e-300))

def projector(A: Tensor) -> Tensor:
    Q = torch.linalg.qr(A.mT).Q
    return Q @ Q.mT

def top_right(matrix: Tensor, rank: int) -> Tensor:
    """Projector on the top right singular vectors, if a gap makes them unique."""
    _, S, V_t = torch.linalg.svd(matrix)
    assume(S[rank - 1] - (S[rank] if rank < len(S) else 0) > 1e-4 * S[0])
    return V_t[:rank].mT @ V_t[:rank]

def adapter(p: Problem, alpha: float | None = None) -> LoRALinear:
    layer = LoRALinear(nn.Linear(p.n_in, p.n_out, dtype=torch.float64), p.rank, alpha)
    layer.set_factors(p.normal(p.n_out, p.rank), p.normal(p.rank, p.n_in))
    return layer

# ---------------------------------------------------------------------------- the layer
@given(problems(), st.lists(st.integers(1, 3), max_size=3))
def test_a_fresh_adapter_leaves_the_function_unchanged(p, leading):
    """B = 0: bit for bit the layer that was given, for x of any leading shape."""
    linear, x = nn.Linear(p.n_in, p.n_out, dtype=torch.float64).eval(), p.normal(*leading, p.n_in)
    before, state = linear(x), torch.get_rng_state()
    layer = LoRALinear(linear, p.rank)
    torch.set_rng_state(state)  # Kaiming-uniform, a = √5, and no other random number is drawn
    A = nn.init.kaiming_uniform_(torch.empty_like(layer.lora_A), a=math.sqrt(5))
    assert torch.equal(layer.lora_A, A) and torch.equal(layer(x), before)
    assert layer.weight is linear.weight and layer.bias is linear.bias and layer.scaling == 1
    assert {n for n, q in layer.named_parameters() if q.requires_grad} == {"lora_A", "lora_B"}
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"} and not layer.training

@given(problems(), st.floats(0.1, 30))
def test_forward_delta_weight_and_merged_are_one_function(p, alpha):
    """y = (W + s·BA) x + b, with s = alpha / r, also after factors of another rank."""
    layer, x = adapter(p, alpha), p.normal(2, 3, p.n_in)
    for rank in (p.rank, 1, min(p.n_in, p.n_out)):
        B, A = p.normal(p.n_out, rank), p.normal(rank, p.n_in)
        layer.set_factors(B, A)
        dense = layer.weight + alpha / p.rank * torch.einsum("or,ri->oi", B, A)
        y, merged = torch.einsum("...i,oi->...o", x, dense) + layer.bias, layer.merged()
        assert near(layer(x), y) and near(layer.delta_weight(), dense - layer.weight)
        assert type(merged) is nn.Linear and near(merged(x), y)
        assert (merged.in_features, merged.out_features) == (p.n_in, p.n_out)
        assert merged.bias.data_ptr() != layer.bias.data_ptr()  # its own: it may be trained
        assert layer.rank == rank and not any(q.requires_grad for q in merged.parameters())
    layer.scaling = 0.0
    layer.lora_A.data.fill_(math.nan)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))

@given(problems(), st.floats(0.1, 30))
def test_gradients_are_those_of_the_dense_weight(p, alpha):
    """∂L/∂B = s·G Aᵀ and ∂L/∂A = s·Bᵀ G with G = ∂L/∂(W + s·BA)."""
    layer, x = adapter(p, alpha), p.normal(5, p.n_in)
    layer(x).sin().sum().backward()
    dense = (layer.weight + layer.delta_weight()).detach().requires_grad_()
    (x @ dense.mT + layer.bias).sin().sum().backward()
    s = alpha / p.rank
    assert near(layer.lora_B.grad, s * dense.grad @ layer.lora_A.mT)
    assert near(layer.lora_A.grad, s * layer.lora_B.mT @ dense.grad)
    assert layer.weight.grad is None and layer.bias.grad is None

def test_factors_keep_their_parameters_and_a_misfit_changes_nothing():
    """An optimizer made before an init still holds the adapter; a misfit names both shapes."""
    layer = LoRALinear(nn.Linear(4, 3), 2)
    A, B = layer.lora_A, layer.lora_B
    layer.set_factors(torch.ones(3, 2), torch.ones(2, 4))
    assert layer.lora_A is A and layer.lora_B is B and A.sum() == 8 and B.sum() == 6
    layer.lora_A.requires_grad_(False)
    layer.set_factors(torch.ones(3, 1), torch.ones(1, 4))
    assert layer.rank == 1 and not layer.lora_A.requires_grad and layer.lora_B.requires_grad
    for B, A, message in ((torch.ones(3, 2), torch.ones(1, 4), r"B .*\(3, 2\), expected \(3, 1\)"),
                          (torch.ones(3, 1), torch.ones(1, 5), r"A .*\(1, 5\), expected \(1, 4\)"),
                          (torch.ones(3, 4), torch.ones(4, 4), r"rank 4 is not in 1\.\.3"),
                          (torch.ones(3, 1) / 0, torch.ones(1, 4), "B .*NaN or Inf")):
        with pytest.raises(ValueError, match=message):
            layer.set_factors(B, A)
    assert layer.lora_A.sum() == 4

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_factors_are_float32_at_least_and_the_output_keeps_its_dtype(dtype, device):
    linear = nn.Linear(4, 3, dtype=dtype, device=device)
    layer, x = LoRALinear(linear, 2), torch.ones(2, 4, dtype=dtype, device=device)
    assert layer.lora_A.dtype == torch.promote_types(dtype, torch.float32) == layer.lora_B.dtype
    assert layer(x).dtype == dtype == layer.merged().weight.dtype
    with torch.autocast(device, torch.bfloat16):
        assert layer(x).dtype == linear(x).dtype  # bfloat16, but float64 is left alone

def test_an_encoder_layer_that_reads_weights_past_its_layers_is_refused():
    """PyTorch's fast path in eval mode would leave the adapters silently dead."""
    model = nn.TransformerEncoderLayer(4, 2, 4)
    with pytest.raises(TypeError, match="'linear1': .*set_fastpath_enabled"):
        add_lora(model, 2)
    assert all(p.requires_grad for p in model.parameters())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert set(add_lora(model, 2)) == {"linear1", "linear2"}
    finally:
        torch.backends.mha.set_fastpath_enabled(True)

class Tiny(nn.Module):
    """Attention, whose out_proj is a subclass of nn.Linear; a layer under two names; a head."""
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)
        self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))
        self.tied, self.head = self.layers[1], nn.Linear(6, 4)

def test_add_lora_takes_names_suffixes_and_predicates():
    assert set(add_lora(Tiny(), 2)) == {*(f"layers.{i}" for i in range(12)), "head"}
    assert set(add_lora(Tiny(), 2, targets=["layers.1", "1"])) == {"layers.1"}  # not .11
    assert set(add_lora(Tiny(), 2, targets="head")) == {"head"}
    model = Tiny()
    adapters = add_lora(model, 2, alpha=8, targets=lambda name: name.endswith(".1"))
    assert adapters == lora_layers(model) == {"layers.1": model.layers[1]}
    assert model.tied is model.layers[1] and model.tied.scaling == 4
    model.layers[1].lora_A.requires_grad_(False)
    add_lora(model, 1, targets=["head"])  # a second call leaves the first adapter as it was
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "layers.1.lora_B", "head.lora_A", "head.lora_B"}

def test_merge_lora_gives_the_same_function_in_plain_layers():
    model, x = Tiny().double().eval(), torch.randn(2, 6).double()
    for layer in add_lora(model, 2, alpha=3).values():
        layer.set_factors(torch.randn(layer.out_features, 2), torch.randn(2, 6))
    expected = model.head(model.layers(x))
    assert merge_lora(model) is model and not lora_layers(model)
    assert model.tied is model.layers[1] and type(model.tied) is nn.Linear
    assert not model.tied.training and near(model.head(model.layers(x)), expected)
    with pytest.raises(TypeError, match="merged"):
        merge_lora(LoRALinear(nn.Linear(2, 2), 1))

@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"targets": ["head", "heads"]}, ValueError, "matches no layer of Tiny; .*'heads': "),
    ({"targets": []}, ValueError, "matches no layer"),
    ({"targets": lambda name: False}, ValueError, "matches no layer"),
    ({"targets": ["attention.out_proj"]}, TypeError, "'attention.out_proj': NonDyn.* not exactly"),
    ({"targets": ["layers.0", "layers"]}, TypeError, "'layers': Sequential is not exactly"),
    ({"rank": 5}, ValueError, r"'head': rank 5 is not in 1\.\.4"),
    ({"rank": 2.0}, ValueError, "'head': rank 2.0"), ({"rank": 0}, ValueError, "'head': rank 0"),
    ({"alpha": 0.0}, ValueError, "alpha 0.0"), ({"alpha": math.inf}, ValueError, "alpha inf")])
def test_what_cannot_be_adapted_is_refused_by_name_and_nothing_changes(kwargs, error, message):
    model = Tiny()
    with pytest.raises(error, match=message):
        add_lora(model, **{"rank": 2, "targets": ["head"], **kwargs})
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="matches no layer of Linear"):
        add_lora(nn.Linear(2, 2), 1)  # the root has no parent: LoRALinear(linear, rank)
    with pytest.raises(TypeError, match="Conv1d is not exactly"):
        LoRALinear(nn.Conv1d(2, 2, 1), 1)

# ---------------------------------------------------------------------------- LoRA-DA
@given(problems())
def test_lora_da_reaches_the_target_in_one_step(p):
    """Hessian diag(Y) ⊗ Z: G = −diag(Y) Δ Z, and BA = Δ for any Z and Y, if rank Δ ≤ r."""
    change, Z, Y = p.low_rank(), p.spd(p.n_in), p.positive(p.n_out)
    B, A = lora_da(-Y[:, None] * change @ Z, Z, Y, p.rank, 1, variance=0, damping=0)
    assert near(B @ A, change, 1e-7)

def test_the_raw_gradient_misses_the_target_when_inputs_are_anisotropic():
    """Counterexample: Z stretches the one direction that did not change into the gradient."""
    change = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    Z = torch.tensor([[9.0, 3, 0], [3, 2, 0], [0, 0, 1]], dtype=torch.float64)
    one, G = torch.ones(2, dtype=torch.float64), -change @ Z
    _, A = lora_da(G, eye(3), one, 1, 1, variance=0, damping=0)
    assert (change - change @ projector(A)).norm() > 0.8 * change.norm()
    B, A = lora_da(G, Z, one, 1, 1, variance=0, damping=0)
    assert near(B @ A, change)

@given(problems(smallest=2), st.integers(1, 100), st.sampled_from([0.0, 0.5, 1.0, 10.0]))
def test_no_other_orthonormal_A_has_a_smaller_objective(p, n_train, variance):
    """tr(AΩAᵀ) is least, Ω = variance/N·tr(Y⁻¹)·Z⁻¹ − ΔᵀΔ; B = ΔAᵀ, (diag(Y) ⊗ Z) vec Δ = −vec G.
    Dense solves, with C + damping·mean(diag C)·I for Y and Z."""
    G, Z, Y = p.normal(p.n_out, p.n_in), p.spd(p.n_in), p.positive(p.n_out)
    B, A = lora_da(G, Z, Y, p.rank, n_train, variance=variance, damping=0.3)
    Y, Z = Y + 0.3 * Y.mean(), Z + 0.3 * Z.trace() / p.n_in * eye(p.n_in)
    delta = -torch.linalg.solve(torch.kron(torch.diag(Y), Z), G.flatten()).view(G.shape)
    omega = variance / n_train * (1 / Y).sum() * torch.linalg.inv(Z) - delta.mT @ delta

    def objective(rows: Tensor) -> Tensor:
        return (rows @ omega @ rows.mT).trace()

    assert near(A @ A.mT, eye(p.rank)) and near(B, delta @ A.mT)
    room, skew = 1e-9 * omega.norm(), p.normal(p.n_in, p.n_in)
    for rival in (p.orthogonal(p.n_in, p.rank).mT, A @ torch.matrix_exp(1e-2 * (skew - skew.mT))):
        assert objective(A) <= objective(rival) + room
    assert (objective(A) - torch.linalg.eigvalsh(omega)[: p.rank].sum()).abs() <= room

@given(problems(smallest=2), st.integers(1, 3))
def test_the_objective_is_the_expected_error_of_the_fit_within_A(p, copies):
    """E‖W + Δ̂AᵀA − W*‖² = ‖Δ‖² + tr(AΩAᵀ), exactly: least squares on N given rows, noise σᵢ.
    Δ̂ = Δ + εᵀX(XᵀX)⁻¹ is linear in the noise ε, so its mean square is summed entry by entry."""
    X = p.normal(p.n_in + 2, p.n_in).repeat(copies, 1)  # (N, in)
    change, sigma, A = p.low_rank(), p.positive(p.n_out), p.orthogonal(p.n_in, p.rank).mT
    Z, Y, N = X.mT @ X / len(X), sigma**-2, len(X)
    hat = X @ torch.linalg.inv(X.mT @ X)  # (N, in): a unit of noise at (k, i) adds row k to Δ̂ᵢ
    bias = (change @ A.mT @ A - change).square().sum()
    noise = sum(s**2 * (row @ A.mT @ A).square().sum() for s in sigma for row in hat)
    omega = (1 / Y).sum() / N * torch.linalg.inv(Z) - change.mT @ change
    assert near(bias + noise, change.square().sum() + (A @ omega @ A.mT).trace())

@given(problems(smallest=2), st.floats(0.1, 10))
def test_a_measured_fisher_shortens_rows_and_keeps_the_row_space(p, sigma):
    """E[gᵢ²] = (σ² + (ΔZΔᵀ)ᵢᵢ)/σ⁴: row i of BA is Δᵢ / (1 + (ΔZΔᵀ)ᵢᵢ/σ²), A's span is Δ's."""
    change, Z = p.low_rank(), p.spd(p.n_in)
    signal = (change @ Z @ change.mT).diagonal()
    Y = (sigma**2 + signal) / sigma**4  # g = −(Δx + noise)/σ², noise of variance σ²
    B, A = lora_da(-change @ Z / sigma**2, Z, Y, p.rank, 1, variance=0, damping=0)
    assert near(B @ A, change / (1 + signal / sigma**2)[:, None], 1e-6)
    assert near(change @ projector(A), change, 1e-6)

def test_weight_one_of_the_variance_cancels_the_noise_and_two_is_unbiased():
    """N′ = N rows behind G: E[Ω̂] = (variance − 1)/N·Σ1/Yᵢ·Z⁻¹ − ΔᵀΔ, over the noise in Δ̂."""
    p = fixed(3, 4, 2)
    X, change = p.normal(20, 4), p.low_rank() / 10
    Z, draws = X.mT @ X / 20, 20000
    fits = change + p.normal(draws, 3, 20) @ X @ torch.linalg.inv(X.mT @ X)  # (draws, out, in)
    mean = (fits.mT @ fits).mean(dim=0)  # E[Δ̂ᵀΔ̂]
    noise = 3 / 20 * torch.linalg.inv(Z)
    assert near(noise - mean, -change.mT @ change, 0.02 * noise.norm() / change.norm()**2)
    assert near(2 * noise - mean, noise - change.mT @ change, 0.02)

@given(problems(), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_units_and_rotations_of_the_input_turn_A_with_them(p, unit, loss_unit):
    """x → cQx, loss → d·loss: A's span → its image under Q, BA → BA Qᵀ/(cd); Qᵀ = Q⁻¹."""
    G, Z, Y, Q = p.low_rank(), p.spd(p.n_in), p.positive(p.n_out), p.orthogonal(p.n_in)
    B, A = lora_da(G, Z, Y, p.rank, 1, variance=0)
    B_2, A_2 = lora_da(unit * loss_unit * G @ Q.mT, unit**2 * Q @ Z @ Q.mT, loss_unit**2 * Y,
                       p.rank, 1, variance=0)
    assert near(projector(A_2), Q @ projector(A) @ Q.mT, 1e-6)
    assert near(unit * loss_unit * B_2 @ A_2, B @ A @ Q.mT, 1e-6)

@pytest.mark.parametrize("spectrum", ["1 / k", "even", "eight strong", "exponential"])
@pytest.mark.parametrize("n_train", [1, 10**6])
def test_wide_layers_come_within_one_per_cent_of_the_least_objective(spectrum, n_train):
    """n = 1100 > 1024, float32, with no, a weak and a strong gradient; AAᵀ = I."""
    p, k = fixed(6, 1100, 6), torch.arange(1100, dtype=torch.float64)
    values = {"1 / k": 1 / (k + 1), "even": 1 - 0.99 * k / 1100, "eight strong": 1 + 99.0 * (k < 8),
              "exponential": (-k / 20).exp() + 1e-6}[spectrum]
    Q = p.orthogonal(1100)
    Z, inverse = (Q * values) @ Q.mT, (Q / (values + 0.1 * values.mean())) @ Q.mT
    for strength, dtype in ((0.0, torch.float32), (1e-3, torch.float64), (1.0, torch.float32)):
        G = strength * p.normal(6, 1100) @ Z
        state = torch.get_rng_state()
        A, again = (lora_da(G.to(dtype), Z.to(dtype), torch.ones(6), 6, n_train)[1] for _ in "12")
        delta = G / 1.1 @ inverse
        omega = 6 / 1.1 / n_train * inverse - delta.mT @ delta
        least = torch.linalg.eigvalsh(omega)[:6].sum()
        assert torch.equal(A, again) and torch.equal(state, torch.get_rng_state())
        assert near(A.double() @ A.mT.double(), eye(6), 1e-5)
        assert (A.double() @ omega @ A.mT.double()).trace() - least <= 0.01 * least.abs()

def test_a_zero_gradient_leaves_the_variance_term_and_B_zero():
    """G = 0, Y = 0: Ω ∝ Z⁻¹, so A spans the widest directions of x."""
    Z = torch.diag(torch.tensor([1.0, 9.0, 4.0]))
    B, A = lora_da(torch.zeros(2, 3), Z, torch.zeros(2), 2, 10)
    assert torch.equal(B, torch.zeros(2, 2))
    assert near(projector(A), torch.diag(torch.tensor([0.0, 1.0, 1.0])), 1e-6)

# ---------------------------------------------------------------------------- HRP
@given(problems(), st.integers(1, 12))
def test_hrp_equals_the_svd_of_the_product(p, high):
    """A spans the top r right singular vectors of the dense B_high·A_high; B = 0."""
    assume(high >= p.rank)
    B_high, A_high = p.normal(p.n_out, high), p.normal(high, p.n_in)
    B, A = hrp(B_high, A_high, p.rank)
    assert B.shape == (p.n_out, p.rank) and not B.any()
    assert near(A @ A.mT, eye(p.rank))
    assert near(A.mT @ A, top_right(B_high @ A_high, p.rank), 1e-6)

def residual(change: Tensor, A: Tensor) -> Tensor:
    """min over B of ‖D − BA‖."""
    return (change - change @ torch.linalg.pinv(A) @ A).norm()

@given(problems(smallest=2), st.integers(1, 9))
def test_within_the_preheated_span_no_A_does_better_than_hrps(p, high):
    """Converged at R: among all A whose rows lie in A_high's span HRP's leaves the least."""
    assume(p.rank <= high <= p.n_in)
    change, A_high = p.normal(p.n_out, p.n_in), p.normal(high, p.n_in)
    _, A = hrp(change @ torch.linalg.pinv(A_high), A_high, p.rank)  # argmin ‖D − B_high A_high‖
    assert near(A @ projector(A_high), A)  # it lies in the span itself
    ours = residual(change, A)
    for rival in (p.normal(p.rank, high) @ A_high,
                  A + 1e-2 * p.normal(p.rank, high) @ torch.linalg.qr(A_high.mT).Q.mT):
        assert ours <= residual(change, rival) + 1e-9
    best = torch.linalg.svdvals(change @ projector(A_high))[: p.rank].square().sum()
    assert near(ours.square() + best, change.square().sum())

# ---------------------------------------------------------------------------- CNTLoRA
@given(problems(smallest=2))
def test_the_monge_map_carries_one_moment_to_the_other_and_no_other_map_moves_less(p):
    """T = Tᵀ ≻ 0, T Z_f Tᵀ = Z_p; E‖Tx − x‖² is least among T′ = L_p Q L_f⁻¹, Q orthogonal."""
    Z_f, Z_p = p.spd(p.n_in), 3 * p.spd(p.n_in)
    T = monge_map(Z_f.requires_grad_(), Z_p)
    L_f, L_p = torch.linalg.cholesky(Z_f.detach()), torch.linalg.cholesky(Z_p)
    assert not T.requires_grad and near(T, T.mT) and torch.linalg.eigvalsh(T)[0] > 0
    assert near(T @ L_f @ L_f.mT @ T.mT, Z_p)

    def moved(map_: Tensor) -> Tensor:
        return ((map_ - eye(p.n_in)) @ L_f).square().sum()

    assert near(moved(T) + 2 * (T @ Z_f).trace(), Z_f.trace() + Z_p.trace())
    skew = p.normal(p.n_in, p.n_in)
    Q = torch.linalg.inv(L_p) @ T @ L_f  # T = L_p Q L_f⁻¹
    for turn in (p.orthogonal(p.n_in), Q, Q @ torch.matrix_exp(1e-2 * (skew - skew.mT))):
        assert moved(T) <= moved(L_p @ turn @ torch.linalg.inv(L_f)) + 1e-9

@given(problems(), st.booleans(), st.sampled_from([0.0, 0.2]))
def test_output_moments_match(p, known, damping):
    """(W+ΔW) Z_f (W+ΔW)ᵀ = W Z_p Wᵀ, damped; without Z_p it is mean(diag Z_f)·I."""
    W, Z_f, Z_p = p.normal(p.n_out, p.n_in), p.spd(p.n_in), p.spd(p.n_in)
    B, A = cntlora(W, Z_f, Z_p if known else None, rank=min(W.shape), damping=damping)
    if not known:
        Z_p = Z_f.diagonal().mean() * eye(p.n_in)
    Z_f, Z_p = (Z + damping * Z.trace() / p.n_in * eye(p.n_in) for Z in (Z_f, Z_p))
    assert near((W + B @ A) @ Z_f @ (W + B @ A).mT, W @ Z_p @ W.mT, 1e-6)

@given(problems())
def test_a_symmetric_distortion_is_undone_exactly(p):
    """x_f = S x_p, S = I + r terms, symmetric positive definite: (W + BA) S = W at rank r."""
    W, Z_p = p.normal(p.n_out, p.n_in), p.spd(p.n_in)
    Q = p.orthogonal(p.n_in, p.rank)
    S = eye(p.n_in) + (Q * (p.positive(p.rank) - 0.9 * (p.normal(1) > 0))) @ Q.mT
    assume(torch.linalg.eigvalsh(S)[0] > 0.05)
    B, A = cntlora(W, S @ Z_p @ S, Z_p, rank=p.rank, damping=0)
    assert near((W + B @ A) @ S, W, 1e-6)

@given(problems())
def test_no_rival_factors_are_nearer(p):
    """‖(ΔW − BA) L‖ is least at rank r, L Lᵀ = Z_f; A Z_f Aᵀ = I; ‖column k of B‖ = σ_k."""
    W, Z_f, Z_p = p.normal(p.n_out, p.n_in), p.spd(p.n_in), p.spd(p.n_in)
    root = torch.linalg.cholesky(Z_f)
    weighted = (W @ monge_map(Z_f, Z_p) - W) @ root
    B, A = cntlora(W, Z_f, Z_p, rank=p.rank, damping=0)
    spectrum, left = torch.linalg.svdvals(weighted), (weighted - B @ A @ root).norm()
    assert near(A @ Z_f @ A.mT, eye(p.rank))
    assert (B.norm(dim=0) - spectrum[: p.rank]).norm() <= 1e-8 * W.norm()
    assert (left - spectrum[p.rank:].norm()).abs() <= 1e-8 * W.norm()
    for size in (1e-3, 1.0):
        rival = (B + size * p.normal(*B.shape)) @ (A + size * p.normal(*A.shape))
        assert left <= (weighted - rival @ root).norm() + 1e-9

@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.0, 5.0]), min_size=1, max_size=4),
                min_size=1, max_size=4), st.data())
def test_no_other_spending_of_the_budget_leaves_less(lists, data):
    """Σ over layers of Σ_{k>r} σ_k² is least for Σ r = budget, each r ≥ 1: all ways are tried."""
    spectra = {str(i): torch.tensor(sorted(s, reverse=True)) for i, s in enumerate(lists)}
    most = sum(len(s) for s in lists)
    budget = data.draw(st.integers(len(lists), most))

    def left_out(ranks: tuple[int, ...]) -> float:
        return sum(s[r:].square().sum().item() for r, s in zip(ranks, spectra.values()))

    ways = [way for way in itertools.product(*(range(1, 1 + len(s)) for s in lists))
            if sum(way) == budget]
    spent = allocate_ranks(spectra, budget)
    assert tuple(spent.values()) in ways and list(spent) == list(spectra)
    assert left_out(tuple(spent.values())) == min(map(left_out, ways))
    for wrong in (len(lists) - 1, most + 1):
        with pytest.raises(ValueError, match=f"budget {wrong}"):
            allocate_ranks(spectra, wrong)

# ---------------------------------------------------------------------------- bad arguments
@pytest.mark.parametrize(("call", "message"), [
    (lambda G, Z, Y: lora_da(G, Z, Y, 3, 1), r"rank 3 is not in 1\.\.2"),
    (lambda G, Z, Y: lora_da(G, Z, Y, 1, 0), "n_train 0"),
    (lambda G, Z, Y: lora_da(G, Z, Y, 1, 1, variance=-1), "variance -1"),
    (lambda G, Z, Y: lora_da(G, Z, Y, 1, 1, variance=math.inf), "variance inf"),
    (lambda G, Z, Y: lora_da(G, Z, Y, 1, 1, damping=-0.01), "damping -0.01"),
    (lambda G, Z, Y: lora_da(G, Z[:2, :2], Y, 1, 1), r"moment has .*\(2, 2\), expected \(3, 3\)"),
    (lambda G, Z, Y: lora_da(G, Z, Y[:1], 1, 1), r"fisher has shape \(1,\), expected \(2,\)"),
    (lambda G, Z, Y: lora_da(G, 0 * Z, Y, 1, 1), "damping 0.1 leaves Z .*not pos"),
    (lambda G, Z, Y: lora_da(G, Z, Y - eye(2)[0], 1, 1, damping=0), "damping 0 leaves output_fish"),
    (lambda G, Z, Y: hrp(G, G, 1), r"A_high has shape \(2, 3\), expected \(3, 3\)"),
    (lambda G, Z, Y: hrp(G[:, :1], G[:1], 2), r"rank 2 is not in 1\.\.1"),
    (lambda G, Z, Y: hrp(0 * G, Z, 1), r"B_high \(2, 3\) is 0"),
    (lambda G, Z, Y: cntlora(G, Z, rank=0), "rank 0"),
    (lambda G, Z, Y: cntlora(G, Z, Y, rank=1), r"pretrain_moment has shape \(2,\)"),
    (lambda G, Z, Y: cntlora(G, Z, rank=1, damping=math.inf), "damping inf"),
    (lambda G, Z, Y: monge_map(Z, Z[:2, :2]), r"Z_p has shape \(2, 2\), expected \(3, 3\)"),
    (lambda G, Z, Y: monge_map(Z[:2], Z), r"Z_f has shape \(2, 3\), expected \(2, 2\)")])
def test_numbers_and_shapes_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3), eye(3), torch.ones(2))

@pytest.mark.parametrize(("function", "names", "rest"), [
    (lora_da, ["gradient", "input_moment", "output_fisher"], {"rank": 2, "n_train": 9}),
    (hrp, ["B_high", "A_high"], {"rank": 2}), (monge_map, ["Z_f", "Z_p"], {}),
    (cntlora, ["weight", "input_moment", "pretrain_moment"], {"rank": 2})])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_in_any_argument_are_named(function, names, rest, bad):
    for spoilt in names:
        tensors = {name: eye(3) if name != "output_fisher" else torch.ones(3) for name in names}
        assert function(**tensors, **rest) is not None
        tensors[spoilt].view(-1)[1] = bad
        with pytest.raises(ValueError, match=f"{spoilt} .* holds NaN or Inf"):
            function(**tensors, **rest)
    with pytest.raises(ValueError, match="'x' .* holds NaN or Inf"):
        allocate_ranks({"x": torch.tensor([bad, 1.0])}, 1)

def test_autocast_does_not_reach_into_the_functions_and_half_is_computed_in_float32():
    """In half precision a subspace, a square root or a Newton step would be off by percents."""
    p = fixed(4, 3, 2)
    G, Z = p.normal(4, 3).bfloat16(), p.spd(3).float()

    def results(G: Tensor) -> list[Tensor]:
        return [*lora_da(G, Z, torch.ones(4), 2, 9), *hrp(G, G.mT @ G, 2), monge_map(Z, 2 * Z),
                *cntlora(G, Z, 2 * Z, rank=2), *cntlora(G, Z, rank=2)]

    outside = results(G)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(results(G), outside))
        q = {"q": nn.Linear(3, 2).bfloat16()}
        Z_seen = collect_statistics(q["q"], q, [G], nn.Module.__call__, backward=False)["q"][1]
    assert torch.equal(Z_seen, G.float().mT @ G.float() / 4)
    assert all(near(a, b, 1e-6) for a, b in zip(outside[:2], results(G.float())))

def test_what_is_left_out_is_what_the_pages_say():
    """The theory's weight 1, damping 0.1, a searched step, rank 64 at rate 0.002."""
    model = {"damping": 0.1, "step": None, "mask_fn": None, "layers_per_pass": None}
    for function, expected in {
            lora_da: {"variance": 1.0, "damping": 0.1}, cntlora: {"damping": 0.1},
            init_lora_da: {"variance": 1.0, "n_train": None, **model},
            init_hrp: {"preheat_rank": 64, "lr": 0.002, "train_A": False, "seed": 0},
            init_cntlora: {"pretrain_batches": None, "rank_budget": None, **model}}.items():
        assert inspect.unwrap(function).__kwdefaults__ == expected

# ---------------------------------------------------------------------------- statistics
class Net(nn.Module):
    """Two parallel layers on one input, one layer used twice, dropout, an in-place activation."""
    def __init__(self):
        super().__init__()
        self.q, self.k, self.twice = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 4)
        self.norm, self.drop, self.remat = nn.BatchNorm1d(4), nn.Dropout(0.5), None
        self.head = nn.Linear(4, 3)

    def middle(self, h: Tensor) -> Tensor:
        return self.twice(self.twice(h).tanh())

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.relu_(self.q(x)) * self.k(x).sigmoid()
        h = self.norm(h.flatten(0, -2)).view(h.shape)
        h = self.middle(h) if self.remat is None else checkpoint(
            self.middle, h, use_reentrant=self.remat)
        return self.head(input=self.drop(h))

def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())

def net(seed: int = 0, device: str = "cpu") -> Net:
    torch.manual_seed(seed)
    model = Net().to(device, torch.float64)
    for layer in add_lora(model, 2, alpha=3).values():  # adapters hold something, not the start
        layer.set_factors(torch.randn(layer.out_features, 2), torch.randn(2, layer.in_features))
    return model

def rows_of_data(n: int, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    return x.to(device), torch.randint(3, (n,), generator=g).to(device)

def batched(data: tuple[Tensor, ...], sizes: list[int]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(sizes) for t in data)))

def statistics_row_by_row(model: Net, data: tuple[Tensor, Tensor]) -> dict[str, tuple]:
    """The oracle: for each row of data its own backward pass of −log p; then plain means."""
    model = merge_lora(copy.deepcopy(model).eval().requires_grad_(False))
    seen: dict[str, list] = {"q": [], "k": [], "twice": [], "head": []}

    def keep(name, layer, args, kwargs, y):
        y.requires_grad_().retain_grad()
        seen[name].append((*args, *kwargs.values(), y))
        return y.clone()  # which the model may change in place

    for name in seen:
        model.get_submodule(name).register_forward_hook(partial(keep, name), with_kwargs=True)
    for x, label in zip(*data):
        mean_loss(model, (x[None], label[None])).backward()
    means = {}
    for name, pairs in seen.items():
        x, g = (torch.cat(t).detach() for t in ([a for a, _ in pairs], [y.grad for _, y in pairs]))
        outer = [(torch.outer(a, a), torch.outer(b, a), b * b) for a, b in zip(x, g)]
        means[name] = (len(x), *(sum(terms) / len(x) for terms in zip(*outer)))
    return means

def pretrained(model: nn.Module) -> nn.Module:
    """A copy whose adapters hold B = 0."""
    model = copy.deepcopy(model)
    for layer in lora_layers(model).values():
        layer.set_factors(0 * layer.lora_B, layer.lora_A)
    return model

def same_statistics(actual: dict, expected: dict, tolerance: float = 1e-9) -> bool:
    return list(actual) == list(expected) and all(
        total.count == expected[name][0] and all(
            near(a, b, tolerance) for a, b in zip(total[1:], expected[name][1:]))
        for name, total in actual.items())

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("remat", [None, False, True])
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_statistics_are_per_row_means_however_rows_are_batched(device, remat, sizes, seed):
    """Z, G, Y from one pass = sums over single-row autograd, with checkpointing or without."""
    model, data = net(seed, device), rows_of_data(sum(sizes), seed, device)
    expected = statistics_row_by_row(pretrained(model), data)
    model.remat = remat
    batches = [(x[None], label) for x, label in batched(data, sizes)]  # x (1, rows, in)
    actual = collect_statistics(model, lora_layers(model), batches, mean_loss)
    assert same_statistics(actual, expected)
    model.remat = None
    with torch.no_grad() if sizes[0] % 2 else torch.enable_grad():
        forward = collect_statistics(model, lora_layers(model), iter(batched(data, sizes)),
                                     lambda m, b: m(b[0]), backward=False)
    assert all(near(forward[n].input_moment, expected[n][1]) and forward[n].gradient is None
               and forward[n].count == expected[n][0] for n in expected)

@given(st.integers(0, 99))
def test_masked_rows_do_not_count(seed):
    """Rows where mask_fn is False leave no mark, whatever they hold; one tensor, two masks."""
    model, data = net(seed), rows_of_data(12, seed)
    mask = torch.rand(12, generator=torch.Generator().manual_seed(seed)) < 0.6
    assume(mask.view(2, 6).any(dim=1).all())
    expected = statistics_row_by_row(pretrained(model), tuple(t[mask] for t in data))

    def masked_loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0])[batch[2]], batch[1][batch[2]])

    batches = batched((torch.where(mask[:, None], data[0], 1e6), data[1], mask), [6, 6])
    collect = partial(collect_statistics, model, lora_layers(model), batches, masked_loss)
    assert same_statistics(collect(mask_fn=lambda batch: batch[2]), expected)
    x, q = data[0], {"q": model.q}
    twice = collect_statistics(model, q, [mask, ~mask], lambda m, _: m.q(x), backward=False,
                               mask_fn=lambda batch: batch)
    assert near(twice["q"].input_moment, x.mT @ x / 12)
    with pytest.raises(ValueError, match=r"'\w+': mask .*\[3\].*, expected bool .*\[6\]"):
        collect(mask_fn=lambda batch: batch[2][:3])
    with pytest.raises(ValueError, match=r"'\w+': mask .*\[6\].*int64, expected bool"):
        collect(mask_fn=lambda batch: batch[2].long())

def test_a_shared_input_is_multiplied_once():
    """q and k get equal moments, from rows that are taken for 4 inputs, not for 5 calls."""
    model, taken, rows = net(), [], lora_init._rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_init, "_rows", lambda *args: taken.append(1) or rows(*args))
        actual = collect_statistics(model, lora_layers(model), [rows_of_data(7)],
                                    lambda m, b: m(b[0]), backward=False)
    assert torch.equal(actual["q"].input_moment, actual["k"].input_moment) and len(taken) == 4

def test_an_input_changed_in_place_is_refused_or_seen():
    """After the call, on the way to its gradient: an error. Forward only: q(x), x += 1, k(x)."""
    model, (x, _) = net(), rows_of_data(5)
    layers, moments = {"q": model.q, "k": model.k}, [x.mT @ x / 5, (x + 1).mT @ (x + 1) / 5]
    with pytest.raises(ValueError, match="'q': its input .* changed in place"):
        collect_statistics(model, layers, [x.clone()], lambda m, x: (m.q(x) + m.k(x.add_(1))).sum())
    both = collect_statistics(model, layers, [x], lambda m, x: (m.q(x), m.k(x.add_(1))),
                              backward=False)
    assert all(near(t.input_moment, Z) for t, Z in zip(both.values(), moments))

def test_where_the_loss_averages_sequences_the_search_goes_beyond_one():
    """Logits from the mean of 64 tokens: per token Y is 64 times too large, the step too short."""
    torch.manual_seed(0)
    model, labels = nn.Sequential(nn.Linear(4, 2)).double(), torch.randint(2, (256,))
    x = torch.randn(256, 64, 4).double()  # (sequences, tokens, in)
    x[..., 0] += 0.3 * (2 * labels[:, None] - 1)  # what there is to learn
    add_lora(model, 2)
    assert init_lora_da(model, [(x, labels)], lambda m, b: nn.functional.cross_entropy(
        m(b[0]).mean(dim=1), b[1])) > 1

# ---------------------------------------------------------------------------- whole models
def snapshot(model: nn.Module) -> list:
    """All that a call must leave as it was."""
    state = [torch.get_rng_state(), *(t.clone() for t in model.state_dict().values())]
    for parameter in model.parameters():
        state += [id(parameter), parameter.requires_grad, parameter.grad, id(parameter.grad)]
    for module in model.modules():
        state += [id(module), module.training, getattr(module, "scaling", None),
                  len(module._forward_hooks), len(module._backward_hooks)]
    return [s.clone() if isinstance(s, Tensor) else s for s in state]

def same(before: list, after: list) -> bool:
    return len(before) == len(after) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after))

def trained_net() -> Net:
    """In the middle of a training: gradients, mixed modes, a partly frozen adapter."""
    model = net()
    mean_loss(model, rows_of_data(5)).backward()
    model.drop.eval()
    model.k.lora_A.requires_grad_(False)
    model.norm.requires_grad_(True)
    return model

@pytest.mark.parametrize("call", [collect_statistics, line_search, *INITS])
@pytest.mark.parametrize(("spoil", "message"), [
    (lambda loss: 1 / 0, "division"), (lambda loss: loss * math.nan, "loss is .*nan"),
    (lambda loss: loss * torch.ones(2), "not a finite scalar"),
    (lambda loss: loss.item(), "not a finite scalar"), (Tensor.detach, "with a gradient")])
def test_a_call_that_fails_leaves_no_trace(call, spoil, message):
    """The loss goes wrong in the second batch; every tensor, mode, hook, flag is as before."""
    model, batches, calls = trained_net(), batched(rows_of_data(8), [4, 4]), []
    before, layers = snapshot(model), [lora_layers(model)] if call is collect_statistics else []

    def bad_loss(model, batch):
        calls.append(model.norm.train())  # modes, running means and gradients live on the twin
        loss = mean_loss(model, batch)
        return loss if len(calls) % 2 else spoil(loss)

    if call in (line_search, init_cntlora) and spoil is Tensor.detach:
        return  # they never look at a gradient
    with pytest.raises((ZeroDivisionError, ValueError), match=message):
        call(model, *layers, batches, bad_loss)
    assert same(before, snapshot(model)) and len(calls) in (2, 4)

@pytest.mark.parametrize(("init", "kwargs", "message"), [
    (init_lora_da, {"n_train": 0}, "'q': n_train 0"), (init_cntlora, {"damping": -1}, "'q': damp"),
    (init_lora_da, {"step": math.nan}, "NaN or"), (init_lora_da, {"batches": []}, "'q': no row"),
    (init_hrp, {"preheat_rank": 1}, r"'q': rank 2 is not in 1\.\.1"),
    (init_cntlora, {"rank_budget": 3}, "budget 3"), (init_hrp, {"batches": []}, "'q': B_high .* 0"),
    (init_lora_da, {"loss_fn": lambda model, batch: torch.zeros(())}, "loss is .* gradient"),
    (init_lora_da, {"batches": [(1e200 * eye(4)[:, :3] + 1, torch.ones(4).long())]},
     r"'q': input_moment \(3, 3\) holds NaN or Inf")])
def test_what_cannot_be_started_is_refused_and_nothing_changes(init, kwargs, message):
    model = trained_net()
    before, given = snapshot(model), {"batches": [rows_of_data(9)], "loss_fn": mean_loss, **kwargs}
    with pytest.raises(ValueError, match=message):
        init(model, **given)
    assert same(before, snapshot(model))

@pytest.mark.parametrize("init", INITS)
def test_a_layer_that_cannot_be_started_is_named_and_no_other_changes(init):
    """The last sees only zeros; none is reached; one is off; there is none."""
    model, data, hrp = trained_net(), [rows_of_data(9)], init is init_hrp
    handle = model.drop.register_forward_hook(lambda layer, args, h: h * 0)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'q': B_high" if hrp else "'head': damping 0.1 leaves Z"):
        init(model, data, mean_loss)
    assert same(before, snapshot(model))
    handle.remove()
    model.unused = LoRALinear(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="'unused': (no row|B_high .* is 0)"):
        init(model, data, mean_loss)
    with pytest.raises(ValueError, match="no LoRALinear|empty parameter list"):
        init(nn.Linear(2, 2), data, mean_loss)
    model.k.scaling = 0.0
    with contextlib.nullcontext() if hrp else pytest.raises(ValueError, match=r"0: \['k'\]"):
        init(model if not hrp else net(), data, mean_loss)  # HRP divides by no scaling

def test_lora_da_on_a_model_is_lora_da_on_its_statistics():
    """Each layer: s·BA = step times that of lora_da(G, Z, Y); n_train = rows unless given."""
    model, batches = net(), batched(rows_of_data(9), [4, 5])
    options = {"mask_fn": lambda b: b[1] != b[1][0]}  # labels tell which rows count
    totals = collect_statistics(model, lora_layers(model), batches, mean_loss, **options)
    for n_train, step in ((None, 1), (50, 0.5), (None, 0)):
        assert step == init_lora_da(model, iter(batches), mean_loss, n_train=n_train, variance=3.0,
                                    damping=0.2, step=step, **options)
        for name, layer in lora_layers(model).items():
            count, Z, G, Y = totals[name]
            B, A = lora_da(G, Z, Y, 2, n_train or count, variance=3.0, damping=0.2)
            assert near(layer.delta_weight(), step * B @ A) and near(layer.lora_A, A)

def test_cntlora_on_a_model_is_cntlora_on_its_moments_and_spends_a_rank_budget():
    model, batches, old = net(), batched(rows_of_data(30), [14, 16]), [rows_of_data(9, 1)]
    options, full = {"mask_fn": lambda b: b[1] != b[1][0]}, {}
    Z_f, Z_p = (collect_statistics(model, lora_layers(model), data, mean_loss, **options)
                for data in (batches, old))
    for pretrain, step in ((None, 1), (old, 0.5), (None, 0)):
        init_cntlora(model, batches, lambda m, b: m(b[0]), pretrain_batches=pretrain, damping=0.2,
                     step=step, **options)
        for name, layer in lora_layers(model).items():
            B, A = cntlora(layer.weight, Z_f[name].input_moment,
                           Z_p[name].input_moment if pretrain else None, rank=2, damping=0.2)
            assert near(layer.delta_weight(), step * B @ A) and near(layer.lora_A, A)
            full[name] = cntlora(layer.weight, Z_f[name].input_moment, rank=min(layer.weight.shape))
    for budget in range(len(full), 1 + sum(B.shape[1] for B, _ in full.values())):
        init_cntlora(model, batches, mean_loss, rank_budget=budget, step=1, **options)
        ranks = allocate_ranks({n: B.norm(dim=0) for n, (B, _) in full.items()}, budget)
        for name, layer in lora_layers(model).items():
            B, A = full[name]
            assert layer.rank == ranks[name]
            assert near(layer.delta_weight(), B[:, :layer.rank] @ A[:layer.rank])

@pytest.mark.parametrize(("train_A", "preheat_rank"), [(False, 3), (True, 3), (False, 2)])
def test_hrp_on_a_model_is_a_short_high_rank_training(train_A, preheat_rank):
    """Adam on B_high (and A_high) from 0, by hand on dense weights W + B_high·A_high."""
    model, batches = net().eval(), batched(rows_of_data(12), [4, 4, 4])
    layers, rng, factors = lora_layers(model), torch.Generator().manual_seed(5), {}
    model.remat = train_A  # activation checkpointing, reentrant or not, changes nothing
    init_hrp(model, batches, mean_loss, preheat_rank=preheat_rank, lr=0.1, train_A=train_A, seed=5)
    model.remat = None
    for name, layer in layers.items():
        shape = min(preheat_rank, *layer.weight.shape), layer.in_features
        A = (2 * torch.rand(shape, generator=rng) - 1) / shape[1]**0.5  # Kaiming-uniform, a = √5
        factors[name] = [torch.zeros(layer.out_features, shape[0]).double().requires_grad_(),
                         A.double().requires_grad_(train_A)]
    optimizer = torch.optim.Adam([t for f in factors.values() for t in f if t.requires_grad], 0.1)
    for batch in batches:
        optimizer.zero_grad()
        weights = {f"{n}.weight": layers[n].weight + B @ A for n, (B, A) in factors.items()}
        mean_loss(partial(torch.func.functional_call, pretrained(model), weights), batch).backward()
        optimizer.step()
    for name, layer in layers.items():
        B, A = (factor.detach() for factor in factors[name])
        V_t = torch.linalg.svd(B @ A).Vh[:2]
        assert not layer.lora_B.any() and near(layer.lora_A @ layer.lora_A.mT, eye(2))
        assert near(projector(layer.lora_A), V_t.mT @ V_t, 1e-5)

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("init", INITS)
def test_no_start_is_worse_than_the_pretrained_model(init, device):
    """By default: the mean loss over batches, found by `line_search` from the full step. And every
    base weight is bit for bit what it was."""
    def loss(model):
        return sum(mean_loss(model, batch).item() for batch in batches) / len(batches)

    old = {"pretrain_batches": [rows_of_data(9, 1, device)]} if init is init_cntlora else {}
    for seed in range(6):
        model, data = net(seed, device).eval(), rows_of_data(12, seed, device)
        batches = batched(data, [5, 5, 2])
        before, base = loss(pretrained(model)), pretrained(model).state_dict()
        assert abs(before - loss(model)) > 1e-3
        step = init(model, batches, mean_loss, **old)
        assert step in (None, 0.0, *(4.0**k for k in range(-5, 6)))
        assert loss(model) <= before + 1e-12
        assert any(layer.lora_B.any() for layer in lora_layers(model).values()) == bool(step)
        assert all(torch.equal(base[n], t) for n, t in model.state_dict().items()
                   if "lora" not in n)
        if init is not init_hrp:
            other = net(seed, device).eval()
            assert init(other, batches, mean_loss, step=1, **old) == 1
            assert step == line_search(other, iter(batches), mean_loss)
            assert all(near(a, b) for a, b in zip(other.parameters(), model.parameters()))

@pytest.mark.parametrize(("best", "step", "end"), [
    (1.0, 1.0, 9), (0.6, 0.25, 9), (0.3, 0.25, 9), (2.0**-10, 2.0**-10, 9), (2.0**-13, 0.0, 9),
    (4.0, 4.0, 9), (3.0, 4.0, 9), (2.4, 1.0, 9), (900.0, 1024.0, 2000), (5000.0, 1024.0, 2000),
    (-1.0, 0.0, 9), (1 / 64, 1 / 64, 0.1), (5.0, 4.0, 9)])
def test_the_line_search_takes_the_first_step_after_which_the_loss_stops_falling(best, step, end):
    """One weight, s·BA = 1, loss (t − best)²: of 4⁰, 4⁻¹, … the one before it rises; else 4¹, …"""
    model, seen = nn.Sequential(nn.Linear(1, 1, bias=False)).double(), []
    add_lora(model, 1, alpha=4)
    model[0].set_factors(eye(1) / 4, eye(1))

    def loss_fn(model, x):
        seen.append(t := (model(x) / x).mean() - model[0].weight.item())
        return (t - best).square() if t < end else t * math.nan  # no number is no progress

    assert line_search(model, iter([torch.ones(2, 1).double()]), loss_fn) == step
    assert near(model[0].delta_weight(), step * eye(1)) and len(seen) <= 8
    model[0].lora_B.data.zero_()
    assert line_search(model, [torch.ones(2, 1).double()], loss_fn) == 0  # nothing to be gained
    with pytest.raises(ValueError, match="batches is empty"):
        line_search(model, [], loss_fn)

@pytest.mark.parametrize("init", INITS)
def test_a_start_is_deterministic_and_draws_nothing_from_the_callers_generator(init):
    """The same bits whatever surrounds the call; HRP's seed alone changes HRP's directions."""
    batches, results = batched(rows_of_data(12), [6, 6]), []
    for outer, seed in ((1, {}), (2, {}), (2, {"seed": 1} if init is init_hrp else {})):
        model = net()
        torch.manual_seed(outer)
        with torch.no_grad() if outer == 2 else contextlib.nullcontext():
            init(model, batches, mean_loss, **seed)
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(outer).get_state())
        results.append([p.detach().clone() for p in model.parameters()])
    assert same(*results[:2]) and same(*results[1:]) == (init is not init_hrp)

@pytest.mark.parametrize(("init", "kwargs"), [
    (init_lora_da, {}), (init_cntlora, {"pretrain_batches": [rows_of_data(12, 1)]}),
    (init_cntlora, {"rank_budget": 9})])
def test_any_number_of_layers_a_pass_gives_the_same_bits(init, kwargs):
    results, batches, most = [], batched(rows_of_data(12), [6, 6]), []

    def collect(model, layers, *args, **options):
        most.append(len(layers))
        return collect_statistics(model, layers, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_init, "collect_statistics", collect)
        for size, expected in ((None, 4), (1, 1), (3, 3), (99, 4), (0, 4)):
            model = net()
            init(model, iter(batches), mean_loss, layers_per_pass=size, **kwargs)
            results.append([p.detach() for p in model.parameters()])
            assert max(most) == expected
            most.clear()
    assert all(same(results[0], other) for other in results[1:])

# ---------------------------------------------------------------------------- two processes
CALLS = {"lora_da": init_lora_da, "cntlora": init_cntlora, "hrp": partial(init_hrp, preheat_rank=3),
         "by layer": partial(init_lora_da, layers_per_pass=1)}

SHARDS = batched(rows_of_data(20), [4, 7, 6, 3])

def one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=60), world_size=2, rank=rank)
    results: dict = {}
    for name, init in CALLS.items():
        model = net()
        step = init(model, SHARDS[rank::2], mean_loss)
        results[name] = step, [p.detach() for p in model.parameters()]
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()

def test_two_processes_end_with_the_same_bits_and_with_those_of_one(tmp_path):
    """Bit for bit on both; to rounding what one process finds that sees all batches.
    HRP's step takes the mean of one batch from each: for one process, of losses of a pair."""
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]

    def pair_loss(model, pair):
        return (mean_loss(model, pair[0]) + mean_loss(model, pair[1])) / 2

    for name, init in CALLS.items():
        (step, first), (other_step, second) = (result[name] for result in results)
        model, data = net(), ([SHARDS[:2], SHARDS[2:]], pair_loss) if name == "hrp" else (
            SHARDS, mean_loss)
        assert init(model, *data) == step == other_step and same(first, second)
        assert all(near(a, b.detach(), 1e-6) for a, b in zip(first, model.parameters()))

# ---------------------------------------------------------------------------- other people's models
def hugging_face(kind: str, padding: int = 0) -> tuple[nn.Module, list[str], dict, Callable]:
    """A small random model, targets, a padded batch of three, and its mask_fn."""
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    tokens, labels = torch.randint(1, 64, (3, 7 + padding)), torch.tensor([0, 2, 1])
    tokens[:, :7] = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7 + padding) < torch.tensor([7, 5, 4])[:, None]
    batch = {"input_ids": tokens, "attention_mask": mask.long()}
    torch.manual_seed(0)
    if kind == "vit":
        config = hf.ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)
        batch = {"pixel_values": torch.randn(3, 3, 8, 8), "labels": labels}
        return hf.ViTForImageClassification(config), ["fc1", "fc2"], batch, lambda batch: None
    if kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(
            vocab_size=64, tie_word_embeddings=True, **sizes))
        targets, batch["labels"] = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], tokens
        batch["labels"] = tokens.where(mask, -100)
    else:
        model = hf.BertForSequenceClassification(hf.BertConfig(
            vocab_size=64, num_labels=3, **sizes))
        targets, batch["labels"] = ["query", "value", "output.dense", "intermediate.dense"], labels
    return model, targets, batch, lambda batch: batch["attention_mask"] == 1

@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_hugging_face_statistics_see_autograds_gradient_and_no_padding(kind):
    """G = ∂loss/∂W by autograd; three more columns of padding change no statistic."""
    totals = []
    for padding in (0, 3):
        model, targets, batch, mask_fn = hugging_face(kind, padding)
        layers = add_lora(model, 2, targets=targets)
        totals.append(collect_statistics(model, layers, [batch], lambda m, b: m(**b).loss,
                                         mask_fn=mask_fn))
    model.requires_grad_(True).eval()
    model(**batch).loss.backward()
    for name, layer in layers.items():
        short, long = (total[name] for total in totals)
        assert near(long.gradient, layer.weight.grad, 1e-4)
        assert short.count == long.count < batch.get("input_ids", torch.ones(99)).numel()
        assert all(near(a, b, 1e-4) for a, b in zip(short[1:], long[1:]))

@pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")  # renamed in transformers 5
@pytest.mark.parametrize(("kind", "dtype"), [
    ("llama", torch.float32), ("llama", torch.bfloat16), ("bert", torch.float32),
    ("vit", torch.float32)])
@pytest.mark.parametrize("init", INITS)
def test_a_hugging_face_model_starts_trains_and_merges(init, kind, dtype):
    """Never worse at the start, better ten steps later; merging changes no output, no base bit."""
    model, targets, batch, mask_fn = hugging_face(kind)
    model.to(dtype).eval()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, llama, half = model(**batch).loss.item(), kind == "llama", dtype == torch.bfloat16
    if llama:  # no dropout, so training mode computes the same, with checkpoints;
        model.gradient_checkpointing_enable()
        targets.append("lm_head")  # embedding and head are one Parameter, on the twin too
    add_lora(model, 2, alpha=4, targets=targets)
    init(model, [batch, batch], lambda m, b: m.train(llama)(**b).loss,
         **({} if init is init_hrp else {"mask_fn": mask_fn}))
    assert model(**batch).loss <= before + (0.01 if half else 1e-6)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.005)
    for _ in range(10):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    after = model(**batch)
    assert after.loss < before - 0.01
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
    assert near(merge_lora(model)(**batch).logits, after.logits, 0.05 if half else 1e-4)

def test_a_transposed_conv1d_is_refused_by_name():
    hf = pytest.importorskip("transformers")
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(TypeError, match="'transformer.h.0.attn.c_attn': Conv1D is not exactly"):
        add_lora(model, 2, targets=["c_attn"])
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())

# ---------------------------------------------------------------------------- the page
PAGE = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", PAGE, re.DOTALL)

@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_the_readmes_python_prints_what_the_readme_says(block, tmp_path):
    """Each ```python block runs by itself, under torchrun if it says so, and prints its ```text."""
    code, expected = BLOCKS[block]
    for package in {"transformers", "peft", "accelerate"} & set(re.findall(r"\w+", code)):
        pytest.importorskip(package)
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for launcher in [[], torchrun] if "torchrun" in code else [[]]:
        done = subprocess.run(
            [sys.executable, *launcher, "block.py"], cwd=tmp_path, check=True, stdout=-1,
            env={**os.environ, "PYTHONPATH": str(Path(lora_init.__file__).parent)})
        assert done.stdout.decode() == expected

def test_every_test_that_the_readme_names_exists():
    named = set(re.findall(r"test_[a-zA-Z_]+[a-zA-Z]\b(?!\.py)", PAGE)) - {"test_lora_init"}
    assert BLOCKS and len(named) > 10 and named <= set(globals())
