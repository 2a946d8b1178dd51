"""What ``training.py`` compares: one student under DeepSpeed, a step per way to train it; and
whole trainings, ours and TRL's, of one student by one teacher.
"""

import importlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.made_up_labels import write_labels
from storage.keys import sample_key
from storage.samples import LabelledSample
from storage.testing import make_spec
from student_train.config import (
    BatchConfig,
    HybridLossConfig,
    LabelSource,
    LoaderConfig,
    OptimizerConfig,
    TrainConfig,
)
from student_train.engine import initialize, prepare_process
from student_train.losses.base import FixedWeights
from student_train.losses.fused_linear import fused_linear_loss
from student_train.models.documents import isolate_documents
from student_train.models.flops import model_flops
from student_train.models.head import head_of
from student_train.models.student import Student, model_inputs
from student_train.optimizer_step import OptimizerStep
from student_train.schedules import StepState
from student_train.step_clock import StepClock
from student_train.stopping import StopRequest
from student_train.streaming.reader import LabelReader, MicroBatch, collate
from student_train.streaming.step_plan import TrainingPlan
from student_train.streaming.stream import BatchStream
from student_train.trainer import plan_training
from student_train.weights.config import StaticWeightConfig
from teacher_server.dense_rows import label_rows

KINDS = ("hybrid", "fused", "plain", "online")
TRAININGS = ("ours", "TRL")
TAID_T = 0.4
ZIPF = 1.5
TEACHER_SPREAD = 2.5
"""Standard deviation of the teacher's logits around the frequencies of words."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a micro-batch and of the two models."""

    micro_tokens: int
    hidden: int
    layers: int
    teacher_hidden: int
    teacher_layers: int


def _llama(vocab_size: int, hidden: int, layers: int) -> LlamaForCausalLM:
    """A random Llama with heads of 64 and tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class _Losses(nn.Module):
    """A student with a loss per kind, so that all share one engine and its optimiser."""

    def __init__(self, student: Student, teacher: Any, vocab_size: int) -> None:
        super().__init__()
        self.student, self._vocab_size = student, vocab_size
        # not a submodule: DeepSpeed must not see it
        self._teacher = [teacher]

    def forward(self, batch: MicroBatch, kind: str) -> Tensor:
        """The sum over label rows."""
        if kind == "hybrid":
            total: Tensor = self.student(batch, StepState(step=0, total_steps=1)).total
            return total
        model = self.student.language_model
        inputs = model_inputs(batch)
        if kind == "plain":
            targets = torch.full((inputs["input_ids"].numel(),), -100)
            targets[batch.rows_M] = batch.labels.hard_M
            targets = targets.view(inputs["input_ids"].shape)
            loss: Tensor = model(**inputs, labels=targets, shift_labels=targets).loss
            return loss * len(batch.rows_M)
        hidden_BTH = model.base_model(**inputs).last_hidden_state
        hidden_MH = hidden_BTH.flatten(0, 1).index_select(0, batch.rows_M)
        if kind == "fused":
            ones_M = torch.ones(len(batch.rows_M))
            return fused_linear_loss(
                hidden_MH,
                head_of(model),
                batch.labels,
                divergence=None,
                weights=FixedWeights(0 * ones_M, ones_M),
                vocab_size=self._vocab_size,
            ).total
        with torch.no_grad():
            found = self._teacher[0].base_model(**inputs).last_hidden_state
            found = found.flatten(0, 1).index_select(0, batch.rows_M)
            teacher_MV = self._teacher[0].lm_head(found)
        return _dense_taid(model.lm_head(hidden_MH), teacher_MV)


def _dense_taid(student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
    """As the authors of TAID: softmax and product over the vocabulary in float32."""
    mixture = (1 - TAID_T) * student_MV.detach() + TAID_T * teacher_MV
    target = functional.softmax(mixture, dim=-1, dtype=torch.float32)
    logprobs = functional.log_softmax(student_MV, dim=-1, dtype=torch.float32)
    return -torch.masked_fill(target * logprobs, torch.isinf(student_MV), 0).sum()


class Contenders:
    """A student, and a teacher for those who run one.

    Args:
        sizes: Of the models.
        vocab_size: Of both.
        online: Whether a teacher is made.
    """

    def __init__(self, sizes: Sizes, vocab_size: int, *, online: bool) -> None:
        torch.manual_seed(0)
        self.sizes = sizes
        model = _llama(vocab_size, sizes.hidden, sizes.layers)
        teacher = None
        if online:
            teacher = _llama(vocab_size, sizes.teacher_hidden, sizes.teacher_layers)
            teacher = teacher.to(torch.bfloat16).eval()
            self.teacher_ratio = _num_parameters(teacher) / _num_parameters(model)
            isolate_documents(teacher)
        loss = HybridLossConfig(weight=StaticWeightConfig(soft_weight=0.9))
        student = Student(model, loss, vocab_size)
        isolate_documents(model)
        self._losses = _Losses(student.train(), teacher, vocab_size)
        self._engine: Any = None

    def start(self) -> None:
        """Put the student under DeepSpeed."""
        prepare_process(1)
        self._engine = initialize(self._losses, TrainConfig(model=""))

    def step(self, batch: MicroBatch, kind: str, *, update: bool = True) -> None:
        """Forward, backward and an update, of a micro-batch.

        Args:
            batch: The micro-batch.
            kind: One of ``KINDS``.
            update: Whether the optimiser makes a step.
        """
        self._engine.set_gradient_accumulation_boundary(update)
        total = self._engine(batch, kind)
        self._engine.backward(total / len(batch.rows_M))
        self._engine.step()


# -- whole trainings ------------------------------------------------------------------------------
def has_trl() -> bool:
    """Whether TRL can be imported."""
    return importlib.util.find_spec("trl") is not None


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training took, and what came out of it."""

    seconds: float
    """CPU seconds of the loop."""
    tokens: int
    """That were trained on, prompts included and padding left out."""
    steps: int
    """Of the optimiser."""
    kl_before: float
    """Held-out KL(teacher, student) of the untrained student, nats per response token."""
    kl: float
    """That of the trained one."""


@dataclass(frozen=True)
class Distillation:
    """One epoch of forward KL from one teacher, the same for every contender.

    Words are Zipf distributed, in texts and in what the teacher expects. It is random otherwise:
    a function of the last words, made by transformer layers.
    """

    num_samples: int
    num_heldout: int
    vocab_size: int
    hidden: int = 128
    layers: int = 2
    teacher_hidden: int = 640
    teacher_layers: int = 6
    batch_samples: int = 4
    prompt_tokens: int = 24
    median_tokens: int = 80
    sigma: float = 0.6
    """Of the logarithm of a response's length."""
    lr: float = 2e-3
    k: int = 64

    @cached_property
    def texts(self) -> list[npt.NDArray[np.int32]]:
        """Token ids of every sample, those for training first."""
        random = np.random.default_rng(0)
        logs = random.normal(
            np.log(self.median_tokens), self.sigma, self.num_samples + self.num_heldout
        )
        weights = np.arange(1, self.vocab_size + 1) ** -ZIPF
        return [
            random.choice(
                self.vocab_size, self.prompt_tokens + length, p=weights / weights.sum()
            ).astype(np.int32)
            for length in np.clip(np.exp(logs), 2, 8 * self.median_tokens).astype(int)
        ]

    @property
    def num_tokens(self) -> int:
        """Of the samples for training."""
        return sum(len(text) for text in self.texts[: self.num_samples])

    def student(self) -> LlamaForCausalLM:
        """The untrained student, float32."""
        torch.manual_seed(1)
        return _llama(self.vocab_size, self.hidden, self.layers)

    def teacher(self) -> LlamaForCausalLM:
        """The teacher, float32."""
        torch.manual_seed(2)
        teacher = _llama(self.vocab_size, self.teacher_hidden, self.teacher_layers).eval()
        constant, width = 8.0, self.teacher_hidden
        head = torch.randn(self.vocab_size, width) * TEACHER_SPREAD / width**0.5
        # the last norm makes hidden states of unit variance, in which dimension 0 is all but fixed
        after_norm = constant / (1 + constant**2 / width) ** 0.5
        head[:, 0] = -ZIPF * torch.arange(1, self.vocab_size + 1).log() / after_norm
        words = torch.randn(self.vocab_size, width)
        words[:, 0] = constant
        teacher.model.embed_tokens.weight = nn.Parameter(words)
        teacher.lm_head.weight = nn.Parameter(head)
        return teacher

    @property
    def teacher_ratio(self) -> float:
        """Weights that a token is multiplied with, of the teacher over the student."""

        def weights(hidden: int, layers: int) -> int:
            return hidden * (self.vocab_size + layers * (4 * hidden + 3 * (hidden * 11 // 4)))

        return weights(self.teacher_hidden, self.teacher_layers) / weights(self.hidden, self.layers)

    @torch.no_grad()
    def _response_logprobs(self, model: Any, text: npt.NDArray[np.int32]) -> Tensor:
        """float32[R, V] of one sample."""
        ids = torch.from_numpy(text[:-1].astype(np.int64))[None]
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits: Tensor = model.lm_head(hidden[0, self.prompt_tokens - 1 :])
        return logits.log_softmax(dim=-1)

    def write(self, directory: Path) -> LabelSource:
        """The teacher's labels of the samples for training."""
        spec = make_spec(k=self.k, vocab_size=self.vocab_size, columns=())
        return write_labels(directory, spec, self._labelled(spec))

    def _labelled(self, spec: Any) -> Iterator[LabelledSample]:
        teacher = self.teacher()
        for text in self.texts[: self.num_samples]:
            prompt, response = text[: self.prompt_tokens], text[self.prompt_tokens :]
            key, positions = sample_key(prompt, 0), np.arange(len(response), dtype=np.int32)
            rows = label_rows(
                self._response_logprobs(teacher, text), response, positions, spec, key
            )
            yield LabelledSample(
                key=key,
                sample_index=0,
                prompt_ids_P=prompt,
                response_ids_R=response,
                positions_N=positions,
                token_logprob_N=rows.token_logprob_N,
                token_rank_N=rows.token_rank_N,
                log_tail_mass_N=rows.log_tail_mass_N,
                topk_ids_NK=rows.topk_ids_NK,
                topk_logprobs_NK=rows.topk_logprobs_NK,
                optional=rows.optional,
                finish_reason="stop",
            )

    def held_out_kl(self, student: Any, teacher: Any) -> float:
        """KL(teacher, student) over the vocabulary, nats per response token of unseen samples."""
        total, count = 0.0, 0
        for text in self.texts[self.num_samples :]:
            expected = self._response_logprobs(teacher, text)
            found = self._response_logprobs(student, text)
            total += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
            count += len(expected)
        return total / count

    def run(self, name: str, source: LabelSource) -> Trained:
        """Train in this process, which needs to be a fresh one."""
        student, teacher = self.student(), self.teacher()
        before = self.held_out_kl(student.eval(), teacher)
        with tempfile.TemporaryDirectory() as scratch:
            train = (
                self._ours(student, source)
                if name == "ours"
                else self._trl(student, teacher, scratch)
            )
            started = time.process_time()
            steps = train()
            seconds = time.process_time() - started
        after = self.held_out_kl(student.eval(), teacher)
        return Trained(seconds, self.num_tokens, steps, before, after)

    def _ours(self, student: Any, source: LabelSource) -> Callable[[], int]:
        """The training loop of student_train; reading, verifying and decoding labels included."""
        reader = LabelReader(source)
        config, plan = self._plan(reader)
        prepare_process(1)
        isolate_documents(student)
        engine = initialize(Student(student, config.loss, self.vocab_size).train(), config)
        step = OptimizerStep(
            config,
            plan,
            reader,
            engine=engine,
            clock=StepClock(config.loss, len(plan)),
            flops=model_flops(student),
            stop=StopRequest(),
        )

        def loop() -> int:
            together = partial(collate, hard=config.loss.hard, spec=reader.spec, packed=True)
            with BatchStream(
                reader,
                plan,
                first_step=0,
                rank_of_world=(0, 1),
                collate=together,
                loader=LoaderConfig(),
            ) as stream:
                for number in range(len(plan)):
                    step(number, stream)
            return len(plan)

        return loop

    def _plan(self, reader: LabelReader) -> tuple[TrainConfig, TrainingPlan]:
        """As many steps as TRL makes, or one or two less: steps are filled with tokens."""
        most_steps = -(-self.num_samples // self.batch_samples)
        tokens = self.num_tokens // most_steps
        while True:
            config = TrainConfig(
                model="",
                dtype="float32",
                loss=HybridLossConfig(weight=StaticWeightConfig(soft_weight=1.0)),
                optimizer=OptimizerConfig(lr=self.lr, schedule="constant", warmup_ratio=0.0),
                batch=BatchConfig(tokens=tokens, micro_tokens=2 * tokens),
            )
            plan = plan_training(reader, config)
            if len(plan) <= most_steps:
                return config, plan
            tokens += 1 + tokens // 100

    def _trl(self, student: Any, teacher: Any, scratch: str) -> Callable[[], int]:
        """TRL's trainer with the teacher in the loop, on given responses (lmbda 0)."""
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # where GKD lives, and its API may change
        gkd = importlib.import_module("trl.experimental.gkd")
        datasets = importlib.import_module("datasets")
        rows = [{"input_ids": text.tolist()} for text in self.texts[: self.num_samples]]
        settings = gkd.GKDConfig(
            output_dir=scratch,
            beta=0.0,  # KL(teacher, student)
            lmbda=0.0,
            per_device_train_batch_size=self.batch_samples,
            gradient_accumulation_steps=1,
            num_train_epochs=1,
            learning_rate=self.lr,
            lr_scheduler_type="constant",
            adam_beta2=0.95,  # ours
            optim="adamw_torch_fused",
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            logging_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = gkd.GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=settings,
            data_collator=self._padded,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=_any_tokenizer(),
        )

        def loop() -> int:
            trainer.train()
            return int(trainer.state.global_step)

        return loop

    def _padded(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Padded to the longest of the batch, as TRL's collators do; labels are the responses."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [
            text.clone().index_fill_(0, torch.arange(self.prompt_tokens), -100) for text in ids
        ]
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
        return {
            "input_ids": pad(ids),
            "attention_mask": pad([torch.ones_like(text) for text in ids]),
            "labels": pad(labels, padding_value=-100),
        }


def _any_tokenizer() -> Any:
    """TRL wants one, though all its trainer takes from it here is a padding token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
