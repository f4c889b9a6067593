"""The model's options, each against the reference on one process, and what one training step does with them."""

from __future__ import annotations

import math
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
from overlap_mtp.training.trainer import Microbatch, NonFiniteLossError, StepReport, TrainConfig, Trainer

SMALL = ModelConfig(
    hidden_size=16, num_layers=2, num_depths=2, num_heads=4, num_kv_heads=2, ffn_size=24, vocab_size=31
)
EXPERTS = {"num_experts": 4}
ALL_FLAGS = {"repeat_mtp_layer": True, "detach_mtp": True, "derive_labels": True}
ACTIVATIONS = {"mtp_inputs": "embeddings", "hidden_state_mixing": True, "distillation": "kl"}
OPTIONS = {
    "experts": EXPERTS,
    "one expert a token": {"num_experts": 3, "experts_per_token": 1},
    "all experts": {"num_experts": 2, "experts_per_token": 2, "aux_loss_factor": 1.0},
    "repeated layer": {"repeat_mtp_layer": True},
    "repeated layer of experts": {"repeat_mtp_layer": True, **EXPERTS},
    "detached": {"detach_mtp": True},
    "derived labels": {"derive_labels": True},
    "one depth": {"num_depths": 1, "mtp_loss_factor": 0.7},
    "embeddings": {"mtp_inputs": "embeddings"},
    "detached embeddings": {"mtp_inputs": "embeddings", "detach_mtp": True},
    "mixed hidden states": {"num_depths": 4, "hidden_state_mixing": True},
    "total variation": {"distillation": "tv", "distillation_weight": 2.0},
    "a divergence": {"distillation": "kl", "distillation_detach": False},
    "all uses of activations": {"num_depths": 3, **ACTIVATIONS},
    "all at once": {"num_depths": 3, **EXPERTS, **ALL_FLAGS, **ACTIVATIONS},
}
LAYOUTS = {
    "dense": SequenceLayout.dense(16, 1, "contiguous"),
    "packed": SequenceLayout.packed([0, 5, 5, 14, 16], 1, "contiguous", [3, 0, 9, 1]),
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


def train(
    model: GPT, microbatches: list[Microbatch], normalisation: str = "token", **where: object
) -> StepReport:
    """One step, which changes the weights of a model that is used no more."""
    config = TrainConfig(steps=1, normalisation=normalisation)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Trainer(model, optimizer, config).step(microbatches, **where)


def gradients_of(model: GPT) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("documents", LAYOUTS)
@pytest.mark.parametrize("option", OPTIONS)
def test_loss_and_gradients_equal_the_reference(option, documents):
    """Recomputed, they are the same bits."""
    config, layout = replace(SMALL, **OPTIONS[option]), LAYOUTS[documents]
    batch, factor = batch_of(layout, config), config.aux_loss_factor if config.num_experts else None
    single = model_of(config)
    expected = loss_reference(single, batch, layout)
    expected.backward()
    found = []
    for recompute in (False, True):
        model = model_of(config)
        model.recompute_layers(recompute)
        sums, counts = model(batch, layout), model.counts(batch, layout)
        loss = combine(sums, counts, config.mtp_loss_factor, factor)
        loss.backward()
        found.append([loss.detach(), *gradients_of(model)])
    (loss, *gradients), again = found
    assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for (name, parameter), gradient in zip(single.named_parameters(), gradients, strict=True):
        error = (gradient - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-30)
        assert float(error) < 1e-10, name


def test_derived_labels_are_the_labels_that_a_loader_would_give():
    layout, derived = LAYOUTS["packed"], replace(SMALL, derive_labels=True)
    given = batch_of(layout, SMALL)
    given["loss_mask"] = given["loss_mask"] * torch.from_numpy(
        layout.valid(0, 1)
    )  # a last token has no label
    found = model_of(derived)(batch_of(layout, derived), layout)
    assert torch.equal(found, model_of(SMALL)(given, layout))


@pytest.mark.parametrize(("derive", "words"), [(True, "has labels although"), (False, "has no labels and")])
def test_labels_are_given_or_derived(derive, words):
    layout, config = LAYOUTS["dense"], replace(SMALL, derive_labels=derive)
    with pytest.raises(ValueError, match=words):
        model_of(config)(batch_of(layout, replace(SMALL, derive_labels=not derive)), layout)


def test_detached_heads_train_the_mtp_block_alone():
    layout, config = LAYOUTS["packed"], replace(SMALL, detach_mtp=True)
    model = model_of(config)
    model(batch_of(layout, config), layout)[1:].sum().backward()
    for name, parameter in model.named_parameters():
        gradient = torch.zeros(()) if parameter.grad is None else parameter.grad
        assert bool(gradient.any()) is name.startswith("mtp."), name


def test_detached_heads_are_clipped_by_themselves():
    layout, norms = LAYOUTS["packed"], {}
    for factor in (1e6, 1.0):
        model = model_of(replace(SMALL, detach_mtp=True, mtp_loss_factor=factor))
        norms[factor] = train(model, [(batch_of(layout, SMALL), layout)]).grad_norms
        trunk = [p.grad.norm() for n, p in model.named_parameters() if not n.startswith("mtp.")]
        assert float(torch.stack(trunk).norm()) == pytest.approx(min(1, norms[factor]["trunk"]))
    assert norms[1e6]["trunk"] == norms[1.0]["trunk"]
    assert norms[1e6]["mtp"] == pytest.approx(1e6 * norms[1.0]["mtp"])


def test_one_repeated_layer_has_one_layers_parameters():
    single, repeated = (model_of(replace(SMALL, num_depths=d, repeat_mtp_layer=True)) for d in (1, 4))
    assert [p.shape for p in single.parameters()] == [p.shape for p in repeated.parameters()]


def test_accepted_drafts_are_counted():
    """A head that always drafts token 0 is accepted as often as 0 is the label, at each depth."""
    layout, model = LAYOUTS["packed"], model_of(SMALL)
    batch = batch_of(layout, SMALL)
    batch["labels"] = torch.where(torch.arange(layout.seq_len) % 2 == 0, 0, batch["labels"])
    with torch.no_grad():
        model.head.weight.zero_()  # all logits are equal: argmax takes the first
    report = train(model, [(batch, layout)])
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
    config = replace(SMALL, **EXPERTS)
    parts = [(batch_of(layout, config, seed=seed), layout) for seed, layout in enumerate(LAYOUTS.values())]
    first, second = alone = [train(model_of(config), [part]) for part in parts]
    by_token, by_batch = (
        train(model_of(config), parts, normalisation) for normalisation in ("token", "batch")
    )
    assert by_batch.loss == pytest.approx((first.loss + second.loss) / 2)
    lm_loss = sum(one.lm_loss * one.counted[0] for one in alone) / sum(one.counted[0] for one in alone)
    assert by_token.lm_loss == pytest.approx(lm_loss)
    aux_loss = sum(one.aux_loss * one.tokens for one in alone) / sum(one.tokens for one in alone)
    assert by_token.aux_loss == pytest.approx(aux_loss)
    assert by_token.loss != pytest.approx(by_batch.loss)
    assert by_batch.mtp_losses == pytest.approx(by_token.mtp_losses)  # the log has means over tokens in both


def test_training_on_a_pack_is_training_on_its_documents():
    """Real text gives the same losses and gradients in one packed microbatch or in five of one document."""
    config = replace(SMALL, vocab_size=256)
    full, layout = BatchStream(open_corpus(), 512, 1, 1, "contiguous", 256, num_documents=5).batch(3)
    pieces = []
    for start, length in zip(layout.cu_seqlens[:-1].tolist(), layout.valid_lengths.tolist(), strict=True):
        piece = {name: tensor[:, start : start + length].contiguous() for name, tensor in full.items()}
        pieces.append((piece, SequenceLayout.dense(length, 1, "contiguous")))
    assert len(pieces) == 5
    together, alone = model_of(config), model_of(config)
    expected, found = train(together, [(full, layout)]), train(alone, pieces)
    for name, value in asdict(expected).items():
        assert value is None or asdict(found)[name] == pytest.approx(value, rel=1e-12), name
    for a, b in zip(gradients_of(together), gradients_of(alone), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda model, _: model.embedding.weight.register_hook(lambda g: g * math.nan),
            "step 3: the norm of the model's gradients is nan",
        ),
        (
            lambda _, batch: batch["loss_mask"][0, 5].fill_(math.inf),
            r"step 3: the LM loss of batch 5 \(microbatch 1 of dp rank 0\) is (nan|inf)",
        ),
    ],
)
def test_what_is_not_finite_stops_the_run_and_changes_no_weight(spoil, words):
    layout, model = LAYOUTS["dense"], model_of(SMALL)
    good, bad = batch_of(layout, SMALL), batch_of(layout, SMALL)
    before = [p.detach().clone() for p in model.parameters()]
    spoil(model, bad)
    with pytest.raises(NonFiniteLossError, match=f"{words}.*; the weights are those of the step before"):
        train(model, [(good, layout), (bad, layout)], where="step 3", first_batch=4)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_steps_take_as_many_microbatches_as_there_are():
    """Documents packed until they fill a sequence: the losses of a step are divided by its tokens, however many."""
    batches = [
        [batch_of(LAYOUTS[name], SMALL, seed=seed) for seed in range(4)] for name in ("packed", "dense")
    ]
    trained = []
    for merged in (False, True):  # all rows of one layout in one microbatch, or one microbatch for each row
        model = model_of(SMALL)
        trainer, reports = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), TrainConfig(steps=3)), []
        for numbers in ([(0, 0), (0, 1), (1, 0)], [(1, 1)], [(0, 2), (0, 3)]):
            step = [(batches[at][number], LAYOUTS[("packed", "dense")[at]]) for at, number in numbers]
            if merged:
                kinds = dict.fromkeys(layout for _, layout in step)
                rows = {kind: [one for one, layout in step if layout is kind] for kind in kinds}
                step = [
                    ({n: torch.cat([one[n] for one in some]) for n in some[0]}, kind)
                    for kind, some in rows.items()
                ]
            reports.append(trainer.step(step))
        trained.append((reports, list(model.parameters())))
    (found, weights), (expected, others) = trained
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert (one.loss, one.lm_loss) == pytest.approx((other.loss, other.lm_loss), rel=1e-12)
    assert len({one.tokens for one in found}) == 3
    for one, other in zip(weights, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"a step takes at least 1 microbatch, .*, got 0 to 0"):
        trainer.step([])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": math.inf}, r"learning_rate must be in \(0, 1\], got inf"),
        ({"learning_rate": 1e30}, r"learning_rate must be in \(0, 1\], got 1e\+30"),
        ({"learning_rate": math.nan}, "learning_rate must be in"),
        ({"learning_rate": 0.0}, "learning_rate must be in"),
        ({"learning_rate": -1e-3}, "learning_rate must be in"),
        ({"clip_norm": math.inf}, "clip_norm must be finite and > 0, got inf"),
        ({"clip_norm": math.nan}, "clip_norm must be finite"),
        ({"clip_norm": 0.0}, "clip_norm must be finite and > 0, got 0"),
        ({"final_fraction": math.nan}, "final_fraction must be in"),
    ],
)
def test_settings_that_would_ruin_a_run_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(steps=1, **change)


def test_the_error_of_a_ruined_model_does_not_vouch_for_its_weights():
    layout, model = LAYOUTS["dense"], model_of(SMALL)
    model.head.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteLossError, match="an earlier step has left weights that are not finite"):
        train(model, [(batch_of(layout, SMALL), layout)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": -1}, "num_experts must be >= 0"),
        ({"num_experts": 2, "experts_per_token": 3}, r"experts_per_token must be in \[1, num_experts = 2\]"),
        ({"num_experts": 2, "experts_per_token": 0}, "experts_per_token"),
        ({"mtp_loss_factor": float("nan")}, "mtp_loss_factor must be finite and >= 0, got nan"),
        ({"aux_loss_factor": -1.0}, "aux_loss_factor must be finite and >= 0"),
        ({"rope_theta": 0.0}, "rope_theta must be finite and > 0"),
        ({"mtp_inputs": "pixels"}, "mtp_inputs must be one of ids, embeddings, got 'pixels'"),
        ({"distillation": "mse"}, "distillation must be one of none, tv, kl, got 'mse'"),
        (
            {"distillation": "kl", "distillation_weight": 0.0},
            "distillation_weight must be finite and > 0, got 0",
        ),
        ({"distillation": "kl", "distillation_weight": math.inf}, "distillation_weight must be finite"),
        (
            {"distillation": "tv", "detach_mtp": True, "distillation_detach": False},
            "distillation_detach must be set if detach_mtp is",
        ),
        ({"hidden_state_mixing": True, "num_depths": 1}, "hidden_state_mixing needs num_depths >= 2, got 1"),
    ],
)
def test_illegal_configurations_say_what_disagrees(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)


def test_the_learning_rate_warms_up_and_follows_half_a_cosine():
    config = TrainConfig(steps=100, warmup_steps=10, final_fraction=0.1)
    rates = [config.schedule(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
