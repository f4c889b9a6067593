"""MTP as its users configure it, against the oracle on one process, and what each option is to do."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from overlap_mtp import SequenceLayout
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.loss import combine
from overlap_mtp.model.reference import loss_reference
from overlap_mtp.reference import roll_reference
from overlap_mtp.training.data import BatchStream, open_corpus
from overlap_mtp.training.trainer import NonFiniteLossError, TrainConfig, Trainer

SMALL = ModelConfig(
    hidden_size=16, num_layers=2, num_depths=2, num_heads=4, num_kv_heads=2, ffn_size=24, vocab_size=31
)
OPTIONS = {
    "experts": {"num_experts": 4},
    "one expert a token": {"num_experts": 3, "experts_per_token": 1},
    "all experts": {"num_experts": 2, "experts_per_token": 2, "aux_loss_factor": 1.0},
    "repeated layer": {"repeat_mtp_layer": True},
    "repeated layer of experts": {"repeat_mtp_layer": True, "num_experts": 4},
    "detached": {"detach_mtp": True},
    "derived labels": {"derive_labels": True},
    "one depth": {"num_depths": 1, "mtp_loss_factor": 0.7},
    "all at once": {
        "num_depths": 3,
        "num_experts": 4,
        "repeat_mtp_layer": True,
        "detach_mtp": True,
        "derive_labels": True,
    },
}
LAYOUTS = {
    "dense": SequenceLayout.dense(32, 1, "contiguous"),
    "packed": SequenceLayout.packed([0, 8, 8, 24, 32], 1, "contiguous", [5, 0, 16, 1]),
}


def batch_of(
    layout: SequenceLayout, config: ModelConfig, rows: int = 2, seed: int = 3
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, layout.seq_len)
    ids = torch.randint(0, config.vocab_size, shape, generator=generator)
    batch = {
        "input_ids": ids,
        "labels": roll_reference(ids, layout, 1),
        "position_ids": torch.from_numpy(layout.offsets(0)).expand(shape).contiguous(),
        "loss_mask": (torch.rand(shape, generator=generator) < 0.8).float(),
    }
    if config.derive_labels:
        del batch["labels"]
    return batch


def model_of(config: ModelConfig) -> GPT:
    torch.manual_seed(0)
    return GPT(config).double()


def loss_of(model: GPT, batch: dict[str, torch.Tensor], layout: SequenceLayout) -> torch.Tensor:
    config = model.config
    factor = config.aux_loss_factor if config.num_experts else None
    return combine(model(batch, layout), model.counts(batch, layout), config.mtp_loss_factor, factor)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("documents", LAYOUTS)
@pytest.mark.parametrize("option", OPTIONS)
def test_loss_and_gradients_equal_the_oracle(option, documents, recompute):
    config, layout = replace(SMALL, **OPTIONS[option]), LAYOUTS[documents]
    batch, model, oracle = batch_of(layout, config), model_of(config), model_of(config)
    model.recompute_layers(recompute)
    loss, expected = loss_of(model, batch, layout), loss_reference(oracle, batch, layout)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for (name, parameter), other in zip(model.named_parameters(), oracle.parameters(), strict=True):
        error = (parameter.grad - other.grad).norm() / other.grad.norm().clamp(min=1e-30)
        assert float(error) < 1e-10, name


def test_recomputing_changes_no_bit():
    config, layout = replace(SMALL, num_experts=4), LAYOUTS["packed"]
    batch, gradients = batch_of(layout, config), []
    for recompute in (False, True):
        model = model_of(config)
        model.recompute_layers(recompute)
        loss_of(model, batch, layout).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_derived_labels_are_the_labels_that_a_loader_would_give():
    layout = LAYOUTS["packed"]
    given, derived = SMALL, replace(SMALL, derive_labels=True)
    batch = batch_of(layout, given)
    has_label = torch.from_numpy(layout.valid(0, 1))
    masked = {
        **batch,
        "loss_mask": batch["loss_mask"] * has_label,
    }  # the fabricated last label counts nowhere
    expected = model_of(given)(masked, layout)
    found = model_of(derived)(batch_of(layout, derived), layout)
    assert torch.equal(found, expected)


def test_labels_are_given_or_derived():
    layout = LAYOUTS["dense"]
    for config, other in (
        (SMALL, replace(SMALL, derive_labels=True)),
        (replace(SMALL, derive_labels=True), SMALL),
    ):
        with pytest.raises(ValueError, match="labels"):
            model_of(config)(batch_of(layout, other), layout)


def test_detached_heads_train_the_mtp_block_alone():
    layout, config = LAYOUTS["packed"], replace(SMALL, detach_mtp=True)
    batch = batch_of(layout, config)
    model = model_of(config)
    model(batch, layout)[1:].sum().backward()
    for name, parameter in model.named_parameters():
        gradient = torch.zeros(()) if parameter.grad is None else parameter.grad
        assert bool(gradient.any()) is name.startswith("mtp."), name


def test_detached_heads_are_clipped_by_themselves():
    layout, config = LAYOUTS["packed"], replace(SMALL, detach_mtp=True, mtp_loss_factor=1e6)
    batch, norms = batch_of(layout, config), {}
    for factor in (1e6, 1.0):
        model = model_of(replace(config, mtp_loss_factor=factor))
        report = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), TrainConfig(steps=1)).step(
            [(batch, layout)]
        )
        norms[factor] = report.grad_norms
        trunk = [p.grad for n, p in model.named_parameters() if not n.startswith("mtp.")]
        assert float(torch.stack([g.norm() for g in trunk]).norm()) == pytest.approx(
            min(1, norms[factor]["trunk"])
        )
    assert norms[1e6]["trunk"] == norms[1.0]["trunk"]
    assert norms[1e6]["mtp"] == pytest.approx(1e6 * norms[1.0]["mtp"])


def test_one_repeated_layer_has_one_layers_parameters():
    single, repeated = (model_of(replace(SMALL, num_depths=d, repeat_mtp_layer=True)) for d in (1, 4))
    assert [p.shape for p in single.parameters()] == [p.shape for p in repeated.parameters()]


def test_accepted_guesses_are_counted():
    """A head that always says 0: what is accepted is how often that is the label, at each depth."""
    layout, config = LAYOUTS["packed"], SMALL
    batch, model = batch_of(layout, config), model_of(config)
    batch["labels"] = torch.where(torch.arange(layout.seq_len) % 3 == 0, 0, batch["labels"])
    with torch.no_grad():
        model.head.weight.zero_()  # all logits are alike: the first is taken
    report = Trainer(model, torch.optim.SGD(model.parameters(), 0.0), TrainConfig(steps=1)).step(
        [(batch, layout)]
    )
    for depth in (0, 1, 2):
        labels, mask = (batch[name] for name in ("labels", "loss_mask"))
        mask = torch.where(torch.from_numpy(layout.valid(0)), mask, 0)
        if depth:
            labels, mask = (roll_reference(one, layout, depth) for one in (labels, mask))
        assert report.right[depth] == float(((labels == 0) * mask).sum()) > 0
        assert report.counted[depth] == float(mask.sum())
    assert report.acceptance == [report.right[1] / report.counted[1], report.right[2] / report.counted[2]]


def test_losses_are_normalised_by_token_or_by_batch():
    """Two microbatches of unequal token counts: a mean over tokens, or the mean of their means."""
    config = replace(SMALL, num_experts=4)
    parts = [(batch_of(layout, config, seed=seed), layout) for seed, layout in enumerate(LAYOUTS.values())]
    alone = []
    for part in parts:
        model = model_of(config)
        alone.append(
            Trainer(model, torch.optim.SGD(model.parameters(), 0.0), TrainConfig(steps=1)).step([part])
        )
    found = {}
    for normalisation in ("token", "batch"):
        model = model_of(config)
        recipe = TrainConfig(steps=1, accumulate=2, normalisation=normalisation)
        found[normalisation] = Trainer(model, torch.optim.SGD(model.parameters(), 0.0), recipe).step(parts)
    assert found["batch"].loss == pytest.approx((alone[0].loss + alone[1].loss) / 2)
    by_token = found["token"]
    weighed = sum(one.lm_loss * one.counted[0] for one in alone) / sum(one.counted[0] for one in alone)
    assert by_token.lm_loss == pytest.approx(weighed)
    assert by_token.aux_loss == pytest.approx(
        sum(one.aux_loss * one.tokens for one in alone) / sum(one.tokens for one in alone)
    )
    assert by_token.loss != pytest.approx(found["batch"].loss)
    # What is logged is sums over tokens, whatever was minimised.
    assert found["batch"].mtp_losses == pytest.approx(by_token.mtp_losses)


def test_documents_in_a_pack_are_as_documents_one_by_one():
    """Same loss, same gradients: nothing of a document is seen by another."""
    layout = LAYOUTS["packed"]
    batch = batch_of(layout, SMALL)
    together = model_of(SMALL)
    expected = together.counts(batch, layout)
    loss = combine(together(batch, layout), expected, SMALL.mtp_loss_factor)
    loss.backward()
    alone, total, counts = model_of(SMALL), 0.0, torch.zeros_like(expected)
    for start, length in zip(layout.cu_seqlens[:-1].tolist(), layout.valid_lengths.tolist(), strict=True):
        if length == 0:
            continue
        one = SequenceLayout.dense(length, 1, "contiguous")
        document = {name: tensor[:, start : start + length].contiguous() for name, tensor in batch.items()}
        counts += alone.counts(document, one)
        part = combine(alone(document, one), expected, SMALL.mtp_loss_factor)
        part.backward()
        total += part.item()
    assert counts.tolist() == expected.tolist()
    assert total == pytest.approx(loss.item(), rel=1e-12)
    for (name, a), b in zip(together.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-14), name


def test_training_on_a_pack_is_training_on_its_documents():
    """Text as a run reads it, one optimizer step: the same losses and gradients, in one microbatch or in five."""
    config = replace(SMALL, vocab_size=256)
    full, layout = BatchStream(open_corpus(), 512, 1, 1, "contiguous", 256, num_documents=5).batch(3)
    pieces = []
    for start, length in zip(layout.cu_seqlens[:-1].tolist(), layout.valid_lengths.tolist(), strict=True):
        piece = {name: tensor[:, start : start + length].contiguous() for name, tensor in full.items()}
        pieces.append((piece, SequenceLayout.dense(length, 1, "contiguous")))
    assert len(pieces) == 5
    found = []
    for microbatches in ([(full, layout)], pieces):
        model = model_of(config)
        recipe = TrainConfig(1, accumulate=len(microbatches))
        report = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), recipe).step(microbatches)
        found.append((report, [p.grad for p in model.parameters()]))
    (together, gradients), (alone, other_gradients) = found
    for name, value in asdict(together).items():
        assert value is None or asdict(alone)[name] == pytest.approx(value, rel=1e-12), name
    for a, b in zip(gradients, other_gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_a_gradient_that_is_not_finite_changes_no_weight():
    """Of a loss that is finite."""
    layout, model = LAYOUTS["dense"], model_of(SMALL)
    before = [p.detach().clone() for p in model.parameters()]
    model.embedding.weight.register_hook(lambda gradient: gradient * float("nan"))
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), TrainConfig(steps=1))
    with pytest.raises(NonFiniteLossError, match="step 7: the norm of the model's gradients is nan"):
        trainer.step([(batch_of(layout, SMALL), layout)], where="step 7")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_step_takes_as_many_microbatches_as_its_recipe_says():
    model, layout = model_of(SMALL), LAYOUTS["dense"]
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), TrainConfig(steps=1, accumulate=2))
    with pytest.raises(ValueError, match="accumulate = 2 microbatches, got 1"):
        trainer.step([(batch_of(layout, SMALL), layout)])


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where():
    layout, model = LAYOUTS["dense"], model_of(SMALL)
    good = batch_of(layout, SMALL)
    bad = {**good, "loss_mask": good["loss_mask"].clone()}
    bad["loss_mask"][0, 5] = float("inf")
    before = [p.detach().clone() for p in model.parameters()]
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), TrainConfig(steps=1, accumulate=2))
    with pytest.raises(
        NonFiniteLossError, match=r"step 3: the LM loss of batch 5 \(microbatch 1 of dp rank 0\) is (nan|inf)"
    ):
        trainer.step([(good, layout), (bad, layout)], where="step 3", first_batch=4)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": -1}, "num_experts must be >= 0"),
        ({"num_experts": 2, "experts_per_token": 3}, r"experts_per_token must be in \[1, num_experts = 2\]"),
        ({"num_experts": 2, "experts_per_token": 0}, "experts_per_token"),
        ({"mtp_loss_factor": float("nan")}, "mtp_loss_factor must be finite and >= 0, got nan"),
        ({"aux_loss_factor": -1.0}, "aux_loss_factor must be finite and >= 0"),
        ({"rope_theta": 0.0}, "rope_theta must be finite and > 0"),
    ],
)
def test_illegal_configurations_say_what_disagrees(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)


def test_the_learning_rate_warms_up_and_follows_half_a_cosine():
    recipe = TrainConfig(steps=100, warmup_steps=10, final_fraction=0.1)
    rates = [recipe.schedule(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
