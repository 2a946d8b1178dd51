"""A tiny student, its tokenizer, and cached labels that fit them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from storage.samples import LabelledSample
from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from student_train.config import LabelSource

VOCAB_SIZE = 40
"""Tokens of the tokenizer, which is the effective vocabulary of the labels."""
EMBEDDING_ROWS = 48
"""Rows of the student's embedding: eight are padding."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _model(**changes: object) -> LlamaForCausalLM:
    settings = {
        "vocab_size": EMBEDDING_ROWS,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**settings)).eval()  # type: ignore[arg-type]


@pytest.fixture
def tiny_model() -> Callable[..., LlamaForCausalLM]:
    """A function that makes a random Llama of three layers; its arguments change the config."""
    return _model


@pytest.fixture
def save_student() -> Callable[..., Path]:
    """A function that writes a random student to a directory and returns it."""

    def save(directory: Path, *, swap_tokens: bool = False, **changes: object) -> Path:
        _model(**changes).save_pretrained(directory)
        vocabulary = {"<s>": 0, "</s>": 1} | {f"w{n}": n for n in range(2, VOCAB_SIZE)}
        if swap_tokens:
            vocabulary["w7"], vocabulary["w8"] = 8, 7
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="</s>")),
            bos_token="<s>",
            eos_token="</s>",
        )
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        tokenizer.save_pretrained(directory)
        return directory

    return save


@pytest.fixture
def samples() -> list[LabelledSample]:
    """Six samples of different lengths: prompts of 4 to 6 tokens, responses of 2 to 7."""
    spec = make_spec(vocab_size=VOCAB_SIZE)
    return [make_sample(number, spec, num_tokens=2 + number) for number in range(6)]


@pytest.fixture
def labels(tmp_path: Path, samples: list[LabelledSample]) -> LabelSource:
    """A store that holds these samples, and a selection of all of them."""
    store = LabelStore(str(tmp_path / "store"), create=True)
    label_set = store.create(make_spec(vocab_size=VOCAB_SIZE), {})
    label_set.append(samples, {})
    requests = tuple(
        SampleRequest(s.key, s.sample_index, s.prompt_ids_P, None, ()) for s in samples
    )
    selection = Selection(requests).save(store.objects)
    return LabelSource(store=store.uri, label_set=label_set.key, selection=selection)
