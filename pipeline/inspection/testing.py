"""Label sets of chosen texts for tests: a byte-level tokenizer and made-up labels, no model."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from storage.dense import label_sample_densely
from storage.keys import LabelSetSpec, sample_key
from storage.label_set import LabelSet
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.store import LabelStore
from storage.testing import make_spec

SPECIAL = ["<|end|>", "<|user|>"]
WORDS = ["hello", " world", "</script>", "<b>", "\u202e", "\t", "\n", "  "]
"""Tokens of several bytes; every other byte is a token of its own."""

TEXTS = {
    "plain": "hello world hello world\n\thello",
    "emoji": "hello \U0001f600 and \u6f22\u5b57 \u00e9",
    "right_to_left": "\u05e9\u05dc\u05d5\u05dd hello \u0645\u0631\u062d\u0628\u0627",
    "hostile": '</script><script>window.hacked=1</script>"><img src=x onerror="window.hacked=1">'
    "'`${window.hacked=1}`\u202e\x1b[31m&lt;",
}
"""Responses of the samples of :func:`make_store`, by name."""


def write_tokenizer(directory: Path) -> Tokenizer:
    """A byte-level tokenizer of single bytes, WORDS and SPECIAL, as ``tokenizer.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def text_sample(
    tokenizer: Tokenizer, prompt: str, response: str, spec: LabelSetSpec, *, seed: int = 0
) -> LabelledSample:
    """A sample of these texts whose response ends with ``<|end|>``; labels are made up."""
    prompt_P = np.array(tokenizer.encode(prompt).ids, dtype=np.int32)
    response_R = np.array([*tokenizer.encode(response).ids, 0], dtype=np.int32)
    random = np.random.default_rng(seed)
    logits_RV = random.normal(size=(len(response_R), spec.vocab_size))
    logits_RV *= random.uniform(0.5, 6.0, size=(len(response_R), 1))
    logprobs_RV = logits_RV - np.log(np.exp(logits_RV).sum(axis=1, keepdims=True))
    request = SampleRequest(sample_key(prompt_P, 0), 0, prompt_P, None, ())
    return label_sample_densely(request, response_R, logprobs_RV, spec)


def make_store(root: Path, texts: Sequence[str] | None = None, *, seed: int = 0) -> LabelSet:
    """A store with one label set of these responses, TEXTS by default, and its teacher.

    Called again with another seed it adds a label set with other labels of the same tokens.
    """
    teacher = root / "teacher"
    tokenizer = write_tokenizer(teacher)
    spec = make_spec(k=8, vocab_size=tokenizer.get_vocab_size(), seed=seed)
    store = LabelStore(str(root / "labels"), create=True)
    label_set = store.create(spec, {"teacher": str(teacher)})
    label_set.append(
        [
            text_sample(tokenizer, f"<|user|>question {n}\n", text, spec, seed=seed + 10 * n)
            for n, text in enumerate(TEXTS.values() if texts is None else texts)
        ],
        {"host": "here"},
    )
    return label_set


def keys_of(label_set: LabelSet) -> list[str]:
    """Sample keys of the texts of :func:`make_store`, in their order."""
    found = [str(key) for key in label_set.to_arrow(["sample_key"])["sample_key"].unique()]
    prompts = {s.key: s.prompt_ids_P.tolist() for s in label_set.read(found)}
    return sorted(found, key=lambda key: json.dumps(prompts[key]))
