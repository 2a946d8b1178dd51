"""Model FLOPs against a count by hand, and against torch's own counter."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from student_train.models.flops import ModelFlops, model_flops


def lengths(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


def test_a_dense_model_takes_six_operations_per_weight_and_token() -> None:
    sizes = ModelFlops(
        weights=100,
        trained_weights=100,
        head_weights=30,
        head_is_trained=True,
        attention_width=0,
        windows=(),
    )
    assert sizes.of_step(lengths(7, 3), 4) == 6 * 100 * 10 + 6 * 30 * 4


def test_frozen_weights_save_their_own_gradient() -> None:
    sizes = ModelFlops(
        weights=100,
        trained_weights=10,
        head_weights=30,
        head_is_trained=False,
        attention_width=0,
        windows=(),
    )
    assert sizes.of_step(lengths(10), 4) == (4 * 100 + 2 * 10) * 10 + 4 * 30 * 4


def test_attention_grows_with_the_squares_of_documents_up_to_a_window() -> None:
    sizes = ModelFlops(
        weights=0,
        trained_weights=0,
        head_weights=0,
        head_is_trained=True,
        attention_width=8,
        windows=(None, 4),
    )
    full = 6 * 8 * (10**2 + 3**2)
    windowed = 6 * 8 * ((2 * 10 * 4 - 4**2) + 3**2)
    assert sizes.of_step(lengths(10, 3), 0) == full + windowed


def llama(*, tied: bool) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_the_count_is_that_of_torch(tied: bool) -> None:
    """torch counts attention in full, not its causal half."""
    model = llama(tied=tied)
    ids = torch.arange(12).unsqueeze(0)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    sizes = model_flops(model)
    found = sizes.of_step(lengths(12), 12)
    attention = 2 * 6 * sizes.attention_width * 12**2
    # the input of the first layer has a gradient too: it is that of the embedding
    assert counter.get_total_flops() == pytest.approx(found + attention, rel=0.02)


def test_tied_and_untied_embeddings_count_alike() -> None:
    assert model_flops(llama(tied=True)) == model_flops(llama(tied=False))


def test_position_embeddings_are_looked_up() -> None:
    config = GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=4, n_positions=1000)
    sizes = model_flops(AutoModelForCausalLM.from_config(config))
    assert sizes.weights == 2 * 12 * 16**2
    assert sizes.head_weights == 96 * 16
    assert sizes.attention_width == 16


def test_of_experts_the_chosen_ones_count() -> None:
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    sizes = model_flops(AutoModelForCausalLM.from_config(config))
    attention, router, expert = 4 * 16 * 16, 4 * 16, 3 * 16 * 24
    assert sizes.weights == attention + router + 2 * expert
