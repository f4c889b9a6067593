"""The random choices of mixed hidden states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_options import LAYOUTS, SMALL, batch_of, model_of

from overlap_mtp import MultiTokenPrediction, SequenceLayout
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.mixing import MixingChoice, hash_word, mixing_keys
from overlap_mtp.training.trainer import TrainConfig, Trainer

from strategies import KINDS

KEYS = torch.tensor([3, -5, 2**63 - 1])
CPU = torch.device("cpu")


def full_choice(
    depth: int,
    keys: torch.Tensor = KEYS,
    seq_len: int = 4096,
    cp_size: int = 1,
    kind: str = "zigzag",
    tp: int = 1,
) -> torch.Tensor:
    """The choices of all ranks together, [B, S]."""
    layout = SequenceLayout.dense(seq_len, cp_size, kind)
    shards = [
        torch.cat([MixingChoice(keys, layout, rank, (part, tp)).at(depth) for part in range(tp)], 1)
        for rank in range(cp_size)
    ]
    return layout.unshard(shards)


def test_the_hash_is_splitmix64():
    """Its first two values for seed 0, as published with the generator."""
    zero, gamma = torch.tensor(0), 0x9E3779B97F4A7C15 - 2**64
    assert int(hash_word(zero, 0)) % 2**64 == 0xE220A8397B1DCDAF
    assert int(hash_word(zero, gamma)) % 2**64 == 0x6E789E6AA1B965F4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cp_size", "tp"), [(2, 1), (4, 1), (1, 4), (4, 2)])
def test_the_choice_is_the_same_on_any_number_of_ranks(cp_size, tp, kind):
    for depth in (2, 3):
        expected = full_choice(depth, seq_len=64)
        assert torch.equal(full_choice(depth, KEYS, 64, cp_size, kind, tp), expected)


def test_the_choice_depends_on_key_position_and_depth():
    """Two choices that do not depend on each other agree at 1 position in 3."""
    choice = full_choice(3)
    for other in (full_choice(3, KEYS + 1), choice.roll(1, 1), choice.roll(1, 0), full_choice(6) % 3):
        assert float((choice == other).double().mean()) == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_the_choice_is_uniform(depth):
    choice = full_choice(depth)
    for state in range(depth):
        assert float((choice == state).double().mean()) == pytest.approx(1 / depth, abs=0.02)
    assert int(choice.max()) < depth


def test_keys_depend_on_seed_step_batch_and_row():
    settings = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63 - 1, 0, 0), (1, 1, 0)]
    keys = torch.cat([mixing_keys(*one, 4, CPU) for one in settings])
    assert keys.dtype == torch.int64
    assert len(keys.unique()) == 4 * len(settings)
    assert torch.equal(mixing_keys(0, 1, 0, 2, CPU), keys[8:10])


def test_choices_change_with_the_step_and_the_seed_of_a_run():
    config, layout = replace(SMALL, hidden_state_mixing=True), LAYOUTS["dense"]
    batch, found = batch_of(layout, config), []
    for seed in (0, 0, 1):
        model = model_of(config)
        optimizer = torch.optim.SGD(model.parameters(), 1e-30)  # the weights stay as they are
        trainer = Trainer(model, optimizer, TrainConfig(2, learning_rate=1e-30), seed=seed)
        found.append([trainer.step([(batch, layout)]).mtp_losses for _ in range(2)])
    assert found[0] == found[1]
    steps = [*found[0], *found[2]]
    assert len({losses[0] for losses in steps}) == 1  # depth 1 has no choice
    assert len({losses[1] for losses in steps}) == 4


def test_a_block_of_another_model_needs_the_layout_and_keys():
    ids, layout = torch.arange(1, 7)[None], SequenceLayout.dense(6, 1, "contiguous")
    embedding = torch.nn.Embedding(11, 8)
    mtp = MultiTokenPrediction(8, 3, lambda depth: torch.nn.Linear(8, 8), mix_hidden_states=True)
    rolls, embeddings = mtp.start({"input_ids": ids}, layout), embedding(ids)
    ahead = mtp.start_embeddings(embeddings, layout)
    with pytest.raises(ValueError, match="mix_hidden_states needs the layout of the batch and mixing_keys"):
        mtp(embeddings, rolls, ahead)
    predictions = mtp(embeddings, rolls, ahead, layout=layout, mixing_keys=torch.zeros(1, dtype=torch.int64))
    predictions[2].hidden.sum().backward()
    assert all(p.grad is not None for p in mtp.depths[2].parameters())
    mtp.close()
    with pytest.raises(RuntimeError, match="closed"):
        mtp.start_embeddings(embeddings, layout)


def test_an_unknown_schedule_of_activations_is_refused():
    with pytest.raises(
        ValueError, match="activation_schedule must be one of sync, merged, overlap, got 'soon'"
    ):
        GPT(SMALL, activation_schedule="soon")
