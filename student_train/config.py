"""Settings of student training and evaluation. No torch import here."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from storage.config import Config
from storage.filter import FilterConfig
from storage.keys import ColumnSpec
from student_train.checkpoints.config import CheckpointConfig
from student_train.hard.config import CrossEntropyConfig, HardLabel, HardTermConfig
from student_train.losses.config import TAIL_SAMPLES, ForwardKlConfig, SoftConfig, TaidConfig
from student_train.losses.config import required_columns as divergence_columns
from student_train.models.lora_config import LoraConfig
from student_train.sections import short_form
from student_train.watching.config import (
    BestConfig,
    EarlyStopConfig,
    HeldoutConfig,
    HeldoutMetric,
    WatchConfig,
)
from student_train.weights.config import StaticWeightConfig, WeightConfig

METRICS_FILE = "metrics.jsonl"
"""One line per optimiser step, in the output directory of a training."""

HELDOUT_FILE = "heldout.jsonl"
"""One line per held-out evaluation during the training, beside it."""

SELECTION_FILE = "selection.json"
"""Which step was exported and why, where ``best`` or ``early_stop`` is set; beside it."""

GENERATIONS_FILE = "generations.jsonl"
"""Answers to held-out prompts, one line per such evaluation."""

MODEL_DIRECTORY = "model"
"""The exported student, in the output directory of a training."""

ADAPTER_DIRECTORY = "adapter"
"""Its adapter by itself, beside it, where only that was trained."""

Beta = Annotated[float, Field(ge=0, lt=1)]


class TaidScheduleConfig(Config):
    """How TAID's interpolation parameter t moves from the student (0) to the teacher (1)."""

    mode: Literal["adaptive", "linear"] = "adaptive"
    """``adaptive``: t rises faster while the loss falls, and never stays below the straight line.
    ``linear``: the straight line over all steps."""
    start: float = Field(default=0.4, ge=0, lt=1)
    """t of the first step. The authors take 0.2 to 0.4; the larger the gap between teacher and
    student, the smaller."""
    end: float = Field(default=1.0, gt=0, le=1)
    """t that is never exceeded."""
    alpha: float = Field(default=5e-4, ge=0, le=1)
    """Step size of the adaptive mode per update. It matters only in runs of more than 2 / alpha
    updates: below, t follows the straight line."""
    momentum: Beta = 0.99
    """Share of the old momentum of the loss change that is kept at an update."""
    reference_steps: int | None = Field(default=None, ge=1)
    """Set it to rescale alpha to the length of the run: t then takes the course that it would
    take with ``alpha`` in a run of so many steps. 10000 suits the published alpha."""
    updates: Literal["optimizer_step", "local_micro_batch"] = "optimizer_step"
    """``optimizer_step``: one update per step from the loss of all ranks. ``local_micro_batch``: as
    the authors' release, every rank by itself after every micro-batch; the result then depends on
    the number of ranks and on ``batch.micro_tokens``."""

    @model_validator(mode="after")
    def _forwards(self) -> Self:
        if self.start > self.end:
            raise ValueError(f"t would fall: start is {self.start:g}, end is {self.end:g}")
        return self


class SupervisionConfig(Config):
    """What every loss can be told: a divergence on soft labels beside a term on hard labels."""

    type: str
    soft: SoftConfig
    weight: WeightConfig
    hard: HardLabel = "sampled"
    """Hard label: the token the teacher ``sampled``, its ``argmax``, the token of the ``dataset``
    (only with labels made in score mode), or a ``random`` one (a control)."""
    hard_term: HardTermConfig = CrossEntropyConfig()
    """What is computed with the hard label."""
    student_entropy: float = Field(default=0.0, ge=0)
    """Weight of the student's entropy, which is then kept high; 0 is off. Bridge-Garden's control
    has 0.1."""
    schedule: TaidScheduleConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.schedule is not None and not isinstance(self.soft, TaidConfig):
            raise ValueError(
                f"schedule moves the t of TAID, the soft term is {self.soft.type}; remove it"
            )
        if self.hard == "random" and self.weight.needs_hard_label_probability:
            raise ValueError(
                f"weight {self.weight.type!r} needs the teacher's probability of the hard label, "
                "which is not stored for random tokens; use another weight or another hard label"
            )
        return self

    @property
    def taid_schedule(self) -> TaidScheduleConfig | None:
        """How t moves; None where the soft term has no t."""
        if not isinstance(self.soft, TaidConfig):
            return None
        return self.schedule or TaidScheduleConfig()


class HybridLossConfig(SupervisionConfig):
    """Soft and hard labels blended token by token (Bridge-Garden, ICML 2026)."""

    type: Literal["hybrid"] = "hybrid"
    soft: SoftConfig = ForwardKlConfig()
    """Divergence between teacher and student on the k+1 categories (top-k and tail), by its name
    or as a section with options. ``forward_kl`` covers the teacher's modes, ``reverse_kl`` seeks
    one of them."""
    weight: WeightConfig = StaticWeightConfig()
    """How soft and hard terms are weighted."""
    schedule: TaidScheduleConfig | None = None
    """How t moves, with ``soft: taid`` only; unset, as published."""


class TaidLossConfig(SupervisionConfig):
    """The teacher interpolated with the student, moving to the teacher (TAID, ICLR 2025)."""

    type: Literal["taid"] = "taid"
    soft: TaidConfig = TaidConfig()
    """Options of the divergence."""
    weight: WeightConfig = StaticWeightConfig(soft_weight=1.0)
    """How soft and hard terms are weighted; as published there is no hard term."""
    schedule: TaidScheduleConfig = TaidScheduleConfig()
    """How t moves."""


LossConfig = Annotated[
    Annotated[HybridLossConfig | TaidLossConfig, Field(discriminator="type")],
    short_form("hybrid"),
]
"""Which loss, and its options."""


def required_columns(loss: SupervisionConfig) -> set[str]:
    """What the cache must hold for a loss beside top-k, tail mass and sampled token.

    Names as in ``label.columns``; ``tail_samples`` stands for a section of samples of any kind.
    """
    return divergence_columns(loss.soft) | loss.weight.required_columns


def missing_columns(loss: SupervisionConfig, columns: Iterable[ColumnSpec]) -> list[str]:
    """What a loss needs and the ``columns`` of a label request lack, sorted."""
    stored = {column if isinstance(column, str) else TAIL_SAMPLES for column in columns}
    return sorted(required_columns(loss) - stored)


class OptimizerConfig(Config):
    """AdamW with a warm-up and a decay."""

    type: Literal["adamw", "cpu_adam"] = "adamw"
    """``adamw``: PyTorch's. ``cpu_adam``: DeepSpeed's for the CPU, which it compiles on first use;
    ``deepspeed.offload_optimizer`` needs it."""
    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the decay after the warm-up, down to ``min_lr_ratio * lr``. ``wsd`` (warm-up,
    stable, decay) stays at the peak and falls linearly at the end."""
    decay_ratio: float = Field(default=0.1, gt=0, le=1)
    """Share of the steps after the warm-up during which ``wsd`` falls; the others ignore it."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of all steps during which the learning rate rises linearly from 0."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step relative to the peak."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the moment estimates."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, applied to all parameters."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""


class BatchConfig(Config):
    """How samples become optimiser steps; the grouping is the same for every world size."""

    tokens: int = Field(default=131072, ge=1)
    """Tokens (prompt and response) of one optimiser step, over all ranks."""
    micro_tokens: int = Field(default=8192, ge=1)
    """Tokens, padding included, that go through the model at once; lower it when memory runs
    out. It does not change the result beyond rounding."""
    packing: Literal["first_fit", "length_sorted", "padded"] = "first_fit"
    """``first_fit``: samples follow one another in a row without padding and without seeing each
    other; rows are filled as well as possible. ``length_sorted``: the same with rows of samples
    of like length. ``padded``: one sample per row, padded to the longest of its micro-batch, for
    models that cannot keep samples apart; its steps are those of ``first_fit``, and so is its
    result, beyond rounding."""
    row_tokens: int = Field(default=2048, ge=1)
    """Tokens of a row, and at most an eighth of ``tokens``. A row stays on one rank; a longer
    sample is a row of its own."""
    lanes: int = Field(default=64, ge=1, le=4096)
    """Streams of samples that take turns. The order of samples is the same for every number of
    ranks up to it; ranks have equal work where it is a multiple of their number."""
    window_tokens: int = Field(default=8192, ge=1)
    """Tokens of a lane among which samples are shuffled and packed. What is held in memory at a
    time grows with it and with the lanes of a rank."""


class ExtraLabels(Config):
    """Labels of another label set or selection that are mixed in."""

    label_set: str
    """Its key."""
    selection: str
    """Key of a selection."""
    store: str | None = None
    """URI of the store, unset for that of the project."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """Passes over it per epoch, as in ``train.data.weight``."""
    filter: FilterConfig = FilterConfig()
    """Which of its samples are kept."""


class TrainDataConfig(Config):
    """Which labels are trained on, beyond the project's selection."""

    filter: FilterConfig = FilterConfig()
    """Which samples of the selection are kept. Resolved once, before the first step."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """Passes over the selection per epoch: 0.5 takes a random half, drawn anew for every epoch,
    2 takes every sample twice."""
    mixture: tuple[ExtraLabels, ...] = ()
    """Other labels that are mixed in, with the same vocabulary."""
    k: int | None = Field(default=None, ge=1)
    """Tokens per position that are read; what the labels hold beyond goes into the tail. Unset: all
    of them, in a mixture as many as every label set has."""
    supervise: Literal["labelled", "last_turn"] = "labelled"
    """``labelled``: the loss is taken at every labelled position, which are all tokens of the
    response, or those that the label mask leaves. ``last_turn``: only at those after the last gap
    of the label mask, the last answer of a conversation with several."""


class LoaderConfig(Config):
    """How labels are fetched. Nothing here changes the result, or the student's key."""

    workers: int = Field(default=1, ge=1, le=64)
    """Threads that read and decode. More help where the store is far away, or decoding is slower
    than the model: the share of time spent waiting for data is in the metrics."""
    prefetch: int = Field(default=4, ge=1)
    """Micro-batches that are made ahead."""
    memory_mib: int = Field(default=1024, ge=1)
    """Decoded labels that a rank holds. With less than its lanes need (lanes x about 16384 rows x
    8 bytes x k), batches of labels are decoded more than once."""
    cache_directory: str | None = None
    """Where copies of remote shards are kept, shared by all processes of a host. Unset, they are
    read in place. Without effect on a local store."""
    cache_gib: float = Field(default=50.0, gt=0)
    """Size of that directory; the longest unused copies are removed."""


class DeepSpeedConfig(Config):
    """How DeepSpeed shards the training state."""

    stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: 0 replicates everything, 1 shards optimiser states, 2 also gradients, 3 also the
    weights. The result is the same beyond rounding."""
    offload_optimizer: bool = False
    """Keep master weights and moments in host memory, and update them there (stages 1 to 3, with
    ``optimizer.type: cpu_adam``): 12 bytes per weight less on the GPUs, for slower steps."""
    offload_parameters: bool = False
    """Keep the weights in host memory too, and fetch a layer when it is computed (stage 3)."""

    @model_validator(mode="after")
    def _stage_allows(self) -> Self:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError(
                "offload_optimizer needs sharded optimiser states; set stage to 1, 2 or 3"
            )
        if self.offload_parameters and self.stage != 3:
            raise ValueError(
                f"offload_parameters needs sharded weights, and stage is {self.stage}; set it to 3"
            )
        return self


class PrunedModelConfig(Config):
    """A student made by keeping some layers of another model, renumbered."""

    type: Literal["pruned"] = "pruned"
    of: Literal["teacher"] | str = "teacher"
    """``teacher``, or the path of a Hugging Face model directory."""
    keep_layers: tuple[int, ...] = Field(min_length=1)
    """Layers to keep, in this order."""

    @model_validator(mode="after")
    def _each_layer_once(self) -> "PrunedModelConfig":
        if len(set(self.keep_layers)) != len(self.keep_layers):
            raise ValueError(f"keep_layers {list(self.keep_layers)} names a layer twice")
        return self

    def __str__(self) -> str:
        return f"layers {', '.join(map(str, self.keep_layers))} of {self.of}"


NOT_DECIDING = frozenset({"watch", "activation_checkpointing", "checkpoint", "loader"})
"""Settings of a training that change nothing about its result."""


class TrainConfig(Config):
    """Everything that decides what a student becomes.

    All of it enters the student's key, ``model`` by content, except for ``watch``, ``heldout``
    where neither ``best`` nor ``early_stop`` looks at it,
    ``activation_checkpointing``, ``checkpoint`` and ``loader``.
    """

    model: str | PrunedModelConfig
    """Directory of the untrained student, or how to make one."""
    loss: LossConfig = HybridLossConfig()
    """Objective."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimiser and learning-rate schedule."""
    lora: LoraConfig | None = None
    """Train low-rank adapters and leave the student's own weights as they are; unset, all weights
    are trained."""
    dropout: bool = False
    """Use the dropout that the student's own config asks for. Off, a result does not depend on the
    number of ranks or on how samples are packed, beyond rounding."""
    batch: BatchConfig = BatchConfig()
    """Batch sizes."""
    data: TrainDataConfig = TrainDataConfig()
    """Filters and mixtures."""
    loader: LoaderConfig = LoaderConfig()
    """How labels are fetched."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the selection."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the forward and backward pass; master weights are float32 in both cases."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Sharding of the training state."""
    chat_template: Literal["same", "teacher"] = "same"
    """``same``: the exported student keeps its own tokenizer files, whose chat template must write
    what the labels were made with. ``teacher``: it gets the teacher's tokenizer files, chat
    template and end-of-sequence ids; token ids are the same in both."""
    activation_checkpointing: bool = False
    """Keep only the inputs of layers for the backward pass and compute the rest once more: most of
    the memory for one more forward pass. It changes no bit of the result."""
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the exported weights, whatever ``dtype`` was."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of samples in every epoch."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """How often it is saved, and where."""

    heldout: HeldoutConfig = HeldoutConfig()
    """Evaluation during the training."""
    best: BestConfig | None = None
    """Export the best of the evaluated students; unset, the one after the last step."""
    early_stop: EarlyStopConfig | None = None
    """End before the last step; unset, all steps are made."""
    watch: WatchConfig = WatchConfig()
    """Where metrics go."""

    @model_validator(mode="after")
    def _offloads_with_cpu_adam(self) -> Self:
        if self.deepspeed.offload_optimizer and self.optimizer.type != "cpu_adam":
            raise ValueError(
                "deepspeed.offload_optimizer updates weights on the CPU, where optimizer.type: "
                f"{self.optimizer.type} is slow; set optimizer.type: cpu_adam"
            )
        return self

    @model_validator(mode="after")
    def _evaluated_where_it_decides(self) -> Self:
        if self.heldout_decides and self.heldout.every_steps is None:
            name = "early_stop" if self.best is None else "best"
            raise ValueError(
                f"{name} looks at the evaluation during the training, which is off; set "
                "heldout.every_steps"
            )
        return self

    @property
    def heldout_decides(self) -> bool:
        """Whether what is exported depends on the held-out evaluation."""
        return self.best is not None or self.early_stop is not None

    def deciding(self) -> dict[str, Any]:
        """The settings that decide what the student becomes, as plain values, without ``model``."""
        watching = {"heldout", "best", "early_stop"}
        decided = self.model_dump(mode="json", exclude={"model", *NOT_DECIDING, *watching})
        if self.heldout_decides:
            answers = {"heldout": {"generations", "max_new_tokens"}}
            decided |= self.model_dump(mode="json", include=watching, exclude=answers)
        return decided


class EvaluateConfig(Config):
    """What is measured on the held-out prompts."""

    metrics: tuple[HeldoutMetric, ...] = (
        "kl",
        "cross_entropy",
        "agreement",
    )
    """``kl``: KL(teacher, student) on the k+1 categories, nats per token; ``cross_entropy``: of
    the hard labels, nats per token; ``agreement``: share of equal argmax tokens. Others:
    ``reverse_kl``, ``topk_overlap``, ``student_entropy``."""
    generations: int = Field(default=4, ge=0)
    """Held-out prompts that every student answers greedily, shown side by side in the report."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Length limit of these answers."""
    micro_tokens: int = Field(default=8192, ge=1)
    """Tokens, padding included, that go through the model at once."""


class LabelSource(Config):
    """The cached labels that a job reads."""

    store: str
    """URI of the label store."""
    label_set: str
    """Label set key."""
    selection: str
    """Key of the selection: exactly these samples, whatever the set holds later."""
    weight: float = Field(default=1.0, gt=0)
    """Passes over it per epoch."""


class TrainJob(Config):
    """One training of one student, as plain data that can be sent to another process."""

    labels: LabelSource
    mixture: tuple[LabelSource, ...] = ()
    """Labels that are mixed in; filters are applied already."""
    heldout: LabelSource | None = None
    """Labels that the student is evaluated on during the training."""
    model: str
    """Directory of the untrained student."""
    tokenizer: str
    """Directory of the teacher's tokenizer, against which the cached ids are checked."""
    train: TrainConfig
    output: str
    """Directory of the run; gets ``metrics.jsonl``, ``checkpoints/``, ``model/``."""
    card: dict[str, str] = Field(default_factory=dict)
    """Provenance for the model card."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each process."""


class EvaluateJob(Config):
    """One evaluation of one model on held-out labels."""

    labels: LabelSource
    model: str
    """Directory of the model."""
    evaluate: EvaluateConfig
    output: str
    """File that gets the result as JSON."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the process."""
