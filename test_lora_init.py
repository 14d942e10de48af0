# SPDX-License-Identifier: MIT
"""The theorems of `lora_init.py`, as properties.

Each test's name is the claim, its docstring the equation, and its oracle independent of the code:
a dense Kronecker solve, autograd, an SVD, brute force. Sizes, ranks, conditioning and seeds are
drawn by Hypothesis; arithmetic is float64, tolerances are relative, and subspaces are compared as
projectors, never as signed vectors. A claimed optimum has to beat random and perturbed rivals.
"""

import contextlib
import copy
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lora_init
from lora_init import (
    LoRALinear,
    add_lora,
    allocate_ranks,
    cntlora,
    collect_statistics,
    hrp,
    init_cntlora,
    init_hrp,
    init_lora_da,
    load_peft,
    lora_da,
    lora_layers,
    merge_lora,
    monge_map,
    save_peft,
)

settings.register_profile("here", deadline=None, max_examples=60)
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
        """Symmetric positive definite, with condition number `condition`."""
        values = torch.logspace(0, -math.log10(self.condition), n, dtype=torch.float64)
        Q = self.orthogonal(n)
        return (Q * values) @ Q.mT

    def low_rank(self) -> Tensor:
        return self.normal(self.n_out, self.rank) @ self.normal(self.rank, self.n_in)

    def positive(self, n: int) -> Tensor:
        return self.normal(n).exp()


@st.composite
def problems(draw: st.DrawFn, smallest: int = 1, square_at_least: bool = False) -> Problem:
    n_in = draw(st.integers(smallest, 9))
    n_out = draw(st.integers(n_in if square_at_least else smallest, 9))
    limit = min(n_in, n_out)
    rank = draw(st.sampled_from([1, limit, draw(st.integers(1, limit))]))
    seed = draw(st.integers(0, 2**32))
    return Problem(n_out, n_in, rank, draw(st.sampled_from([1.0, 10.0, 1e3])),
                   torch.Generator().manual_seed(seed))


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
    linear = nn.Linear(p.n_in, p.n_out, dtype=torch.float64)
    x = p.normal(*leading, p.n_in)
    before = linear.eval()(x)
    torch.manual_seed(p.rank)
    layer = LoRALinear(linear, p.rank)
    torch.manual_seed(p.rank)  # Kaiming-uniform, a = √5, and no other random number is drawn
    A = nn.init.kaiming_uniform_(torch.empty_like(layer.lora_A), a=math.sqrt(5))
    assert torch.equal(layer.lora_A, A) and A.abs().max() <= 1 / math.sqrt(p.n_in)
    assert torch.equal(layer(x), before) and not layer.training and layer.scaling == 1
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert layer.lora_A.requires_grad and layer.lora_B.requires_grad
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}


@given(problems(), st.floats(0.1, 30))
def test_forward_delta_weight_and_merged_are_one_function(p, alpha):
    """y = (W + s·BA) x + b, with s = alpha / r, also after factors of another rank."""
    layer, x = adapter(p, alpha), p.normal(2, 3, p.n_in)
    for rank in (p.rank, 1, min(p.n_in, p.n_out)):
        B, A = p.normal(p.n_out, rank), p.normal(rank, p.n_in)
        layer.set_factors(B, A)
        dense = layer.weight + alpha / p.rank * torch.einsum("or,ri->oi", B, A)
        y = torch.einsum("...i,oi->...o", x, dense) + layer.bias
        assert layer.rank == rank
        assert near(layer(x), y) and near(layer.delta_weight(), dense - layer.weight)
        state, merged = torch.get_rng_state(), layer.merged()
        assert torch.equal(state, torch.get_rng_state())
        assert type(merged) is nn.Linear and near(merged(x), y)
        assert merged.bias.data_ptr() != layer.bias.data_ptr()  # its own: it may be trained
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
    given_A = torch.ones(1, 4)
    layer.set_factors(torch.ones(3, 2), torch.ones(2, 4))
    assert layer.lora_A is A and layer.lora_B is B and A.sum() == 8 and B.sum() == 6
    layer.lora_A.requires_grad_(False)
    layer.set_factors(torch.ones(3, 1), given_A)
    assert layer.rank == 1 and not layer.lora_A.requires_grad and layer.lora_B.requires_grad
    given_A.zero_()
    assert layer.lora_A.sum() == 4  # a copy
    for B, A in ((torch.ones(3, 2), torch.ones(1, 4)), (torch.ones(3, 1), torch.ones(1, 5))):
        with pytest.raises(ValueError, match=r"B \(3, \d\), A \(1, \d\).*\(3, 4\)"):
            layer.set_factors(B, A)
    with pytest.raises(ValueError, match=r"rank 4 is not in 1\.\.3"):
        layer.set_factors(torch.ones(3, 4), torch.ones(4, 4))
    assert layer.lora_A.sum() == 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_factors_are_float32_at_least_and_the_output_keeps_its_dtype(dtype, device):
    linear = nn.Linear(4, 3, dtype=dtype, device=device)
    layer, x = LoRALinear(linear, 2), torch.ones(2, 4, dtype=dtype, device=device)
    assert layer.lora_A.dtype == torch.promote_types(dtype, torch.float32)
    assert layer(x).dtype == dtype == layer.merged().weight.dtype
    with torch.autocast(device, torch.bfloat16):
        assert layer(x).dtype == linear(x).dtype  # bfloat16, but float64 is left alone


def test_an_encoder_layer_that_reads_weights_past_its_layers_is_refused():
    """PyTorch's fast path in eval mode would leave the adapters silently dead."""
    model = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
    with pytest.raises(TypeError, match="'linear1': .*set_fastpath_enabled"):
        add_lora(model, 2)
    assert all(p.requires_grad for p in model.parameters())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for layer in add_lora(model.eval(), 2).values():
            layer.set_factors(torch.ones(4, 2), torch.ones(2, 4))
        x = torch.randn(1, 3, 4)
        with torch.no_grad():
            adapted = model(x)
            assert torch.allclose(adapted, merge_lora(model)(x), atol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class Tiny(nn.Module):
    """An encoder with attention, one layer under two names, and a head."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(12)])
        self.tied = self.layers[1]
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x)[0]
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(self.tied(x))


def test_add_lora_takes_names_suffixes_and_predicates():
    everything = add_lora(Tiny(), 2)  # the attention's out_proj is a subclass, its forward bypassed
    assert set(everything) == {*(f"layers.{i}" for i in range(12)), "head"}
    assert set(add_lora(Tiny(), 2, targets=["layers.1", "head"])) == {"layers.1", "head"}
    assert set(add_lora(Tiny(), 2, targets="1")) == {"layers.1"}  # not layers.11
    model = Tiny()
    assert add_lora(model, 2, targets="tied") == {"tied": model.layers[1]}  # by its other name
    model = Tiny()
    adapters = add_lora(model, 2, alpha=8, targets=lambda name: name.endswith(".1"))
    assert adapters == lora_layers(model) == {"layers.1": model.layers[1]}
    assert model.tied is model.layers[1] and model.tied.scaling == 4
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "layers.1.lora_A", "layers.1.lora_B"}
    model.layers[1].lora_A.requires_grad_(False)
    add_lora(model, 1, targets=["head"])  # a second call leaves the first adapter as it was
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "layers.1.lora_B", "head.lora_A", "head.lora_B"}


def test_merge_lora_gives_the_same_function_in_plain_layers():
    torch.manual_seed(0)
    model, x = Tiny().double().eval(), torch.randn(2, 3, 6).double()
    for layer in add_lora(model, 2, alpha=3).values():
        layer.set_factors(torch.randn(layer.out_features, 2), torch.randn(2, 6))
    expected = model(x)
    assert merge_lora(model) is model and not lora_layers(model)
    assert model.tied is model.layers[1] and type(model.tied) is nn.Linear
    assert not any(p.requires_grad for p in model.parameters()) and not model.tied.training
    assert near(model(x), expected)
    with pytest.raises(TypeError, match="merged"):
        merge_lora(LoRALinear(nn.Linear(2, 2), 1))


def conv1d() -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(3, 4))
    return module


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"targets": ["heads"]}, ValueError, "'heads' matches no module.*near names: head"),
    ({"targets": []}, ValueError, "matches no module"),
    ({"targets": lambda name: False}, ValueError, "the predicate"),
    ({"targets": ["attention.out_proj"]}, TypeError, "'attention.out_proj' is NonDyn"),
    ({"targets": ["layers"]}, TypeError, "'layers' is ModuleList"),
    ({"targets": ["layers.0", "odd"]}, TypeError, "'odd' is Module, not exactly nn.Linear.*Conv1D"),
    ({"targets": ["layers.0", "meta"]}, TypeError, "'meta'.*on meta"),
    ({"targets": ["head"], "rank": 5}, ValueError, r"'head': rank 5 is not in 1\.\.4"),
    ({"rank": 2.0}, TypeError, "integer"),
    ({"rank": 0}, ValueError, r"'head': rank 0 is not in 1\.\.4"),
    ({"alpha": 0.0}, ValueError, "alpha 0.0"),
    ({"alpha": math.inf}, ValueError, "alpha inf"),
])
def test_what_cannot_be_adapted_is_refused_by_name_and_nothing_changes(kwargs, error, message):
    model = Tiny()
    model.odd, model.meta = conv1d(), nn.Linear(2, 2, device="meta")
    with pytest.raises(error, match=message):
        add_lora(model, **{"rank": 2, "targets": ["head"], **kwargs})
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("module", "rank", "alpha", "error"), [
    (conv1d(), 1, None, TypeError), (nn.Linear(3, 2), 3, None, ValueError),
    (nn.Linear(3, 2), 1, -1.0, ValueError)])
def test_a_layer_made_alone_is_checked_too(module, rank, alpha, error):
    with pytest.raises(error, match="'linear'"):
        LoRALinear(module, rank, alpha)


# ---------------------------------------------------------------------------- LoRA-DA


@given(problems())
def test_lora_da_reaches_the_target_in_one_step(p):
    """y = W*x + unit noise, W* = W + low rank: G = (W − W*) Z, Y = 1, and BA = W* − W for any Z."""
    change, Z = p.low_rank(), p.spd(p.n_in)
    B, A = lora_da(-change @ Z, Z, torch.ones(p.n_out), p.rank, 1, variance=0, damping=0)
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


@given(problems())
def test_the_newton_step_solves_the_dense_kronecker_system(p):
    """(diag(Y) ⊗ Z) vec Δ = −vec G, damped: C + damping·mean(diag C)·I."""
    G, Z, Y = p.normal(p.n_out, p.n_in), p.spd(p.n_in), p.positive(p.n_out)
    J = torch.kron(torch.diag(Y) + 0.3 * Y.mean() * eye(p.n_out),
                   Z + 0.3 * Z.trace() / p.n_in * eye(p.n_in))
    delta = -torch.linalg.solve(J, G.flatten()).view(p.n_out, p.n_in)
    B, A = lora_da(G, Z, Y, min(p.n_out, p.n_in), 1, variance=0, damping=0.3)
    assert near(B @ A, delta)


@given(problems(smallest=2), st.integers(1, 100), st.sampled_from([0.0, 0.5, 1.0, 10.0]))
def test_no_other_orthonormal_A_has_a_smaller_objective(p, n_train, variance):
    """tr(AΩAᵀ) is least, for Ω = variance/N·tr(Y⁻¹)·Z⁻¹ − ΔᵀΔ built by dense inverses; B = ΔAᵀ."""
    G, Z, Y = p.normal(p.n_out, p.n_in), p.spd(p.n_in), p.positive(p.n_out)
    B, A = lora_da(G, Z, Y, p.rank, n_train, variance=variance, damping=0.1)
    Z_inverse = torch.linalg.inv(Z + 0.1 * Z.diagonal().mean() * eye(p.n_in))
    y = Y + 0.1 * Y.mean()
    delta = -torch.diag(1 / y) @ G @ Z_inverse
    omega = variance / n_train * (1 / y).sum() * Z_inverse - delta.mT @ delta

    def objective(rows: Tensor) -> Tensor:
        return (rows @ omega @ rows.mT).trace()

    assert near(A @ A.mT, eye(p.rank)) and near(B, delta @ A.mT)
    room = 1e-9 * omega.norm()
    skew = p.normal(p.n_in, p.n_in)
    for rival in (p.orthogonal(p.n_in, p.rank).mT, A @ torch.matrix_exp(1e-3 * (skew - skew.mT)),
                  A @ torch.matrix_exp(0.3 * (skew - skew.mT))):
        assert objective(A) <= objective(rival) + room
    assert (objective(A) - torch.linalg.eigvalsh(omega)[: p.rank].sum()).abs() <= room


@given(problems())
def test_identity_fisher_gives_the_gradients_singular_vectors(p):
    """Y = Z = I, variance = 0: the span of LoRA-GA and LoRA-One."""
    G = p.normal(p.n_out, p.n_in)
    _, A = lora_da(G, eye(p.n_in), torch.ones(p.n_out), p.rank, 1, variance=0)
    assert near(projector(A), top_right(G, p.rank), 1e-6)


def lora_da_is_unique(p: Problem, G: Tensor, Z: Tensor, Y: Tensor) -> Tensor:
    """A's projector, where Ω has a gap behind its r-th eigenvalue."""
    Z_d, Y_d = Z + 0.1 * Z.trace() / p.n_in * eye(p.n_in), Y + 0.1 * Y.mean()
    delta = G @ torch.linalg.inv(Z_d) / Y_d[:, None]
    values = torch.linalg.eigvalsh(
        0.1 * (1 / Y_d).sum() * torch.linalg.inv(Z_d) - delta.mT @ delta)
    assume(p.rank == p.n_in or values[p.rank] - values[p.rank - 1] > 1e-4 * values.abs().max())
    return projector(lora_da(G, Z, Y, p.rank, 10)[1])


@given(problems())
def test_lora_da_turns_with_the_input_basis(p):
    """x → Qx with Q orthogonal: A → A Qᵀ, B A → B A Qᵀ."""
    G, Z, Y, Q = p.normal(p.n_out, p.n_in), p.spd(p.n_in), p.positive(p.n_out), p.orthogonal(p.n_in)
    P = lora_da_is_unique(p, G, Z, Y)
    B, A = lora_da(G, Z, Y, p.rank, 10)
    B_turned, A_turned = lora_da(G @ Q.mT, Q @ Z @ Q.mT, Y, p.rank, 10)
    assert near(projector(A_turned), Q @ P @ Q.mT, 1e-6)
    assert near(B_turned @ A_turned, B @ A @ Q.mT, 1e-6)


@given(problems(), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_units_change_no_subspace(p, unit, loss_unit):
    """x → cx, loss → d·loss: Z → c²Z, G → cdG, Y → d²Y; A's span stays and BA → BA / (cd)."""
    G, Z, Y = p.normal(p.n_out, p.n_in), p.spd(p.n_in), p.positive(p.n_out)
    P = lora_da_is_unique(p, G, Z, Y)
    B, A = lora_da(G, Z, Y, p.rank, 10)
    B_2, A_2 = lora_da(unit * loss_unit * G, unit**2 * Z, loss_unit**2 * Y, p.rank, 10)
    assert near(projector(A_2), P, 1e-6)
    assert near(unit * loss_unit * B_2 @ A_2, B @ A, 1e-6)


@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_the_variance_term_lowers_the_error_on_few_noisy_rows(damping):
    """Mean of ‖B̂A − Δ‖² over 60 draws of 32 rows, noise σ = 0.5, B̂ the least-squares fit."""
    p, sigma, rows = Problem(8, 24, 4, 1e2, torch.Generator().manual_seed(0)), 0.5, 32
    errors = {0.0: [], 1.0: []}
    for _ in range(60):
        change, Z = p.low_rank() / 40, 7 * p.spd(24)
        x = p.normal(rows, 24) @ torch.linalg.cholesky(Z).mT  # (rows, in)
        y = x @ change.mT + sigma * p.normal(rows, 8)  # (rows, out), the target; W = 0
        g = -y / sigma**2  # (rows, out), since −log p = ‖y − Wx‖² / 2σ²
        for variance, error in errors.items():
            _, A = lora_da(g.mT @ x / rows, x.mT @ x / rows, torch.ones(8) / sigma**2, 4, rows,
                           variance=variance, damping=damping)
            fit = torch.linalg.lstsq(x @ A.mT, y).solution.mT  # (out, r)
            error.append((fit @ A - change).square().sum().item())
    assert sum(errors[1.0]) < 0.7 * sum(errors[0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", ["gap", "no gap", "rank 3", "ill-conditioned", "clustered"])
def test_wide_layers_get_the_eigenvectors_of_eigh(spectrum, dtype):
    """n = 1100 > 1024, the iterative way: orthonormal, and the trace is the least there is."""
    n, rank = 1100, 5
    p = Problem(n, n, rank, 1.0, torch.Generator().manual_seed(0))
    values = torch.linspace(0, 1, n, dtype=torch.float64)
    if spectrum == "gap":
        values[:rank] -= 1.0
    elif spectrum == "rank 3":  # as for a gradient of few rows: the Krylov space ends early
        values = torch.cat([torch.tensor([-3.0, -2.0, -1.0]), torch.zeros(n - 3)]).double()
    elif spectrum == "ill-conditioned":  # eleven decades, the lowest well apart
        values = -torch.logspace(0, -11, n, dtype=torch.float64, base=10) ** 4
    elif spectrum == "clustered":  # five equal eigenvalues: any basis of their space will do
        values = 1e-3 * torch.cat([-torch.ones(rank), torch.linspace(-0.5, 0, n - rank)]).double()
    Q, calls = p.orthogonal(n), []

    def apply(V: Tensor) -> Tensor:
        calls.append(V.shape[1])
        return ((Q * values) @ (Q.mT @ V.double())).to(dtype)

    V = lora_init._lowest_eigenvectors(apply, rank, Q.to(dtype)).double()
    assert (n in calls) == (spectrum == "no gap")  # the exact way after all
    assert near(V.mT @ V, eye(rank), 1e-5)
    image, size = (Q * values) @ (Q.mT @ V), values.abs().max()
    assert abs((V * image).sum() - values[:rank].sum()) < 1e-5 * size
    residual = (image - V @ (V.mT @ image)).norm(dim=0).max()
    assert residual <= 2e-5 * size
    if spectrum not in ("no gap", "rank 3"):
        assert near(V @ V.mT, Q[:, :rank] @ Q[:, :rank].mT, 1e-3)


@pytest.mark.parametrize("rank", [60, 61, 600, 1100])
def test_wide_layers_at_high_ranks_too(rank):
    """Up to the limit: too many vectors for the iterative way leave the exact one."""
    values = torch.linspace(-1, 1, 1100, dtype=torch.float64) ** 3
    V = lora_init._lowest_eigenvectors(lambda V: values[:, None] * V, rank, eye(1100))
    assert near(V.mT @ V, eye(rank), 1e-8)
    assert abs((values[:, None] * V * V).sum() - values[:rank].sum()) < 1e-4


def test_wide_layers_get_the_singular_vectors_of_the_svd():
    """in = 1100, out = 1050: CNTLoRA's factors and the scale's norm, against full SVDs."""
    p = Problem(1050, 1100, 3, 1e2, torch.Generator().manual_seed(0))
    W, Z_p = p.normal(1050, 1100).float(), p.spd(1100)
    S = eye(1100) + p.normal(1100, 3) @ p.normal(3, 1100) / 300
    Z_f = (S @ Z_p @ S.mT).float()
    B, A = cntlora(W, Z_f, Z_p.float(), rank=3, damping=0.1)
    damped = [Z.double() + 0.1 * Z.double().diagonal().mean() * eye(1100) for Z in (Z_f, Z_p)]
    L = torch.linalg.cholesky(damped[0])
    weighted = W.double() @ (monge_map(*damped) - eye(1100)) @ L
    left = (weighted - B.double() @ (A.double() @ L)).norm()
    assert left <= 1.0001 * torch.linalg.svdvals(weighted)[3:].norm()
    norm, length = (torch.linalg.matrix_norm(M, 2) for M in (W, B @ A))
    shortened = lora_init._shortened(B, A, W, (0.5 * length / norm).item())
    assert 0.98 * 0.5 <= (shortened.norm() / B.norm()) <= 0.5
    small, scale = 1e-6 * B.double(), (0.5 * length / norm).item()  # and whatever the units
    assert near(lora_init._shortened(small, A.double(), 1e-6 * W, scale), small / 2, 0.02)
    assert not lora_init._shortened(0 * B, A, 0 * W, 0.01).any()


def test_the_functions_take_keywords():
    p = Problem(4, 3, 2, 10.0, torch.Generator().manual_seed(0))
    G, Z, Y = p.normal(4, 3), p.spd(3), p.positive(4)
    for by_name, by_place in (
            (lora_da(gradient=G, input_moment=Z, output_fisher=Y, rank=2, n_train=9),
             lora_da(G, Z, Y, 2, 9)),
            (hrp(B_high=G, A_high=Z, rank=2), hrp(G, Z, 2)),
            (cntlora(weight=G, input_moment=Z, rank=2), cntlora(G, Z, rank=2))):
        assert all(torch.equal(a, b) for a, b in zip(by_name, by_place))


def test_autocast_does_not_reach_into_the_functions():
    """In half precision a subspace, a square root or a Newton step would be off by percents."""
    p = Problem(4, 3, 2, 10.0, torch.Generator().manual_seed(0))
    G, Z, Y = (t.float() for t in (p.normal(4, 3), p.spd(3), p.positive(4)))

    def results() -> list[Tensor]:
        return [*lora_da(G, Z, Y, 2, 9), *hrp(G, Z, 2), *cntlora(G, Z, 2 * Z + Y[0], rank=2),
                monge_map(Z, 2 * Z + Y[0])]

    outside = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(results(), outside))


def test_what_is_left_out_is_what_the_pages_say():
    """The theory's weight 1, damping 0.1, a step of 1 %, rank 64 at rate 0.002, a guard, seed 0."""
    model = {"damping": 0.1, "scale": 0.01, "guard": True, "seed": 0, "mask_fn": None,
             "layers_per_pass": None}
    for function, expected in {
            lora_da: {"variance": 1.0, "damping": 0.1}, cntlora: {"damping": 0.1},
            init_lora_da: {"variance": 1.0, "n_train": None, "identity_fisher": False, **model},
            init_hrp: {"preheat_rank": 64, "lr": 0.002, "train_A": False, "seed": 0},
            init_cntlora: {"pretrain_batches": None, "rank_budget": None, **model}}.items():
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in expected} == expected


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


def frozen_residual(change: Tensor, A: Tensor) -> Tensor:
    """min over B of ‖D − BA‖."""
    return (change - change @ torch.linalg.pinv(A) @ A).norm()


def preheat(p: Problem, change: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """The minimum over B_high of ½‖D − B_high A_high‖² at a random, frozen A_high."""
    A_high = p.normal(high, p.n_in)
    return change @ torch.linalg.pinv(A_high), A_high


@given(problems(square_at_least=True))
def test_preheated_to_convergence_at_full_rank_hrp_is_optimal(p):
    """R = in: min_B ‖D − BA‖² = Σ_{k>r} σ_k², the Eckart–Young optimum."""
    change = p.normal(p.n_out, p.n_in)
    _, A = hrp(*preheat(p, change, p.n_in), p.rank)
    optimum = torch.linalg.svdvals(change)[p.rank:].norm()
    assert (frozen_residual(change, A) - optimum).abs() <= 1e-6 * change.norm()


def test_the_residual_falls_as_the_preheating_rank_grows():
    """The mean over 60 draws of min_B ‖D − BA‖, for R = r, 2r, 4r, in."""
    p = Problem(20, 16, 2, 1.0, torch.Generator().manual_seed(0))
    means = []
    for high in (2, 4, 8, 16):
        changes = [p.low_rank() + 0.1 * p.normal(20, 16) for _ in range(60)]
        residuals = [frozen_residual(D, hrp(*preheat(p, D, high), 2)[1]) for D in changes]
        means.append(sum(residuals) / 60)
    assert means[0] > 1.05 * means[1] > 1.05**2 * means[2] > 1.05**3 * means[3], means


# ---------------------------------------------------------------------------- CNTLoRA


@given(problems())
def test_the_monge_map_carries_one_moment_to_the_other(p):
    """T = Tᵀ ≻ 0 and T Z_f Tᵀ = Z_p; it equals Z_f^−½ (Z_f^½ Z_p Z_f^½)^½ Z_f^−½."""
    Z_f, Z_p = p.spd(p.n_in), 3 * p.spd(p.n_in)
    T = monge_map(Z_f, Z_p)
    assert near(T, T.mT) and torch.linalg.eigvalsh(T)[0] > 0 and near(T @ Z_f @ T.mT, Z_p)

    def power(moment: Tensor, exponent: float) -> Tensor:
        values, vectors = torch.linalg.eigh(moment)
        return (vectors * values**exponent) @ vectors.mT

    assert not monge_map(Z_f.clone().requires_grad_(), Z_p).requires_grad
    assert not monge_map(Z_f, 0 * Z_p).any()
    assert monge_map(Z_f, Z_p[:, :1] @ Z_p[:1]).isfinite().all()  # of rank 1, up to rounding
    half, inverse_half = power(Z_f, 0.5), power(Z_f, -0.5)
    assert near(T, inverse_half @ power(half @ Z_p @ half, 0.5) @ inverse_half, 1e-6)


@given(problems(smallest=2))
def test_no_other_map_moves_less(p):
    """E‖Tx − x‖² = tr((T−I) Z_f (T−I)ᵀ) is least among T′ = Z_p^½ Q Z_f^−½, Q orthogonal."""
    Z_f, Z_p = p.spd(p.n_in), p.spd(p.n_in)
    L_f, L_p = torch.linalg.cholesky(Z_f), torch.linalg.cholesky(Z_p)
    T = monge_map(Z_f, Z_p)

    def moved(map_: Tensor) -> Tensor:
        return ((map_ - eye(p.n_in)) @ L_f).square().sum()

    skew = p.normal(p.n_in, p.n_in)
    Q = torch.linalg.inv(L_p) @ T @ L_f  # T = L_p Q L_f⁻¹
    for turn in (p.orthogonal(p.n_in), Q, Q @ torch.matrix_exp(1e-2 * (skew - skew.mT))):
        assert moved(T) <= moved(L_p @ turn @ torch.linalg.inv(L_f)) + 1e-9


@given(problems(), st.booleans())
def test_output_moments_match(p, known):
    """(W+ΔW) Z_f (W+ΔW)ᵀ = W Z_p Wᵀ; without pre-training data Z_p = mean(diag Z_f)·I."""
    W, Z_f, Z_p = p.normal(p.n_out, p.n_in), p.spd(p.n_in), p.spd(p.n_in)
    B, A = cntlora(W, Z_f, Z_p if known else None, rank=min(p.n_in, p.n_out), damping=0)
    if not known:
        Z_p = Z_f.diagonal().mean() * eye(p.n_in)
    assert near((W + B @ A) @ Z_f @ (W + B @ A).mT, W @ Z_p @ W.mT, 1e-6)
    size = min(p.n_in, p.n_out)
    damped = [Z + 0.2 * Z.trace() / p.n_in * eye(p.n_in) for Z in (Z_f, Z_p)]
    if known:
        B, A = cntlora(W, Z_f, Z_p, rank=size, damping=0.2)
        assert near((W + B @ A) @ damped[0] @ (W + B @ A).mT, W @ damped[1] @ W.mT, 1e-6)


@given(problems())
def test_a_symmetric_distortion_is_undone_exactly(p):
    """x_f = S x_p, S = I + r terms, symmetric positive definite: (W + BA) S = W at rank r."""
    W, Z_p = p.normal(p.n_out, p.n_in), p.spd(p.n_in)
    Q = p.orthogonal(p.n_in, p.rank)
    S = eye(p.n_in) + (Q * (p.positive(p.rank) - 0.9 * (p.normal(1) > 0))) @ Q.mT
    assume(torch.linalg.eigvalsh(S)[0] > 0.05)
    B, A = cntlora(W, S @ Z_p @ S, Z_p, rank=p.rank, damping=0)
    assert near((W + B @ A) @ S, W, 1e-6)


@given(problems(), st.sampled_from([0.0, 0.1]))
def test_no_shift_needs_no_change(p, damping):
    """Z_f = Z_p: T = I, ΔW = 0; B = 0 but A is no zero, from where nothing could be learned."""
    W, Z = p.normal(p.n_out, p.n_in), p.spd(p.n_in)
    B, A = cntlora(W, Z, Z, rank=p.rank, damping=damping)
    assert (B @ A).norm() <= 1e-8 * W.norm() and torch.linalg.matrix_rank(A) == p.rank


@given(problems())
def test_no_rival_factors_are_nearer(p):
    """‖(ΔW − BA) Z_f^½‖ is least at rank r; A Z_f Aᵀ = I; ‖column k of B‖ = σ_k."""
    W, Z_f, Z_p = p.normal(p.n_out, p.n_in), p.spd(p.n_in), p.spd(p.n_in)
    delta = W @ monge_map(Z_f, Z_p) - W
    B, A = cntlora(W, Z_f, Z_p, rank=p.rank, damping=0)
    values, vectors = torch.linalg.eigh(Z_f)
    root = (vectors * values.sqrt()) @ vectors.mT

    def distance(B: Tensor, A: Tensor) -> Tensor:
        return ((delta - B @ A) @ root).norm()

    spectrum = torch.linalg.svdvals(delta @ root)
    assert near(A @ Z_f @ A.mT, eye(p.rank)) and near(B.norm(dim=0), spectrum[: p.rank], 1e-6)
    assert (distance(B, A) - spectrum[p.rank:].norm()).abs() <= 1e-6 * spectrum.norm()
    for size in (1e-3, 1.0):
        rival = B + size * p.normal(*B.shape), A + size * p.normal(*A.shape)
        assert distance(B, A) <= distance(*rival) + 1e-9


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.0, 5.0]), min_size=1, max_size=5),
                min_size=1, max_size=4), st.data())
def test_no_swap_of_a_rank_does_better(lists, data):
    """Σ over layers of Σ_{k>r} σ_k² is least for Σ r = budget, each r ≥ 1: all swaps are tried."""
    spectra = {str(i): torch.tensor(sorted(s, reverse=True)) for i, s in enumerate(lists)}
    most = sum(len(s) for s in lists)
    budget = data.draw(st.integers(len(lists), most))
    ranks = allocate_ranks(spectra, budget)
    assert sum(ranks.values()) == budget
    assert all(1 <= ranks[n] <= len(s) for n, s in spectra.items())

    def left_out(ranks: dict[str, int]) -> float:
        return sum(s[ranks[n]:].square().sum().item() for n, s in spectra.items())

    for a in ranks:
        for b in ranks:
            swapped = {**ranks, a: ranks[a] - 1}
            swapped[b] += 1
            if swapped[a] >= 1 and swapped[b] <= len(spectra[b]):
                assert left_out(ranks) <= left_out(swapped)
    for wrong in (len(lists) - 1, most + 1):
        with pytest.raises(ValueError, match=f"budget {wrong}"):
            allocate_ranks(spectra, wrong)


@pytest.mark.parametrize(("call", "message"), [
    (lambda G, Z, Y: lora_da(G, Z, Y, 3, 1), r"rank 3 is not in 1\.\.2"),
    (lambda G, Z, Y: lora_da(G, Z, Y, 1, 0), "n_train 0"),
    (lambda G, Z, Y: lora_da(G, Z, Y, 1, 1, variance=-1), "variance -1"),
    (lambda G, Z, Y: lora_da(G, Z, Y, 1, 1, damping=-0.01), "damping -0.01"),
    (lambda G, Z, Y: lora_da(G, Z[:2, :2], Y, 1, 1), r"moment has .*\(2, 2\), expected \(3, 3\)"),
    (lambda G, Z, Y: lora_da(G, Z, Y[:1], 1, 1), r"fisher has shape \(1,\), expected \(2,\)"),
    (lambda G, Z, Y: lora_da(G / 0, Z, Y, 1, 1), r"gradient \(2, 3\) holds NaN or Inf"),
    (lambda G, Z, Y: lora_da(G, 0 * Z, Y, 1, 1), "not positive definite at damping 0.1"),
    (lambda G, Z, Y: lora_da(G, Z, Y - eye(2)[0], 1, 1, damping=0), "output_fisher.*not positive"),
    (lambda G, Z, Y: lora_da(G, Z, 1e-310 * Y.double(), 1, 1), "too small to be inverted"),
    (lambda G, Z, Y: hrp(G, G, 1), r"A_high has|B_high has"),
    (lambda G, Z, Y: hrp(G[:, :1], G[:1], 2), "preheating rank 1"),
    (lambda G, Z, Y: hrp(G, Z, 3), r"rank 3 is not in 1\.\.2"),
    (lambda G, Z, Y: hrp(G @ G.mT, G * math.inf, 1), "A_high.*NaN or Inf"),
    (lambda G, Z, Y: cntlora(G, Z, rank=0), "rank 0"),
    (lambda G, Z, Y: cntlora(G, Z, Y, rank=1), r"pretrain_moment has shape \(2,\)"),
    (lambda G, Z, Y: cntlora(G, 0 * Z, rank=1), "raise damping"),
    (lambda G, Z, Y: cntlora(G, Z, rank=1, damping=math.inf), "damping inf"),
])
def test_numbers_and_shapes_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3), eye(3), torch.ones(2))


# ---------------------------------------------------------------------------- statistics


class Net(nn.Module):
    """Two parallel layers on one input, one layer used twice, dropout, an in-place activation."""

    def __init__(self, remat: bool | None = None, width: int = 4):
        super().__init__()
        self.q, self.k = nn.Linear(3, width), nn.Linear(3, width)
        self.twice = nn.Linear(width, width)
        self.norm, self.drop, self.remat = nn.BatchNorm1d(width), nn.Dropout(0.5), remat
        self.head = nn.Linear(width, 3)

    def middle(self, h: Tensor) -> Tensor:
        return self.twice(self.twice(h).tanh())

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.relu_(self.q(x)) * self.k(x).sigmoid()
        h = self.norm(h.flatten(0, -2)).view(h.shape)
        h = self.middle(h) if self.remat is None else checkpoint(
            self.middle, h, use_reentrant=self.remat)
        return self.head(input=self.drop(h))


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, labels = batch
    return nn.functional.cross_entropy(model(x).flatten(0, -2), labels.flatten())


def net(seed: int = 0, device: str = "cpu", remat: bool | None = None) -> Net:
    torch.manual_seed(seed)
    model = Net(remat).to(device, torch.float64)
    for layer in add_lora(model, 2, alpha=3).values():  # adapters hold something, not the start
        layer.set_factors(torch.randn(layer.out_features, 2), torch.randn(2, layer.in_features))
    return model


def rows_of_data(n: int, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    return x.to(device), torch.randint(3, (n,), generator=g).to(device)


def statistics_row_by_row(model: Net, data: tuple[Tensor, Tensor]) -> dict[str, list[Tensor]]:
    """The oracle: for each row of data its own backward pass of −log p; then plain means."""
    model = copy.deepcopy(model).eval()
    for layer in lora_layers(model).values():
        layer.set_factors(0 * layer.lora_B, layer.lora_A)
    seen: dict[str, list] = {name: [] for name in lora_layers(model)}

    def keep(name):
        def hook(layer, args, kwargs, y):
            y.retain_grad()
            seen[name].append((*args, *kwargs.values(), y))
            return y.clone()  # which the model may change in place
        return hook

    for name, layer in lora_layers(model).items():
        layer.register_forward_hook(keep(name), with_kwargs=True)
    for x, label in zip(*data):
        mean_loss(model, (x[None], label[None])).backward()
    means = {}
    for name, pairs in seen.items():
        x, g = (torch.cat(t).detach() for t in ([a for a, _ in pairs], [y.grad for _, y in pairs]))
        means[name] = [sum(torch.outer(a, a) for a in x) / len(x),
                       sum(torch.outer(b, a) for a, b in zip(x, g)) / len(x),
                       sum(b * b for b in g) / len(x), len(x)]
    return means


def batched(data: tuple[Tensor, Tensor], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(t.split(sizes) for t in data)))


def same_statistics(actual: dict, expected: dict, tolerance: float = 1e-9) -> bool:
    return list(actual) == list(expected) and all(
        total.count == rows and near(total.input_moment, Z, tolerance)
        and near(total.gradient, G, tolerance) and near(total.output_fisher, Y, tolerance)
        for total, (Z, G, Y, rows) in zip(actual.values(), (expected[n] for n in actual)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("remat", [None, False, True])
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_statistics_are_per_row_means_however_rows_are_batched(device, remat, sizes, seed):
    """Z, G, Y from one pass = sums over single-row autograd, with checkpointing or without."""
    model, data = net(seed, device), rows_of_data(sum(sizes), seed, device)
    expected = statistics_row_by_row(model, data)
    model.remat = remat
    actual = collect_statistics(model, lora_layers(model), batched(data, sizes), mean_loss)
    assert same_statistics(actual, expected)
    model.remat = None
    forward = collect_statistics(model, lora_layers(model), batched(data, sizes),
                                 lambda m, b: m(b[0]), backward=False)
    assert all(near(forward[n].input_moment, expected[n][0]) and forward[n].gradient is None
               and forward[n].count == expected[n][3] for n in expected)


@given(st.integers(0, 99))
def test_masked_rows_do_not_count(seed):
    """Rows where mask_fn is False leave no mark, whatever they hold."""
    model, data = net(seed), rows_of_data(12, seed)
    mask = torch.rand(12, generator=torch.Generator().manual_seed(seed)) < 0.6
    assume(mask.view(2, 6).any(dim=1).all())
    expected = statistics_row_by_row(model, tuple(t[mask] for t in data))

    def masked_loss(model, batch):
        x, labels, keep = batch
        return nn.functional.cross_entropy(model(x)[keep], labels[keep])

    batches = batched((torch.where(mask[:, None], data[0], 1e6), data[1], mask), [6, 6])
    actual = collect_statistics(model, lora_layers(model), batches, masked_loss,
                                mask_fn=lambda batch: batch[2])
    assert same_statistics(actual, expected)
    x = data[0]  # one tensor for two layers, and in two batches, under two masks
    both = collect_statistics(model, {"q": model.q, "k": model.k}, [mask],
                              lambda m, _: m.q(x) + m.k(x), backward=False,
                              mask_fn=lambda batch: {"q": batch, "k": None})
    assert near(both["q"].input_moment, x[mask].mT @ x[mask] / mask.sum())
    assert near(both["k"].input_moment, x.mT @ x / 12)
    with pytest.raises(ValueError, match="layer 'q': mask_fn returned a dict without it"):
        collect_statistics(model, {"q": model.q}, [mask], lambda m, _: m.q(x), backward=False,
                           mask_fn=lambda batch: {})
    twice = collect_statistics(model, {"q": model.q}, [mask, ~mask], lambda m, _: m.q(x),
                               backward=False, mask_fn=lambda batch: batch)
    assert near(twice["q"].input_moment, x.mT @ x / 12)
    for wrong, named in ((lambda mask: mask[:3], r"\(3,\), torch.bool"),
                         (Tensor.long, r"\(6,\), torch.int64")):
        message = rf"'\w+': the mask {named}, does not fit the input \(6, \d\)"
        with pytest.raises(ValueError, match=message):
            collect_statistics(model, lora_layers(model), batches, masked_loss,
                               mask_fn=lambda batch, wrong=wrong: wrong(batch[2]))


def test_a_shared_input_is_multiplied_once():
    """q and k get equal moments; x.T @ x is computed for 4 inputs, not for 5 calls."""
    model, products = net(), []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.addmm_.default:
                products.append(result.shape)
            return result

    with Count():
        actual = collect_statistics(model, lora_layers(model), [rows_of_data(7)],
                                    lambda m, b: m(b[0]), backward=False)
    assert torch.equal(actual["q"].input_moment, actual["k"].input_moment)
    assert sorted(products) == [(3, 3), (4, 4), (4, 4), (4, 4)]


def test_wide_inputs_have_their_whole_moment():
    """Z = xᵀx / n and G = gᵀx / n where the products are taken in panels: in = 600 > 2·256."""
    p = Problem(5, 600, 2, 1.0, torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(600, 5, bias=False)).double()
    x, w = p.normal(7, 600), p.normal(5)
    add_lora(model, 2)
    total = collect(model, [x[:3], x[3:]], lambda m, x: (m(x).square() @ w).mean())["0"]
    g = 2 * (x @ model[0].weight.mT) * w
    assert near(total.input_moment, x.mT @ x / 7) and near(total.gradient, g.mT @ x / 7)
    assert near(total.output_fisher, g.square().mean(dim=0))


def test_an_input_changed_between_two_layers_is_not_taken_for_shared():
    """Forward only, q(x), then x += 1, then k(x): one tensor, two moments."""
    model, x = net(), rows_of_data(5)[0]
    first, second = x.clone(), x + 1

    def loss_fn(model, x):  # the second time on inference tensors, which count no changes
        model.q(x)
        return model.k(x.add_(1))

    for mode in (contextlib.nullcontext, torch.inference_mode):
        with mode():
            data = [first.clone()]
        moments = collect_statistics(model, {"q": model.q, "k": model.k}, data, mode()(loss_fn)
                                     if mode is torch.inference_mode else loss_fn, backward=False)
        assert near(moments["q"].input_moment, first.mT @ first / 5)
        assert near(moments["k"].input_moment, second.mT @ second / 5)


def snapshot(model: nn.Module) -> list:
    """All that a call must leave as it was."""
    state = [torch.get_rng_state(), *(t.clone() for t in model.state_dict().values())]
    for parameter in model.parameters():
        state += [id(parameter), parameter.requires_grad, parameter.grad, id(parameter.grad)]
    for module in model.modules():
        state += [module.training, getattr(module, "scaling", None), len(module._forward_hooks),
                  len(module._forward_pre_hooks), len(module._backward_hooks)]
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


def collect(model, batches, loss_fn):
    return collect_statistics(model, lora_layers(model), batches, loss_fn)


@pytest.mark.parametrize("call", [collect, *INITS])
@pytest.mark.parametrize("failure", ["raises", "nan", "vector", "detached", "no tensor", "empty"])
def test_a_call_that_fails_leaves_no_trace(call, failure):
    """The loss goes wrong in the middle of the second batch; everything is as before."""
    model, batches = trained_net(), batched(rows_of_data(8), [4, 4])
    before, calls = snapshot(model), []

    def bad_loss(model, batch):
        calls.append(torch.rand(1))  # draws from the global random state
        loss = mean_loss(model, batch)
        if len(calls) < 2:
            return loss
        if failure == "raises":
            raise RuntimeError("in the middle")
        return {"nan": loss * math.nan, "vector": loss * torch.ones(2), "detached": loss.detach(),
                "no tensor": loss.item()}[failure]

    if call is init_cntlora and failure == "detached":
        return  # it never looks at a gradient
    message = {"raises": "in the middle", "empty": "batches is empty"}.get(
        failure, "batch 0" if call is init_cntlora else "batch 1")  # its guard comes third
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(model, [] if failure == "empty" else batches, bad_loss)
    assert same(before, snapshot(model))


def test_statistics_leave_no_trace_and_no_gradient_of_a_weight():
    model, batches = trained_net(), batched(rows_of_data(8), [4, 4])
    before, needs = snapshot(model), []

    def loss_fn(model, batch):
        needs.extend(p.requires_grad for p in model.parameters())
        torch.rand(1)
        return mean_loss(model, batch)

    for surrounding in (torch.no_grad, torch.inference_mode):
        with surrounding():
            collect_statistics(model, lora_layers(model), batches, loss_fn)
    assert same(before, snapshot(model)) and not any(needs)

    @torch.enable_grad()
    def forward(model, batch):
        return model(batch[0].clone().requires_grad_())

    totals = collect_statistics(model, lora_layers(model), batches, forward, backward=False)
    assert not any(total.input_moment.requires_grad for total in totals.values())


def test_a_layer_that_no_row_reached_and_one_that_overflowed_are_named():
    model, data = net(), [rows_of_data(4)]
    model.unused = LoRALinear(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="'unused' was reached by no row"):
        init_lora_da(model, data, mean_loss)
    del model.unused
    for call in (init_lora_da, init_cntlora):
        with pytest.raises(ValueError, match="'q': input_moment holds NaN or Inf"):
            call(model, [(torch.full((4, 3), 1e200, dtype=torch.float64), data[0][1])],
                 lambda m, b: (m(b[0]) * 0).nan_to_num().sum())

    def in_place(model, batch):
        x = model.q(batch[0])
        y = model.twice(x)
        x += y
        return x.square().mean() + mean_loss(model, batch)

    with pytest.raises(ValueError, match="'twice': its input .* changed in place"):
        collect(model, data, in_place)


# ---------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("init", INITS)
def test_no_start_is_worse_than_the_pretrained_model(init, device):
    """The guard: mean loss over the rows ≤ the pre-trained one, for steps of any length."""

    def loss(model):
        return sum(len(b[0]) * mean_loss(model, b).item() for b in batches) / 12

    for seed in range(8):
        model, batches = net(seed, device), batched(rows_of_data(12, seed, device), [2, 10])
        model.eval()
        merged = merge_lora(copy.deepcopy(model))
        base = copy.deepcopy(model)
        for layer in lora_layers(base).values():
            layer.scaling = 0.0
        pretrained = loss(base)
        assert abs(pretrained - loss(merged)) > 1e-3
        weights = [layer.weight.clone() for layer in lora_layers(model).values()]
        for scale in (0.01, 10.0, None) if init is not init_hrp else (0.0,):
            factor = init(model, batches, mean_loss, **({"scale": scale} if scale != 0.0 else {}))
            assert factor in (0.0, *(0.5**k for k in range(11)))
            assert loss(model) <= pretrained + 1e-12
            changed = [layer.delta_weight().norm() > 0 for layer in lora_layers(model).values()]
            assert any(changed) == (factor > 0 and init is not init_hrp)
        assert all(torch.equal(w, m.weight) for w, m in zip(weights, lora_layers(model).values()))


def test_the_guard_takes_the_first_factor_that_is_no_worse():
    """One weight, loss (y − t)²/2, step 10 times too long: 1, ½, ¼ overshoot, ⅛ does not."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    add_lora(model, 1, alpha=4)
    model[0].weight.data.fill_(1.0)
    batch, target = [torch.ones(2, 1)], 1.1

    def loss_fn(model, x):
        return (model(x) - target).square().mean() / 2

    factor = init_lora_da(model, batch, loss_fn, scale=1.0, damping=0.0)
    assert factor == 0.125  # 1.1 + 0.1 ≥ 1 + factor, so ⅛ is the first
    assert torch.allclose(model[0].delta_weight(), torch.tensor([[0.125]]))
    batch, target = [b.double() for b in batch], 1.001  # Δ = −G / E[g²] = 1000, 2¹⁹ × too long
    assert init_lora_da(model.double(), batch, loss_fn, scale=None, damping=0.0) == 0.0
    assert model[0].delta_weight() == 0 and model[0].lora_A.abs() == 1  # the direction is kept
    assert init_lora_da(model, batch, loss_fn, scale=1.0, damping=0.0, guard=False) == 1.0
    assert near(model[0].delta_weight(), eye(1))

    def by_target(model, batch):
        return (model(batch[0]) - batch[1]).square().mean() / 2

    x = torch.ones(9, 1, dtype=torch.float64)
    uneven = [(x[None, :1], 2.0), (x[None], 0.9)]  # rows want 1.01, the batches' mean is 1.45
    assert init_lora_da(model, uneven, by_target, scale=None, damping=0.0) == 0.125
    assert near(model[0].delta_weight(), 0.125 * 0.01 / 0.109 * eye(1))
    assert init_lora_da(model, [(x, 1.0)], by_target) == 1.0  # no gradient, no step, no worse
    for exponent, expected in ((-10, 2**-10), (-11, 0.0)):  # ten halvings, and no more
        last = [(x, 1 + 0.75 * 2.0**exponent)]
        assert init_lora_da(model, last, by_target, scale=1.0, damping=0.0) == expected


def test_lora_da_on_a_model_is_lora_da_on_its_statistics():
    """Each layer: (B, A) = lora_da(G, Z, Y), n_train = rows; ‖s·BA‖₂ ≤ scale·‖W‖₂, or untouched."""
    model, batches = net(), batched(rows_of_data(9), [4, 5])
    totals = collect(model, batches, mean_loss)
    for n_train, scale, identity in (
            (None, 0.03, False), (None, 1e6, False), (50, None, False), (None, None, True)):
        init_lora_da(model, batches, mean_loss, n_train=n_train, scale=scale, variance=3.0,
                     damping=0.2, identity_fisher=identity, guard=False)
        for name, layer in lora_layers(model).items():
            t = totals[name]
            Z = eye(layer.in_features) if identity else t.input_moment
            Y = torch.ones_like(t.output_fisher) if identity else t.output_fisher
            B, A = lora_da(t.gradient, Z, Y, 2, n_train or t.count, variance=3.0, damping=0.2)
            delta = B @ A
            if scale is not None:
                top, most = (torch.linalg.svdvals(m)[0] for m in (delta, scale * layer.weight))
                assert (top > most) == (scale == 0.03)
                delta *= min(1, most / top)
            assert near(layer.delta_weight(), delta) and near(layer.lora_A, A)


def test_cntlora_on_a_model_is_cntlora_on_its_moments():
    model, batches = net(), batched(rows_of_data(9), [4, 5])
    old = batched(rows_of_data(9, 1), [9])
    Z_f, Z_p = (collect(model, b, mean_loss) for b in (batches, old))
    for pretrain, scale in ((None, None), (old, None), (None, 0.03)):
        init_cntlora(model, batches, lambda m, b: m(b[0]), pretrain_batches=pretrain, damping=0.2,
                     scale=scale, guard=False)
        for name, layer in lora_layers(model).items():
            B, A = cntlora(layer.weight, Z_f[name].input_moment,
                           Z_p[name].input_moment if pretrain else None, rank=2, damping=0.2)
            delta = B @ A
            if scale is not None:
                top, most = (torch.linalg.svdvals(m)[0] for m in (delta, scale * layer.weight))
                assert top > most
                delta *= most / top
            assert near(layer.delta_weight(), delta) and near(layer.lora_A, A)


@pytest.mark.parametrize("init", INITS)
def test_a_masked_start_is_the_start_on_the_rows_that_count(init):
    """Moments, HRP's steps and the guard: rows that the mask leaves out might as well not exist."""
    data, counts = rows_of_data(12), torch.arange(12) % 3 > 0
    starts = []
    for mask, sizes in ((counts, [7, 5]), (torch.ones(8, dtype=torch.bool), [4, 4])):
        model = net()
        batches = batched((*(t if mask is counts else t[counts] for t in data), mask), sizes)
        init(model, batches, lambda m, b: nn.functional.cross_entropy(m(b[0])[b[2]], b[1][b[2]]),
             mask_fn=lambda batch: batch[2])
        starts.append(lora_layers(model).values())
    for masked, alone in zip(*starts):
        assert near(masked.delta_weight(), alone.delta_weight())
        assert near(masked.lora_A, alone.lora_A)


def test_cntlora_spends_a_rank_budget_over_layers():
    model, batches = net(), [rows_of_data(30)]
    moments = collect(model, batches, mean_loss)
    full = {n: cntlora(m.weight, moments[n].input_moment, rank=min(m.weight.shape))[0]
            for n, m in lora_layers(model).items()}
    for budget in range(len(full), 1 + sum(B.shape[1] for B in full.values())):
        init_cntlora(model, batches, mean_loss, rank_budget=budget, scale=None, guard=False)
        ranks = {name: layer.rank for name, layer in lora_layers(model).items()}
        assert ranks == allocate_ranks({n: B.norm(dim=0) for n, B in full.items()}, budget)
    with pytest.raises(ValueError, match="budget 3"):
        init_cntlora(model, batches, mean_loss, rank_budget=3)


@pytest.mark.parametrize(("train_A", "preheat_rank"), [(False, 3), (True, 3), (False, 2)])
def test_hrp_on_a_model_is_a_short_high_rank_training(train_A, preheat_rank):
    """Adam on B_high (and A_high) from 0, by hand on dense weights W + B_high·A_high."""
    model, batches = net().eval(), batched(rows_of_data(12), [4, 4, 4])
    layers = lora_layers(model)
    init_hrp(model, batches, mean_loss, preheat_rank=preheat_rank, lr=0.1, train_A=train_A, seed=5)
    torch.manual_seed(5)
    factors = {}
    for name, layer in layers.items():
        high = min(preheat_rank, *layer.weight.shape)
        A = nn.init.kaiming_uniform_(torch.empty(high, layer.in_features).double(), a=math.sqrt(5))
        factors[name] = [torch.zeros(layer.out_features, high).double().requires_grad_(),
                         A.requires_grad_(train_A)]
    optimizer = torch.optim.Adam([t for f in factors.values() for t in f if t.requires_grad], 0.1)
    plain = copy.deepcopy(model)
    for layer in lora_layers(plain).values():
        layer.scaling = 0.0
    for batch in batches:
        optimizer.zero_grad()
        weights = {f"{n}.weight": layers[n].weight + B @ A for n, (B, A) in factors.items()}
        mean_loss(lambda x, w=weights: torch.func.functional_call(plain, w, (x,)), batch).backward()
        optimizer.step()
    for name, layer in layers.items():
        assert not layer.lora_B.any() and layer.lora_A.shape == (2, layer.in_features)
        V = torch.linalg.svd((factors[name][0] @ factors[name][1]).detach()).Vh[:2]
        assert near(projector(layer.lora_A), V.mT @ V, 1e-5)


@pytest.mark.parametrize("init", [init_lora_da, init_cntlora])
def test_a_failure_at_the_last_layer_changes_no_layer(init):
    """The head sees only zeros, so its moment is singular: it is named, and nothing moves."""
    model, batches = trained_net(), [rows_of_data(6)]
    model.drop.register_forward_hook(lambda layer, args, h: h * 0)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'head': the input moment \(4, 4\) is not positive"):
        init(model, batches, mean_loss)
    assert same(before, snapshot(model))
    with pytest.raises(ValueError, match="call add_lora first"):
        init(nn.Linear(2, 2), batches, mean_loss)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("init", INITS)
def test_the_same_seed_gives_the_same_bits_and_the_random_state_stays(init, device):
    results, batches = [], batched(rows_of_data(12, 0, device), [6, 6])

    def noisy_loss(model, batch):
        return mean_loss(model, batch) + 0.1 * model(torch.randn_like(batch[0])).square().mean()

    for outer, seed in ((1, 0), (2, 0), (3, 1)):
        model = net(0, device)
        torch.manual_seed(outer)
        init(model, batches, noisy_loss, seed=seed)
        after = torch.rand(1)
        torch.manual_seed(outer)
        assert torch.equal(after, torch.rand(1))
        results.append([p.detach().clone() for p in model.parameters()])
    assert same(results[0], results[1]) and not same(results[0], results[2])


@pytest.mark.parametrize("init", [init_lora_da, init_cntlora])
def test_batches_that_can_be_read_once_only_are_refused_where_they_are_read_twice(init):
    """By the guard or by a second pass; before any batch is spent. Empty batches are named too."""
    model, batches = trained_net(), batched(rows_of_data(8), [4, 4])
    before = snapshot(model)
    for kwargs in ({}, {"guard": False, "layers_per_pass": 3}):
        iterator = iter(batches)
        with pytest.raises(ValueError, match="list_iterator can be read only once.*pass a list"):
            init(model, iterator, mean_loss, **kwargs)
        assert len(list(iterator)) == 2
    if init is init_cntlora:
        with pytest.raises(ValueError, match="list_iterator .* not 4 times: pass a list"):
            init(model, batches, mean_loss, pretrain_batches=iter(batches), layers_per_pass=1)

    class Dry:  # no iterator, and yet it gives its batches once
        source = iter(batches)

        def __iter__(self):
            return self.source

    with pytest.raises(ValueError, match="batches is empty.*a generator can be read only once"):
        init(model, Dry(), mean_loss)
    assert same(before, snapshot(model))
    init(model, iter(batches), mean_loss, guard=False, layers_per_pass=4)
    assert not same(before, snapshot(model))


@pytest.mark.parametrize("init", [init_lora_da, init_cntlora])
@pytest.mark.parametrize("size", [1, 3])
def test_any_number_of_layers_a_pass_gives_the_same_bits(init, size):
    """Also with a loss that draws random numbers, and with old data and a budget of ranks."""
    batches, old = batched(rows_of_data(12), [6, 6]), batched(rows_of_data(12, 1), [12])

    def noisy_loss(model, batch):
        return mean_loss(model, batch) + 0.1 * model(torch.randn_like(batch[0])).square().mean()

    for kwargs in ({}, {"pretrain_batches": old, "rank_budget": 9}):
        if init is init_lora_da and kwargs:
            continue
        results = []
        for layers_per_pass in (None, size, 99):
            model = net()
            init(model, batches, noisy_loss, layers_per_pass=layers_per_pass, **kwargs)
            results.append([p.detach() for p in model.parameters()])
        assert same(results[0], results[1]) and same(results[0], results[2])
    with pytest.raises(ValueError, match="layers_per_pass 0"):
        init(net(), batches, mean_loss, layers_per_pass=0)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("surrounding", [
    torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_what_surrounds_a_call_does_not_reach_in(init, surrounding):
    """no_grad, inference_mode: the same factors; autocast: the same to its precision, float32."""
    model, batches = net().float(), [(x.float(), y) for x, y in batched(rows_of_data(64), [32, 32])]
    inside = copy.deepcopy(model)
    kwargs = {"preheat_rank": 3} if init is init_hrp else {"guard": False}
    init(model, batches, mean_loss, **kwargs)
    with surrounding():
        init(inside, batches, mean_loss, **kwargs)
    for a, b in zip(lora_layers(model).values(), lora_layers(inside).values()):
        assert b.lora_A.dtype == torch.float32
        if surrounding in (torch.no_grad, torch.inference_mode):
            assert torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B)
        elif init is not init_hrp:
            assert near(b.delta_weight(), a.delta_weight(), 0.1)


def test_float16_gradients_do_not_underflow():
    """g of 1e-8 rows in float16 lies below its smallest number, 6e-8; times 1024 it does not."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).half()
    add_lora(model, 1)
    x = torch.ones(512, 2).half()
    total = collect(model, [x], lambda m, x: 1e-5 * m(x).float().mean())["0"]
    assert near(total.gradient, torch.full((2, 2), 0.5e-5), 0.1)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("init", [init_lora_da, init_cntlora])
def test_the_guard_sees_the_same_batches_each_time(init, own):
    """A DataLoader that shuffles, with a short last batch: still never worse, in its own order."""
    for seed in range(4):
        model, data = net(seed).eval(), rows_of_data(20, seed)
        generator = torch.Generator().manual_seed(seed) if own else None
        loader = DataLoader(TensorDataset(*data), batch_size=12, shuffle=True, generator=generator)
        orders = []

        def loss_fn(model, batch, orders=orders):
            orders.append(batch[0])
            return mean_loss(model, batch)

        init(model, loader, loss_fn, scale=10.0)
        passes = [torch.cat(orders[i:i + 2]) for i in range(2, len(orders), 2)]
        assert len(passes) >= 2 and all(torch.equal(p, passes[0]) for p in passes)
        assert not own or generator.initial_seed() == seed and torch.equal(
            generator.get_state(), torch.Generator().manual_seed(seed).get_state())


@pytest.mark.parametrize(("init", "kwargs", "message"), [
    (init_lora_da, {"n_train": 0}, "'q': n_train 0"),
    (init_lora_da, {"scale": 0.0}, "scale 0.0"),
    (init_cntlora, {"scale": math.inf}, "scale inf"),
    (init_hrp, {"preheat_rank": 1}, "preheat_rank 1 is below rank 2"),
    (init_hrp, {"lr": 0.0}, "lr 0.0 not positive"),
    (init_hrp, {"lr": math.inf}, "lr inf not positive and finite"),
    (init_lora_da, {"variance": math.inf}, "variance inf"),
    (init_lora_da, {"seed": 1}, "'k' has scaling inf"),
    (init_lora_da, {"seed": 2}, "'k': B overflows at scaling 1e-320"),
    (init_hrp, {}, "'unused' got no gradient"),
    (init_cntlora, {}, "'k' has scaling 0"),
])
def test_a_model_level_number_out_of_range_is_refused_and_nothing_changes(init, kwargs, message):
    model = trained_net()
    if "unused" in message:
        model.unused = LoRALinear(nn.Linear(2, 2), 1)
    if "scaling" in message:
        model.k.scaling = {"0": 0.0, "inf": math.inf}.get(message.split()[-1], 1e-320)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        init(model, [rows_of_data(9)], mean_loss, **kwargs)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("init", INITS)
def test_bfloat16_and_partly_frozen_models_start_near_the_float64_one(init, device):
    """Half-precision weights, float32 statistics and factors; only one layer adapted."""
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).to(device, torch.bfloat16)
    half, exact = copy.deepcopy(exact), exact.double()
    x, labels = rows_of_data(64, 0, device)
    ends = []
    for model in (exact, half):
        add_lora(model, 1, targets=["2"])
        data = [(x.to(model[0].weight.dtype), labels)] * 4
        init(model, data, lambda m, b: mean_loss(m, b).float(), **(
            {} if init is init_hrp else {"guard": False}))
        assert model[2].lora_A.dtype == (torch.float64 if model is exact else torch.float32)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            "2.lora_A", "2.lora_B"}
        ends.append((projector(model[2].lora_A).double(), model[2].delta_weight().double()))
    if init is not init_hrp:  # whose A_high is drawn in the dtype of the factors
        assert near(ends[1][0], ends[0][0], 0.1) and near(ends[1][1], ends[0][1], 0.1)


def test_a_whole_round_never_writes_a_base_weight():
    """Add, three inits, training, merging: W and b stay bit-identical; the loss falls."""
    torch.manual_seed(0)
    model, batches = Net().double(), batched(rows_of_data(16), [8, 8])
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_lora(model, 2)
    model.eval()
    for init in INITS:
        init(model, batches, mean_loss)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
        losses = []
        for batch in batches * 10:
            optimizer.zero_grad()
            losses.append(mean_loss(model, batch))
            losses[-1].backward()
            optimizer.step()
        assert sum(losses[-2:]) < sum(losses[:2])
    adapted = copy.deepcopy(model)
    merge_lora(model)
    state = adapted.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())
    assert not torch.equal(model.q.weight, base["q.weight"])


def peak_floats(call: Callable) -> float:
    """The most that was allocated at a time during the call, from the profiler's record."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() / 4 for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("widths", [[300] * 5, [200, 500, 200, 500, 200], [100, 1200]])
@pytest.mark.parametrize("init", [init_lora_da, init_cntlora])
def test_the_peak_memory_is_what_is_documented(init, widths):
    """Within 10 %: Σ over a pass of in² + out·in + out (or in²), plus the work on one layer."""
    shapes, peaks = list(itertools.pairwise(widths)), []
    for per_pass in (None, 2, 1):
        model = nn.Sequential(*(nn.Linear(n_in, n_out, bias=False) for n_in, n_out in shapes))
        add_lora(model, 2)
        call = partial(init, model, [torch.randn(4, widths[0])], lambda m, x: m(x).square().mean(),
                       layers_per_pass=per_pass, guard=False)
        kept, work = zip(*(
            (n * n + n * k + k, 5 * n * n + n * k + n * max(n, k)) if init is init_lora_da
            else (n * n, 4 * n * n + 4 * n * max(n, k)) for n, k in shapes))
        size = min(per_pass or len(shapes), len(shapes))
        formula = max(sum(kept[j:i + size]) + work[j]  # at layer j; those before it are done with
                      for i in range(0, len(shapes), size) for j in range(i, i + size))
        peaks.append(peak_floats(call))
        assert 0.9 * formula < peaks[-1] < 1.1 * formula
    assert peaks[0] > peaks[1] >= peaks[2] or len(shapes) == 1


# ---------------------------------------------------------------------------- unbreakable


@given(problems(smallest=2), st.sampled_from([math.nan, math.inf, -math.inf]), st.data())
def test_nan_and_inf_in_any_argument_are_named(p, bad, data):
    G, Z, Y = p.normal(p.n_out, p.n_in), p.spd(p.n_in), p.positive(p.n_out)
    B_high, A_high = p.normal(p.n_out, p.rank), p.normal(p.rank, p.n_in)
    for call, tensors in (
            (partial(lora_da, rank=p.rank, n_train=9),
             {"gradient": G, "input_moment": Z, "output_fisher": Y}),
            (partial(hrp, rank=p.rank), {"B_high": B_high, "A_high": A_high}),
            (monge_map, {"Z_f": Z, "Z_p": 2 * Z}),
            (partial(cntlora, rank=p.rank),
             {"weight": G, "input_moment": Z, "pretrain_moment": 2 * Z}),
            (lambda x: allocate_ranks({"x": x}, 1), {"x": Y})):
        assert call(**tensors) is not None
        for name, tensor in tensors.items():
            spoilt = tensor.clone()
            spoilt.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = bad
            with pytest.raises(ValueError, match=f"{name}.* holds NaN or Inf"):
                call(**{**tensors, name: spoilt})


@pytest.mark.parametrize("change", [Tensor.half, Tensor.bfloat16, lambda t: t.mT.clone().mT,
                                    lambda t: torch.stack([t, t], dim=-1)[..., 1]])
def test_dtype_and_memory_layout_of_arguments_change_nothing(change):
    """Half precision is computed in float32; strides do not matter."""
    p = Problem(4, 5, 2, 10.0, torch.Generator().manual_seed(0))
    G, Z, Y, A_high = (change(t.float().view(-1, t.shape[-1])) for t in (
        p.normal(4, 5), p.spd(5), p.positive(4), p.normal(3, 5)))
    for call in (lambda G, Z, Y, A: lora_da(G, Z, Y, 2, 9), lambda G, Z, Y, A: hrp(G[:, :3], A, 2),
                 lambda G, Z, Y, A: cntlora(G, Z, rank=2),
                 lambda G, Z, Y, A: (monge_map(Z, 2 * Z),)):
        tensors = G, Z, Y[0], A_high
        for a, b in zip(call(*tensors), call(*(t.float().contiguous() for t in tensors))):
            assert a.dtype == torch.float32 and near(a, b, 1e-3 if G.dtype != a.dtype else 1e-6)


def plain_net(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def square_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) / batch.abs().max().clamp_min(1e-30)).square().mean()


X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
INPUTS = {
    "1e-12": 1e-12 * X, "1e+12": 1e12 * X, "outliers": torch.cat([1e4 * X[:, :2], X], dim=1),
    "constant": torch.ones(12, 6), "duplicates": X[:, [0, 0, 0, 1, 1, 2]], "one row": X[:1],
    "same row": X[:1].expand(12, 6), "strided": X.repeat(1, 2)[:, ::2], "transposed": X.T.clone().T,
    "1-D": X[0], "3-D": X.view(3, 4, 6), "4-D": X.view(1, 3, 4, 6), "one feature": X[:, :1],
    "float16": X.half(), "bfloat16": X.bfloat16(),
}


@pytest.mark.parametrize("n_out", [1, 5])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("init", INITS)
def test_any_input_gives_finite_factors_and_no_worse_a_start(init, name, n_out):
    """At the rank's limit too; AAᵀ = I for LoRA-DA and HRP; the base weights stay bit for bit."""
    x = INPUTS[name]
    for rank in {1, min(x.shape[-1], n_out)}:
        model = plain_net(x.shape[-1], n_out).to(x.dtype)
        model[0].bias.data.zero_()  # which would drown inputs of 1e-12
        weight = model[0].weight.clone()
        before = square_loss(model, x).item()
        (layer,) = add_lora(model, rank).values()
        init(model, [x, x], square_loss)
        A, B = layer.lora_A, layer.lora_B
        assert A.isfinite().all() and B.isfinite().all() and A.abs().sum() > 0
        assert square_loss(model, x).item() <= before * (1 + 1e-6)
        assert torch.equal(layer.weight, weight)
        if init is not init_cntlora:
            assert near(A @ A.mT, torch.eye(rank), 1e-4)


@pytest.mark.parametrize("init", INITS)
def test_inputs_of_zero_are_refused_by_name_and_nothing_changes(init):
    model = plain_net(6, 5)
    add_lora(model, 2)
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer '0'.*(not positive|no gradient)"):
        init(model, [0 * X], lambda model, x: model(x).square().mean())
    assert same(before, snapshot(model))


@pytest.mark.parametrize("leading", [(12,), (3, 4), (2, 3, 2), (2, 1, 2, 3)])
def test_leading_dimensions_and_strides_change_no_statistic(leading):
    """Rows are rows: in any shape, however they lie in memory, and one at a time."""
    model = plain_net(6, 5, 4).double()
    layers, x = add_lora(model, 2), X.double()

    def loss_fn(model, batch):
        return model(batch).square().mean()

    plain = collect_statistics(model, layers, [x], loss_fn)
    shaped = x.view(*leading, 6).transpose(0, len(leading) - 1)
    for batches in ([shaped], list(x), [torch.stack([x, x], dim=-1)[..., 0]]):
        other = collect_statistics(model, layers, batches, loss_fn)
        for name, total in plain.items():
            assert other[name].count == total.count
            for field in ("input_moment", "gradient", "output_fisher"):
                assert near(getattr(other[name], field), getattr(total, field))


@pytest.mark.parametrize("call", [collect, *INITS])
def test_an_endless_source_is_refused_or_can_be_interrupted(call):
    model, calls = trained_net(), []
    before, endless = snapshot(model), itertools.cycle([rows_of_data(4)])

    def interrupted_loss(model, batch):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return mean_loss(model, batch)

    with pytest.raises((KeyboardInterrupt, ValueError)) as raised:
        call(model, endless, interrupted_loss)
    assert same(before, snapshot(model))
    assert (len(calls) == 5) == (call in (collect, init_hrp)) == (raised.type is KeyboardInterrupt)


@pytest.mark.parametrize("init", INITS)
def test_a_compiled_model_starts_where_the_plain_one_does(init):
    batches = batched(rows_of_data(12), [6, 6])
    for warm in (False, True):
        plain, model = net().eval(), net().eval()
        compiled = torch.compile(model, backend="eager")
        if warm:
            compiled(batches[0][0])
        assert init(compiled, batches, mean_loss) == init(plain, batches, mean_loss)
        assert all(near(a, b) for a, b in zip(model.parameters(), plain.parameters()))
        assert near(compiled(batches[0][0]), plain(batches[0][0]))
    torch.compiler.reset()


@pytest.mark.parametrize("duplicate", [
    copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)),
    lambda model: (fresh := net(9), fresh.load_state_dict(model.state_dict()))[0]])
def test_copies_pickles_and_state_dicts_are_the_same_function_and_apart(duplicate):
    model, x = net().eval(), rows_of_data(5)[0]
    copied = duplicate(model).eval()
    assert near(copied(x), model(x), 1e-12)
    expected = model(x)
    init_lora_da(copied, [rows_of_data(9)], mean_loss)
    assert torch.equal(model(x), expected) and not torch.equal(copied(x), expected)


@pytest.mark.parametrize("init", INITS)
def test_two_threads_find_what_each_would_find_alone(init):
    batches = batched(rows_of_data(12), [4, 4, 4])
    expected = {seed: net(seed) for seed in range(4)}
    for seed, model in expected.items():
        init(model, batches, mean_loss, seed=seed)
    models = {seed: net(seed) for seed in range(4)}
    torch.manual_seed(7)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: init(models[seed], batches, mean_loss, seed=seed), range(4)))
    after = torch.rand(1)
    assert torch.equal(after, torch.rand(1, generator=torch.Generator().manual_seed(7)))
    for seed, model in models.items():
        assert same(list(model.parameters()), list(expected[seed].parameters()))
    with ThreadPoolExecutor(4) as pool:  # on one model, one after the other
        list(pool.map(lambda seed: init(models[0], batches, mean_loss), range(4)))
    assert same(list(models[0].parameters()), list(expected[0].parameters()))


class Life(RuleBasedStateMachine):
    """Add, start, train, fail, save, load and merge in any order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Net().double().eval()
        self.base = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.batches = batched(rows_of_data(12), [5, 7])

    def adapted(self) -> bool:
        return bool(lora_layers(self.model))

    @rule(rank=st.integers(1, 3), alpha=st.sampled_from([None, 0.5, 16]),
          name=st.sampled_from(["q", "k", "twice", "head"]))
    def add(self, rank, alpha, name):
        before = self.model(self.batches[0][0])
        if name in lora_layers(self.model):
            with pytest.raises(TypeError, match=f"'{name}' is LoRALinear"):
                add_lora(self.model, rank, alpha, targets=name)
        else:
            add_lora(self.model, rank, alpha, targets=name)
        assert torch.equal(self.model(self.batches[0][0]), before)

    @precondition(adapted)
    @rule(init=st.sampled_from(INITS), seed=st.integers(0, 3), per_pass=st.sampled_from([None, 1]))
    def start(self, init, seed, per_pass):
        kwargs = {} if init is init_hrp else {"layers_per_pass": per_pass}
        init(self.model, self.batches, mean_loss, seed=seed, **kwargs)
        plain = Net().double().eval()
        plain.load_state_dict(self.base)
        loss, pretrained = (sum(len(batch[0]) * mean_loss(model, batch) for batch in self.batches)
                            for model in (self.model, plain))
        assert loss <= pretrained + 1e-12

    @precondition(adapted)
    @rule(init=st.sampled_from(INITS), number=st.integers(1, 5), kind=st.sampled_from(
        ["raises", "nan", "vector", "detached"]))
    def fail(self, init, number, kind):
        before, calls = snapshot(self.model), []

        def bad_loss(model, batch):
            calls.append(1)
            loss = mean_loss(model, batch)
            if len(calls) != number:
                return loss
            if kind == "raises":
                raise ArithmeticError
            return {"nan": loss * math.nan, "vector": loss * torch.ones(2),
                    "detached": loss.detach()}[kind]

        try:
            init(self.model, self.batches, bad_loss)
        except (ArithmeticError, ValueError):
            assert same(before, snapshot(self.model))

    @precondition(adapted)
    @rule(lr=st.sampled_from([1e-3, 0.1]))
    def train(self, lr):
        optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr)
        optimizer.zero_grad()
        mean_loss(self.model, self.batches[0]).backward()
        optimizer.step()

    @precondition(adapted)
    @rule(fresh=st.booleans())
    def save_and_load(self, fresh):
        expected = self.model(self.batches[0][0])
        with tempfile.TemporaryDirectory() as folder:
            save_peft(self.model, folder)
            if fresh:
                self.model = Net().double().eval()
                self.model.load_state_dict(self.base)
            load_peft(self.model, folder)
        assert torch.equal(self.model(self.batches[0][0]), expected)

    @precondition(adapted)
    @rule()
    def merge(self):
        expected = self.model(self.batches[0][0])
        merged = merge_lora(copy.deepcopy(self.model))
        assert near(merged(self.batches[0][0]), expected) and not lora_layers(merged)

    @invariant()
    def base_weights_are_bit_identical(self):
        state = self.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in self.base.items())
        assert {n for n, p in self.model.named_parameters() if p.requires_grad} <= {
            n for n in state if "lora_" in n} or not self.adapted()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)


# ---------------------------------------------------------------------------- two processes


CALLS = {"lora_da": init_lora_da, "cntlora": init_cntlora, "hrp": partial(init_hrp, preheat_rank=3),
         "trained A": partial(init_hrp, preheat_rank=3, train_A=True),
         "by layer": partial(init_lora_da, layers_per_pass=1, scale=None),
         "masked": partial(init_lora_da, mask_fn=lambda batch: batch[1] > 0),
         "masked hrp": partial(init_hrp, preheat_rank=3, mask_fn=lambda batch: batch[1] > 0)}


def kept_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean over the rows whose label is not 0."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], ignore_index=0)


def shards() -> list[list[tuple[Tensor, Tensor]]]:
    """Uneven in batches and in rows: 4, 7 and 6 rows for one process, 3 for the other."""
    *first, last = batched(rows_of_data(20), [4, 7, 6, 3])
    return [first, [last]]


def one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=60), world_size=2, rank=rank)
    results: dict = {}
    for name, init in CALLS.items():
        model = net()
        factor = init(model, shards()[rank], kept_loss if "masked" in name else mean_loss)
        results[name] = factor, [p.detach() for p in model.parameters()]

    def fails(number: int) -> Callable:
        calls = []

        def loss_fn(model, batch):
            calls.append(1)
            if rank == 1 and len(calls) == number:
                raise ArithmeticError("of my own")
            return mean_loss(model, batch)
        return loss_fn

    for name, spoil in {"weights": lambda model: model.head.weight.data.mul_(2),
                        "adapters": lambda model: add_lora(model.norm, 1),
                        "scaling": lambda model: setattr(model.q, "scaling", 0.0)}.items():
        model = net()
        model.norm.append = nn.Linear(2, 2)
        if rank == 1:
            spoil(model)
        try:
            init_lora_da(model, shards()[rank], mean_loss)
        except (ValueError, RuntimeError) as error:
            results[name] = repr(error)
    try:
        init_lora_da(net(), shards()[0] if rank == 0 else iter(shards()[0]), mean_loss)
    except (ValueError, RuntimeError) as error:
        results["iterator"] = repr(error)
    for call in (collect, *INITS):
        for data, loss_fn in ((shards()[0] if rank == 0 else [], mean_loss),
                              (shards()[0], fails(1)), (shards()[0], fails(2)),
                              (shards()[0], fails(5))):  # the fifth is in the guard
            model = trained_net()
            before = snapshot(model)
            try:
                call(model, data, loss_fn)
                message = ""
            except (ValueError, RuntimeError, ArithmeticError) as error:
                message = repr(error)
            results.setdefault(call.__name__, []).append((message, same(before, snapshot(model))))
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", CALLS)
def test_two_processes_end_with_the_same_bits_and_with_those_of_one(two_processes, name):
    """Bit for bit on both; to rounding what one process finds that sees all batches."""
    (factor, first), (other_factor, second) = (results[name] for results in two_processes)
    assert factor == other_factor and same(first, second)
    model, loss_fn = net(), kept_loss if "masked" in name else mean_loss
    all_batches = [batch for shard in shards() for batch in shard]
    if "hrp" in name or "trained" in name:  # a step takes a batch of each
        both = zip(all_batches[0], all_batches[3])
        all_batches = [tuple(torch.cat(pair) for pair in both), *all_batches[1:3]]
    assert CALLS[name](model, all_batches, loss_fn) == factor
    assert all(near(a, b.detach(), 1e-6) for a, b in zip(first, model.parameters()))


@pytest.mark.parametrize(("name", "message"), [
    ("weights", "different models"), ("adapters", "different models"),
    ("scaling", "scaling 0"), ("iterator", "read only once")])
def test_what_differs_between_processes_is_refused_on_all(two_processes, name, message):
    assert all(message in results[name] for results in two_processes)


def test_an_error_on_one_process_is_an_error_on_all(two_processes):
    """Not a hang: no batch, or a loss that raises at any time; every model is as it was."""
    for call in ("collect", "init_lora_da", "init_hrp", "init_cntlora"):
        for number, own in enumerate(("batches is empty", *["of my own"] * 3)):
            (first, unchanged), (second, unchanged_too) = (r[call][number] for r in two_processes)
            if number == 3 and call in ("collect", "init_hrp"):  # which end after three batches
                assert first == second == ""
            else:
                assert unchanged and unchanged_too
                assert own in second and "process" not in second
                assert re.search("RuntimeError.*process 1 failed: .*" + own, first), (call, first)


# ---------------------------------------------------------------------------- saving


def alike(n: int = 12) -> nn.Sequential:
    """Layers "0" … "11" whose names contain each other, and "12.1", which ends like "1"."""
    torch.manual_seed(0)
    end = nn.Sequential(nn.Tanh(), nn.Linear(6, 5))
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(n)), end)


def differently_adapted() -> nn.Sequential:
    """Three layers of three ranks and three scales, one of them not exact in binary."""
    model = alike()
    for name, rank, alpha in (("1", 3, 16), ("11", 1, 0.1), ("5", 2, 2)):
        (layer,) = add_lora(model, rank, alpha, targets=lambda n, name=name: n == name).values()
        layer.set_factors(torch.randn(6, rank), torch.randn(rank, 6))
    return model


def test_saved_and_loaded_is_the_same_function(tmp_path):
    """Bit for bit: factors, ranks, scales; into a bare model and into one adapted otherwise."""
    model, x = differently_adapted(), torch.randn(3, 6)
    save_peft(model, tmp_path / "new" / "adapter")
    other = alike()
    add_lora(other, 2, targets=["11"])
    other[11].requires_grad_(False)
    for target in (alike(), other):
        loaded = load_peft(target, str(tmp_path / "new" / "adapter"))
        assert list(loaded) == ["1", "5", "11"] and loaded == lora_layers(target)
        assert torch.equal(target(x), model(x))
        assert [m.scaling for m in loaded.values()] == [16 / 3, 1.0, 0.1]
        assert not target[0].weight.requires_grad and target[1].lora_A.requires_grad
    thin, bare = nn.Sequential(nn.Linear(3, 1)), nn.Sequential(nn.Linear(3, 1))
    add_lora(thin, 1)
    save_peft(thin, tmp_path)
    assert torch.equal(load_peft(bare, tmp_path)["0"].lora_A, thin[0].lora_A)
    file = tmp_path / "adapter_config.json"
    assert json.loads(file.read_text())["target_modules"] == ["0"]
    file.write_text(json.dumps({"peft_type": "LORA"}))
    assert load_peft(bare, tmp_path)["0"].scaling == 8  # PEFT's default for alpha
    files = sorted(file.name for file in (tmp_path / "new" / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.bin"]


def test_a_save_that_fails_leaves_the_older_adapter(tmp_path, monkeypatch):
    model = differently_adapted()
    save_peft(model, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    model[1].lora_B.data.zero_()
    with monkeypatch.context() as patch:
        patch.setattr(lora_init.json, "dumps", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_peft(model, tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(FileExistsError, match="would be read in place"):
        save_peft(model, tmp_path)
    for bare in (alike(), LoRALinear(nn.Linear(2, 2), 1)):
        with pytest.raises(ValueError, match="no LoRALinear below"):
            save_peft(bare, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda model, config, tensors: model.__delitem__(slice(11, 13)), "no layer '11'; .* names: 1"),
    (lambda model, config, tensors: model.__setitem__(11, nn.Linear(6, 7)),
     r"'11': factors B \(6, 1\), A \(1, 6\) do not fit a weight \(7, 6\)"),
    (lambda model, config, tensors: model.__setitem__(11, nn.Tanh()), "'11' is Tanh"),
    (lambda model, config, tensors: add_lora(model, 1, targets=["2"]), r"lacks .*\['2'\]"),
    (lambda model, config, tensors: config.update(peft_type="IA3"), "not plain LoRA but IA3"),
    (lambda model, config, tensors: config.update(use_dora=True), "use_dora"),
    (lambda model, config, tensors: config.update(init_lora_weights="pissa"), "pissa"),
    (lambda model, config, tensors: config.update(lora_alpha=math.inf), "'1' holds NaN or Inf"),
    (lambda model, config, tensors: [*tensors.values()][-1].fill_(math.nan), "'11' holds NaN"),
    (lambda model, config, tensors: model.__setitem__(11, model[1]), "two adapters for one layer"),
    (lambda model, config, tensors: tensors.popitem(), "'11' has lora_A alone"),
    (lambda model, config, tensors: tensors.update({"base_model.model.11.bias": torch.ones(6)}),
     "'base_model.model.11.bias' is no factor"),
])
def test_what_does_not_fit_the_model_is_refused_and_nothing_changes(tmp_path, spoil, message):
    save_peft(differently_adapted(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors, model = torch.load(tmp_path / "adapter_model.bin", weights_only=True), alike()
    spoil(model, config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, tmp_path / "adapter_model.bin")
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        load_peft(model, tmp_path)
    assert same(before, snapshot(model))


def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path):
    save_peft(differently_adapted(), tmp_path)
    torch.save({"base_model.model.1.lora_A.weight": Path}, tmp_path / "adapter_model.bin")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_peft(alike(), tmp_path)


def test_peft_loads_what_we_saved(tmp_path):
    """Our outputs to 1e-5, our trainable factors and nobody else's; and saved again, ours again."""
    peft = pytest.importorskip("peft")
    ours, x = differently_adapted(), torch.randn(3, 6)
    save_peft(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(alike(), tmp_path / "ours", is_trainable=True)
    assert torch.allclose(theirs(x), ours(x), rtol=1e-5, atol=1e-5)
    trained = {n.split(".lora")[0].removeprefix("base_model.model.")
               for n, p in theirs.named_parameters() if p.requires_grad}
    assert trained == {"1", "5", "11"}  # not "12.1"
    for safe in (True, False):
        if safe:
            pytest.importorskip("safetensors")
        theirs.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
        again = alike()
        load_peft(again, tmp_path / str(safe))
        assert torch.equal(again(x), ours(x))


@pytest.mark.parametrize("settings", [
    {}, {"use_rslora": True}, {"lora_alpha": 0.3},
    {"rank_pattern": {"1": 4, "^11": 1}, "alpha_pattern": {"12.1": 5, "^1": 7}},
    {"use_rslora": True, "rank_pattern": {"1": 3}, "alpha_pattern": {"^11": 9}},
])
def test_what_peft_saved_is_peft_s_function(tmp_path, settings):
    """Names that contain each other do not mix; patterns match as they do there."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("safetensors")
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["1", "11"],
                                "init_lora_weights": False, **settings})
    theirs, x = peft.get_peft_model(alike(), config), torch.randn(3, 6)
    theirs.save_pretrained(tmp_path)
    ours = alike()
    assert set(load_peft(ours, tmp_path)) == {"1", "11", "12.1"}
    assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- Hugging Face


def hugging_face(kind: str, padding: int = 0) -> tuple[nn.Module, list[str], dict, Callable]:
    """A small random model, targets, a padded batch of three, and its mask_fn."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "initializer_range": 0.2}
    lengths, labels = torch.tensor([7, 5, 4]), torch.tensor([0, 2, 1])
    tokens, mask = torch.randint(1, 64, (3, 7)), torch.arange(7 + padding) < lengths[:, None]
    tokens = torch.cat([tokens, torch.randint(1, 64, (3, padding))], dim=1)  # (3, 7 + padding)
    batch = {"input_ids": tokens, "attention_mask": mask.long()}
    torch.manual_seed(0)
    if kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(
            vocab_size=64, tie_word_embeddings=True, **sizes))
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        batch["labels"] = tokens.where(mask, -100)
    elif kind == "bert":
        model = hf.BertForSequenceClassification(hf.BertConfig(
            vocab_size=64, num_labels=3, **sizes))
        targets, batch["labels"] = ["query", "value", "output.dense", "intermediate.dense"], labels
    elif kind == "vit":
        model = hf.ViTForImageClassification(hf.ViTConfig(
            image_size=8, patch_size=4, num_labels=3, **sizes))
        batch = {"pixel_values": torch.randn(3, 3, 8, 8), "labels": labels}
        return model, ["fc1", "fc2"], batch, lambda batch: None
    else:
        model = hf.T5ForConditionalGeneration(hf.T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            decoder_start_token_id=0))
        targets = ["SelfAttention.q", "EncDecAttention.q", "EncDecAttention.v", "wo"]
        answer = torch.arange(6 + padding) < torch.tensor([6, 2, 4])[:, None]
        batch["labels"] = torch.randint(1, 64, (3, 6))
        batch["labels"] = nn.functional.pad(batch["labels"], (0, padding)).where(answer, -100)

        def mask_fn(batch):  # two sequences: cross-attention's keys and values read the encoder's
            encoder, decoder = batch["attention_mask"] == 1, batch["labels"] != -100
            return {name: encoder if re.match("encoder|.*EncDecAttention.v", name) else decoder
                    for name in lora_layers(model)}
        return model, targets, batch, mask_fn
    return model, targets, batch, lambda batch: batch["attention_mask"] == 1


def hf_loss(model: nn.Module, batch: dict) -> Tensor:
    return model(**batch).loss


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "t5"])
def test_hugging_face_statistics_see_autograds_gradient_and_no_padding(kind):
    """G = ∂loss/∂W by autograd; three more columns of padding change no statistic."""
    totals = []
    for padding in (0, 3):
        model, targets, batch, mask_fn = hugging_face(kind, padding)
        layers = add_lora(model, 2, targets=targets)
        totals.append(collect_statistics(model, layers, [batch], hf_loss, mask_fn=mask_fn))
    model.requires_grad_(True).eval()
    hf_loss(model, batch).backward()
    for name, layer in layers.items():
        short, long = (total[name] for total in totals)
        assert near(long.gradient, layer.weight.grad, 1e-4)
        assert short.count == long.count < batch.get("input_ids", torch.ones(99)).numel()
        for field in ("input_moment", "gradient", "output_fisher"):
            assert near(getattr(short, field), getattr(long, field), 1e-4)


@pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")  # renamed in transformers 5
@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_gradient_checkpointing_changes_no_statistic(kind):
    """It is active in train mode only: without dropout the loss may switch to it."""
    totals, calls = [], []
    for checkpointing in (False, True):
        model, targets, batch, mask_fn = hugging_face(kind)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for rate in ("dropout", "dropout_prob"):  # of attention weights
                if isinstance(getattr(module, rate, None), float):
                    setattr(module, rate, 0.0)
        layers = add_lora(model, 2, targets=targets)
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls.append([])
        next(iter(layers.values())).register_forward_pre_hook(lambda *_: calls[-1].append(1))
        totals.append(collect_statistics(
            model, layers, [batch], lambda m, b: hf_loss(m.train(), b), mask_fn=mask_fn))
    assert len(calls[1]) == 2 * len(calls[0])  # it did recompute
    for name in layers:
        off, on = (total[name] for total in totals)
        assert on.count == off.count and near(on.gradient, off.gradient, 1e-5)
        assert near(on.input_moment, off.input_moment, 1e-6)
        assert near(on.output_fisher, off.output_fisher, 1e-5)


@pytest.mark.parametrize(("kind", "dtype"), [
    ("llama", torch.float32), ("llama", torch.bfloat16), ("bert", torch.float32),
    ("vit", torch.float32), ("t5", torch.float32)])
@pytest.mark.parametrize("init", INITS)
def test_a_hugging_face_model_starts_trains_and_merges(init, kind, dtype):
    """Never worse at the start, better ten steps later; merging changes no output, no base bit."""
    model, targets, batch, mask_fn = hugging_face(kind)
    model.to(dtype).eval()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pretrained = hf_loss(model, batch).item()
    if kind == "llama":  # its mask fits the head too; embedding and head are one Parameter
        assert model.lm_head.weight is model.get_input_embeddings().weight
        targets.append("lm_head")
    adapters = add_lora(model, 2, alpha=4, targets=targets)
    init(model, [batch, batch], hf_loss, mask_fn=mask_fn)
    losses, trained = [], [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 0.02)
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(hf_loss(model, batch))
        losses[-1].backward()
        optimizer.step()
    assert losses[0] <= pretrained + 1e-6 and losses[-1] < losses[0] - 0.01
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())
    expected, head = model(**batch).logits, base.get("lm_head.weight")
    assert len(adapters) >= 4 and not lora_layers(merge_lora(model))
    assert near(model(**batch).logits, expected, 0.05 if dtype == torch.bfloat16 else 1e-4)
    if kind == "llama":
        assert torch.equal(model.get_input_embeddings().weight, head)
        assert not torch.equal(model.lm_head.weight, head)


def test_a_transposed_conv1d_is_refused_by_name():
    hf = pytest.importorskip("transformers")
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(TypeError, match=r"'transformer.h.0.attn.c_attn' is Conv1D.*transposed"):
        add_lora(model, 2, targets=["c_attn"])
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------------- the pages


def test_every_test_that_a_docstring_names_exists():
    named = set(re.findall(r"test_\w+", Path(lora_init.__file__).read_text(encoding="utf-8")))
    assert len(named) > 10 and named <= set(globals())


PAGE = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_the_readmes_python_prints_what_the_readme_says(block, tmp_path, monkeypatch):
    """Each ```python block runs by itself and prints the ```text that follows it."""
    code, expected = BLOCKS[block]
    for package in {"transformers", "peft", "accelerate"} & set(re.findall(r"\w+", code)):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})  # noqa: S102  the page is ours
    assert printed.getvalue() == expected


def test_the_readmes_path_to_scale_runs_under_torchrun(tmp_path):
    """Two processes print once what one prints, and save the adapter that one saves."""
    for package in ("transformers", "peft", "accelerate"):
        pytest.importorskip(package)
    code, expected = next(block for block in BLOCKS if "Accelerator" in block[0])
    (tmp_path / "calibrate.py").write_text(code, encoding="utf-8")
    adapters, here = [], str(Path(lora_init.__file__).parent)
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]):
        done = subprocess.run([sys.executable, *launcher, "calibrate.py"], cwd=tmp_path, check=True,
                              env={**os.environ, "PYTHONPATH": here}, stdout=subprocess.PIPE)
        assert done.stdout.decode() == expected
        adapters.append(torch.load(tmp_path / "adapter" / "adapter_model.bin", weights_only=True))
        (tmp_path / "adapter" / "adapter_model.bin").unlink()
    for name in (name for name in adapters[0] if "lora_A" in name):
        one, two = (a[name.replace("lora_A", "lora_B")] @ a[name] for a in adapters)
        assert near(two, one, 1e-4)  # the vectors' signs are free


def test_every_test_and_command_that_the_readme_names_exists():
    assert BLOCKS
    named = set(re.findall(r"test_[a-zA-Z_]+[a-zA-Z]\b(?!\.py)", PAGE)) - {"test_lora_init"}
    assert len(named) > 10 and named <= set(globals())
