"""A tiny tokenizer and a tiny teacher, made once."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from storage.keys import (
    ColumnSpec,
    GenerationSpec,
    LabelSetSpec,
    MassSpec,
    SamplingSpec,
    TeacherFingerprint,
    TopKSpec,
    sample_key,
)
from storage.selection import SampleRequest

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token (256 of them), then five special tokens; 261 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: n for n, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=SPECIAL[1:]
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def make_request() -> Callable[..., SampleRequest]:
    """A function that makes a request from token ids."""

    def make(
        prompt: Sequence[int],
        response: Sequence[int] | None = None,
        *,
        sample_index: int = 0,
        mask: Sequence[bool] | None = None,
    ) -> SampleRequest:
        mask_R = None if mask is None else np.array(mask, dtype=np.bool_)
        return SampleRequest(
            key=sample_key(prompt, sample_index, response_ids=response, label_mask=mask_R),
            sample_index=sample_index,
            prompt_ids_P=np.array(prompt, dtype=np.int32),
            response_ids_R=None if response is None else np.array(response, dtype=np.int32),
            sources=(),
            label_mask_R=mask_R,
        )

    return make


@pytest.fixture
def make_spec() -> Callable[..., LabelSetSpec]:
    """A function that makes a spec; mode, soft labels, vocabulary and sampling can be given."""

    def make(
        *,
        mode: str = "generate",
        k: int = 4,
        kind: MassSpec | None = None,
        columns: tuple[ColumnSpec, ...] = ("entropy",),
        vocab_size: int = 40,
        **sampling: object,
    ) -> LabelSetSpec:
        drawn = {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "max_tokens": 8,
            "stop": (),
            "seed": 0,
            **sampling,
        }
        return LabelSetSpec(
            generation=GenerationSpec(
                teacher=TeacherFingerprint(weights="w", config="c"),
                mode=mode,  # type: ignore[arg-type]
                compute_dtype="float32",
                head_dtype="float32",
                sampling=SamplingSpec.model_validate(drawn) if mode == "generate" else None,
            ),
            kind=kind or TopKSpec(k=k),
            columns=columns,
            tail="exact",
            vocab_size=vocab_size,
        )

    return make


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers; its embedding has eight rows more than the vocabulary of 40.

    Its weights are larger than usual, so that its distributions are far from uniform.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    directory = tmp_path_factory.mktemp("teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory
