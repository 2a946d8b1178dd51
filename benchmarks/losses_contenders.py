"""What ``losses.py`` compares: an output embedding, random labels, a method per contender."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from student_train.config import HybridLossConfig
from student_train.losses.base import FixedWeights, TeacherRows
from student_train.losses.config import soft_config
from student_train.losses.fused_linear import fused_linear_loss
from student_train.losses.hybrid import hybrid_loss
from student_train.losses.linear_head import LinearHead
from student_train.losses.soft_term import SoftTerm, make_divergence
from student_train.schedules import StepState

K = 64
DOCUMENT_ROWS = 256
HYBRID = "fused forward_kl"
SHAPES = {"V = 49k": (49_152, 576), "V = 152k": (151_936, 1024)}
"""Vocabulary and hidden size: those of SmolLM2-135M and Qwen3-0.6B."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCHEDULE = {"t": 0.4, "progress": 0.0}
SOFT, HARD = 0.9, 0.1
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "adaptive_kl",
    "entropy_adaptive_kl",
    "alpha_beta",
    "taid",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One size of the problem."""

    shape: str
    dtype: str
    num_rows: int

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype}"


@cache
def embedding(vocab_size: int, width: int, dtype: torch.dtype) -> Tensor:
    """A random output embedding; it takes seconds to make, so all heads of a process share it."""
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(vocab_size, width, generator=random).mul_(0.05).to(dtype)
    return weight.requires_grad_()


class Head:
    """Random hidden states, embedding and labels of one case, and one method per contender.

    Every method goes forward and back once, for the mean over rows.
    """

    def __init__(self, case: Case, *, dense_teacher: bool) -> None:
        vocab_size, width = SHAPES[case.shape]
        dtype = DTYPES[case.dtype]
        random = torch.Generator().manual_seed(0)
        self.num_rows, self.vocab_size = case.num_rows, vocab_size
        self.hidden = torch.randn(case.num_rows, width, generator=random).to(dtype)
        self.weight = embedding(vocab_size, width, dtype)
        self.hidden.requires_grad_()
        stride = vocab_size // K
        ids = torch.arange(K) * stride + torch.randint(stride, (case.num_rows, K), generator=random)
        logprobs = torch.randn(case.num_rows, K, generator=random).log_softmax(dim=-1)
        self.rows = TeacherRows(
            hard_M=ids[:, 3].clone(),
            topk_ids_MK=ids,
            topk_logprobs_MK=logprobs + torch.tensor(0.9).log(),
            log_tail_mass_M=torch.full((case.num_rows,), 0.1).log(),
            token_logprob_M=logprobs[:, 3] + torch.tensor(0.9).log(),
            document_M=torch.arange(case.num_rows) // DOCUMENT_ROWS,
        )
        if dense_teacher:
            self.teacher = torch.randn(case.num_rows, vocab_size, generator=random, dtype=dtype)

    def fused(self, divergence: SoftTerm | None) -> None:
        """Ours; None is cross-entropy alone."""
        terms = fused_linear_loss(
            self.hidden,
            LinearHead(self.weight),
            self.rows,
            divergence=divergence,
            weights=FixedWeights(
                torch.full((self.num_rows,), SOFT),
                torch.full((self.num_rows,), 1.0 if divergence is None else HARD),
            ),
            vocab_size=self.vocab_size,
        )
        self._backward(terms.total / self.num_rows)

    def hybrid(self, options: Mapping[str, str]) -> None:
        """Ours, as a training calls it."""
        terms = hybrid_loss(
            self.hidden,
            LinearHead(self.weight),
            self.rows,
            HybridLossConfig.model_validate(options),
            step=StepState(step=0, total_steps=1),
            vocab_size=self.vocab_size,
        )
        self._backward(terms.total / self.num_rows)

    def cross_entropy(self) -> None:
        """As transformers computes it."""
        from transformers.loss.loss_utils import ForCausalLMLoss  # seconds that most children save

        self._backward(
            ForCausalLMLoss(
                self._logits()[None], None, self.vocab_size, shift_labels=self.rows.hard_M[None]
            )
        )

    def dense_taid(self) -> None:
        """As the authors of TAID do: softmax and product in float32, the soft term alone."""
        logits = self._logits()
        mixture = (1 - SCHEDULE["t"]) * logits.detach() + SCHEDULE["t"] * self.teacher
        target = functional.softmax(mixture, dim=-1, dtype=torch.float32)
        logprobs = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
        products = torch.masked_fill(target * logprobs, torch.isinf(logits), 0)
        self._backward(-products.sum(dim=-1).sum() / self.num_rows)

    def dense_jsd(self) -> None:
        """As TRL does for GKD, on float32 logits as mixed precision returns them; beta 0.5."""
        student = functional.log_softmax(self._logits().float() / 1.0, dim=-1)
        teacher = functional.log_softmax(self.teacher.float() / 1.0, dim=-1)
        beta = torch.tensor(0.5)
        mixture = torch.logsumexp(
            torch.stack([student + torch.log(1 - beta), teacher + torch.log(beta)]), dim=0
        )
        to_teacher = functional.kl_div(mixture, teacher, reduction="none", log_target=True)
        to_student = functional.kl_div(mixture, student, reduction="none", log_target=True)
        divergence = beta * to_teacher + (1 - beta) * to_student
        self._backward(divergence.sum() / self.num_rows)

    def _logits(self) -> Tensor:
        return self.hidden @ self.weight.t()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()
        self.hidden.grad = self.weight.grad = None

    def contenders(self) -> dict[str, Callable[[], None]]:
        """Every contender by its name."""
        soft = {name: make_divergence(soft_config(name), schedule=SCHEDULE) for name in DIVERGENCES}
        return {
            **{f"fused {name}": partial(self.fused, term) for name, term in soft.items()},
            "fused cross-entropy": partial(self.fused, None),
            "hybrid with wsl weights": partial(self.hybrid, {"weight": "wsl"}),
            "hybrid with the risk-guided term": partial(self.hybrid, {"hard_term": "risk_guided"}),
            "cross-entropy": self.cross_entropy,
            "dense taid": self.dense_taid,
            "dense jsd": self.dense_jsd,
        }


def is_dense(name: str) -> bool:
    """Whether a contender needs the teacher's logits."""
    return name.startswith("dense")
