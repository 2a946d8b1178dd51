"""The Triton programs find and write what the torch operations do.

On a GPU they are compiled; elsewhere Triton's interpreter runs them on the CPU
(``tests/conftest.py``).
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from student_train.errors import NonFiniteLossError
from student_train.losses import head_chunks, triton_kernel
from student_train.losses.base import PADDING_ID, TeacherRows
from student_train.losses.config import soft_config
from student_train.losses.head_chunks import HeadChunks
from student_train.losses.linear_head import LinearHead
from student_train.losses.measures import held_out_terms
from student_train.losses.row_kernel import KernelOptions, TorchRowKernel
from student_train.losses.triton_kernel import TritonRowKernel
from tests.unit.student_train.fused_rows import (
    V,
    assert_close,
    fused,
    gradients,
    make_leaves,
    make_rows,
    make_weights,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles to a row, the last one short; two chunks."""
    monkeypatch.setattr(triton_kernel, "TILE", 16)
    monkeypatch.setattr(head_chunks, "CHUNK_ROWS", 5)


def use(monkeypatch: pytest.MonkeyPatch, kernel: type) -> None:
    """Make every chunk use a kernel."""

    def make(options: KernelOptions, hidden: Tensor, dtype: torch.dtype, max_rows: int) -> object:
        if kernel is TritonRowKernel:
            return TritonRowKernel(options, dtype=dtype)
        return TorchRowKernel(
            options,
            max_rows=max_rows,
            logits_dtype=hidden.dtype,
            dtype=dtype,
            device=hidden.device,
        )

    monkeypatch.setattr(head_chunks, "_make_kernel", make)


def leaves_of(num_rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [leaf.detach().to(DEVICE, dtype).requires_grad_() for leaf in make_leaves(num_rows)]


def weights_of(num_rows: int) -> tuple[Tensor, Tensor]:
    soft_M, hard_M = make_weights(num_rows)
    return soft_M.to(DEVICE), hard_M.to(DEVICE)


def rows_of_all_kinds() -> TeacherRows:
    """Full rows, rows with unused entries, an empty row, hard labels in and out of the top-k."""
    rows = make_rows(8, 6)
    ids = rows.topk_ids_MK.clone()
    ids[1, 3:], ids[2] = PADDING_ID, PADDING_ID
    hard = rows.hard_M.clone()
    hard[3] = ids[3, 0]
    random = torch.Generator().manual_seed(6)
    samples = torch.randint(V, (8, 4), generator=random)
    samples[4, 1], samples[5, 2:] = samples[4, 0], PADDING_ID
    weights = torch.rand(8, 4, generator=random, dtype=torch.float64)
    other_teacher = torch.randn(8, V, generator=random, dtype=torch.float64).log_softmax(dim=-1)
    return replace(
        rows,
        hard_M=hard,
        topk_ids_MK=ids,
        tail_ids_MS=samples,
        tail_weights_MS=weights.masked_fill(samples == PADDING_ID, 0.0),
        log_power_sums={"50": (0.5 * other_teacher).logsumexp(dim=-1)},
    ).to(DEVICE)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"type": "forward_kl"},
        {"type": "jsd", "temperature": 2.0},
        {"type": "forward_kl", "tail": "sampled"},
        None,
    ],
    ids=str,
)
@pytest.mark.parametrize("entropy", [False, True])
def test_losses_and_gradients_equal_those_of_torch(
    options: dict[str, object] | None,
    entropy: bool,
    softcap: float | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, leaves, weights = rows_of_all_kinds(), leaves_of(8, dtype), weights_of(8)
    results = []
    for kernel in (TorchRowKernel, TritonRowKernel):
        use(monkeypatch, kernel)
        terms = fused(
            leaves[0],
            LinearHead(leaves[1], softcap=softcap),
            rows,
            None if options is None else soft_config(options),
            weights=weights,
            entropy_weight_M=weights[0] if entropy else None,
        )
        results.append((terms, gradients(terms.total, *leaves)))
    (torchs, torch_gradients), (tritons, triton_gradients) = results
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close(tritons.soft_M, torchs.soft_M, wide)
    assert_close(tritons.hard_M, torchs.hard_M, wide)
    assert torch.equal(tritons.student_argmax_M, torchs.student_argmax_M)
    if torchs.entropy_M is not None:
        assert tritons.entropy_M is not None
        assert_close(tritons.entropy_M, torchs.entropy_M, wide)
    for one, other in zip(triton_gradients, torch_gradients, strict=True):
        assert_close(one, other, dtype)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_held_out_measures_equal_those_of_torch(
    dtype: torch.dtype, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, (hidden, weight) = rows_of_all_kinds(), leaves_of(8, dtype)
    found = []
    for kernel in (TorchRowKernel, TritonRowKernel):
        use(monkeypatch, kernel)
        head = LinearHead(weight.detach(), softcap=softcap)
        terms = held_out_terms(hidden.detach(), head, rows, vocab_size=V)
        found.append([terms.student_MC, *terms.metrics.values()])
    for one, other in zip(*found, strict=True):
        assert_close(other, one, torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_complete_top_k_leaves_no_tail(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(4, V)
    power_sums = {"50": (0.5 * rows.topk_logprobs_MK).logsumexp(dim=-1)}
    rows = replace(rows, log_power_sums=power_sums).to(DEVICE)
    hidden, weight = leaves_of(4)
    weights = weights_of(4)
    config = soft_config({"type": "forward_kl", "temperature": temperature})
    found = []
    for kernel in (TorchRowKernel, TritonRowKernel):
        use(monkeypatch, kernel)
        terms = fused(hidden, weight, rows, config, weights=weights, entropy_weight_M=weights[1])
        found.append([terms.total.detach(), *gradients(terms.total, hidden, weight)])
    for one, other in zip(*found, strict=True):
        assert_close(other, one)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_names_its_rows(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, TritonRowKernel)
    hidden, weight = (leaf.detach() for leaf in leaves_of(6))
    hidden[1] = bad
    with pytest.raises(NonFiniteLossError, match=r"rows \[1\] of 6"):
        fused(hidden, weight, make_rows(6, 4).to(DEVICE), weights=weights_of(6))


@pytest.mark.gpu
def test_a_gpu_uses_the_triton_kernel() -> None:
    hidden = torch.zeros(2, 3, device="cuda")
    work = HeadChunks(hidden, torch.zeros(4, 3, device="cuda"), None, KernelOptions(4))
    assert isinstance(work.kernel, TritonRowKernel)
