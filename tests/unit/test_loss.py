"""What does not count has no influence on losses, gradients and counts. What counts and is wrong is an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_options import SMALL, batch_of, model_of

from overlap_mtp import MultiTokenPrediction, SequenceLayout, prepare, roll_reference
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.loss import accepted_sum, count_tokens, masked_loss_sum, token_mask
from overlap_mtp.model.moe import MoE
from overlap_mtp.model.reference import loss_reference

from cases import assert_names, error_of
from strategies import layouts

V = 8
BAD_LOGITS = [
    float("nan"),
    float("inf"),
    float("-inf"),
    [float("inf"), float("-inf"), float("nan"), 1e38] * 2,
]
BAD_LABELS = [-1, V, V + 5, -100, 2**40, -(2**40)]


def loss_and_gradient(logits, labels, mask, **options):
    logits = logits.clone().requires_grad_()
    loss = masked_loss_sum(logits, labels, mask, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", BAD_LOGITS)
def test_logits_and_labels_that_do_not_count_have_no_influence(dtype, bad):
    """Excluded by the mask, or by the label."""
    logits = torch.randn(2, 6, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.arange(12).view(2, 6) % V
    mask = torch.tensor([[1.0, 0.5, 0, 1, 0, 1], [1, 1, 0, 0, 1, 1]])
    ignored = labels == 5
    excluded = (mask == 0) | ignored
    precise = logits.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    expected = (
        F.cross_entropy(precise[~excluded], labels[~excluded], reduction="none") * mask[~excluded]
    ).sum()
    expected.backward()
    bad_logits = torch.where(excluded[..., None], torch.tensor(bad), logits.double()).to(dtype)
    some = torch.tensor(BAD_LABELS)
    bad_labels = torch.where(mask == 0, some[torch.arange(12).view(2, 6) % len(some)], labels)
    bad_mask = torch.where(ignored, torch.tensor([float("nan"), float("inf")] * 3), mask)
    loss, gradient = loss_and_gradient(bad_logits, bad_labels.where(~ignored, -7), bad_mask, ignore_index=-7)
    assert loss.dtype == precise.dtype
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, precise.grad.to(dtype))
    assert not gradient[excluded].any()


def test_what_counts_is_not_hidden():
    logits, labels = torch.randn(1, 3, V), torch.tensor([[1, 2, 3]])
    logits[0, 1, 4] = float("nan")
    assert masked_loss_sum(logits, labels, torch.ones(1, 3)).isnan()
    assert masked_loss_sum(logits, labels, torch.tensor([[1.0, 0, 1]])).isfinite()


@pytest.mark.parametrize("label", BAD_LABELS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_label_that_counts_is_in_the_vocabulary(label, dtype):
    if abs(label) > 2**31:
        dtype = torch.int64
    labels = torch.tensor([[3, label]], dtype=dtype)
    logits, ignore_index = torch.zeros(1, 2, V), -2
    message = error_of(masked_loss_sum, logits, labels, torch.ones(1, 2), ignore_index)
    assert_names(message, str(label), str(V), "mask", "ignore_index")
    for mask, ignored in ((torch.tensor([[1, 0]]), ignore_index), (torch.ones(1, 2).bool(), label)):
        assert masked_loss_sum(logits, labels, mask, ignored).item() == pytest.approx(torch.tensor(V).log())


def test_unsigned_labels_may_be_ignored_by_the_mask():
    loss = masked_loss_sum(
        torch.zeros(1, 2, V), torch.tensor([[3, 255]], dtype=torch.uint8), torch.tensor([[1, 0]])
    )
    assert loss.item() == pytest.approx(torch.tensor(V).log())


@settings(max_examples=60)
@given(
    layout=layouts(),
    ignore_index=st.sampled_from([-100, -1, 0, 3]),
    mask=st.sampled_from(["none", "float", "bool"]),
    seed=st.integers(0, 99),
)
def test_sums_of_masks_counts_and_acceptance_agree_at_every_depth(layout, ignore_index, mask, seed):
    """A head that drafts every label is accepted as often as labels count."""
    generator, shape, depths = torch.Generator().manual_seed(seed), (2, layout.seq_len), 3
    labels = torch.randint(0, V, shape, generator=generator)
    labels = labels.where(torch.rand(shape, generator=generator) < 0.6, ignore_index)
    full = {"input_ids": labels.flip(0), "labels": labels}
    if mask != "none":
        some = torch.rand(shape, generator=generator) < 0.7
        full["loss_mask"] = some if mask == "bool" else some * 0.5
    rolled = prepare(full, layout, depths, ignore_index)
    counts = torch.zeros(1 + depths, dtype=torch.float64)
    masks, accepted = torch.zeros_like(counts), torch.zeros_like(counts)
    for rank in range(layout.cp_size):
        shard = {name: layout.shard(t, rank) for name, t in rolled.items()}
        counts += count_tokens(shard, layout, rank, depths, ignore_index=ignore_index)
        for depth in range(1 + depths):
            suffix = f"_depth{depth}" if depth else ""
            own = shard["labels" + suffix]
            given_mask = shard.get("loss_mask" + suffix)
            weight = token_mask(given_mask, layout, rank, depth, own)
            assert weight.dtype == (torch.bool if given_mask is None else given_mask.dtype)
            masks[depth] += (weight * (own != ignore_index)).sum()
            drafts = F.one_hot(own.clamp(0, V - 1), V).float()
            accepted[depth] += accepted_sum(drafts, own, weight, ignore_index)
    assert counts.tolist() == masks.tolist() == accepted.tolist()
    valid = torch.from_numpy(layout.unshard([layout.valid(rank) for rank in range(layout.cp_size)]))
    weight = full.get("loss_mask", torch.ones(shape)).double() * valid * (labels != ignore_index)
    assert counts.tolist() == [
        float((roll_reference(weight, layout, k) if k else weight).sum()) for k in range(1 + depths)
    ]


def test_an_ignored_label_is_never_accepted():
    """Even if it is a token, and with a mask that counts it."""
    logits, labels = F.one_hot(torch.tensor([[0, 1, 2]]), V).float(), torch.tensor([[0, 1, 1]])
    assert accepted_sum(logits, labels, torch.ones(1, 3)) == 2
    assert accepted_sum(logits, labels, torch.ones(1, 3), ignore_index=0) == 1


@pytest.mark.parametrize("documents", ["dense", "packed"])
@pytest.mark.parametrize("options", [{}, {"ignore_index": -1}, {"ignore_index": 2}])
def test_a_model_ignores_labels_in_sums_and_counts(documents, options):
    config = replace(SMALL, **options)
    layout = SequenceLayout.dense(16, 1, "contiguous")
    if documents == "packed":
        layout = SequenceLayout.packed([0, 5, 5, 14, 16], 1, "contiguous", [3, 0, 9, 1])
    batch = batch_of(layout, config)
    del batch["loss_mask"]
    batch["labels"][:, ::3] = config.ignore_index
    batch["labels"][:, layout.valid(0) == 0] = 10**6  # at padding
    model = model_of(config)
    sums, counts = model(batch, layout), model.counts(batch, layout)
    means = sums / counts
    loss = means[0] + config.mtp_loss_factor * means[1:].mean()
    assert loss.item() == pytest.approx(loss_reference(model, batch, layout).item(), rel=1e-12)
    assert 0 < counts[0] < batch["labels"].numel() * 2 / 3


def test_derived_labels_are_ignored_past_the_end():
    ids = torch.tensor([[4, 5, 6, 9, 7, 8]], dtype=torch.uint8)
    layout = SequenceLayout.packed([0, 4, 6], 1, "contiguous", [3, 2])
    for ignore_index in (-100, -1):
        block = MultiTokenPrediction(
            4, 1, lambda depth: torch.nn.Identity(), derive_labels=True, ignore_index=ignore_index
        )
        rolls, gone = block.start({"input_ids": ids}, layout), ignore_index
        (prediction,) = block(torch.zeros(1, 6, 4), rolls, lambda ids: torch.zeros(*ids.shape, 4))
        assert rolls.at(0)["labels"].tolist() == [[5, 6, gone, gone, 8, gone]]
        assert prediction.tokens["labels"].tolist() == [[6, gone, gone, gone, gone, gone]]
        assert prediction.tokens["input_ids"].tolist() == [[5, 6, 0, 0, 8, 0]]
    for make in (
        lambda **o: MultiTokenPrediction(4, 1, torch.nn.Identity, **o),
        lambda **o: replace(SMALL, **o),
    ):
        with pytest.raises(ValueError, match=r"ignore_index must be < 0 if labels are derived.*got 0"):
            make(derive_labels=True, ignore_index=0)


@pytest.mark.parametrize("repeat", [False, True])
def test_experts_of_a_depth_count_the_tokens_of_that_depth(repeat):
    """The embedding of token 0, which fills the ids past the end, gets no gradient of the load-balancing loss."""
    config = replace(SMALL, num_experts=4, num_depths=3, repeat_mtp_layer=repeat)
    layout = SequenceLayout.packed([0, 4, 8, 10, 16], 1, "contiguous", [4, 3, 2, 6])
    batch, model, seen = batch_of(layout, config), model_of(config), []
    batch["input_ids"] = batch["input_ids"].clamp(min=1)
    for module in model.modules():
        if isinstance(module, MoE):
            module.register_forward_pre_hook(lambda m, x: seen.append((x[0] @ m.router.T).softmax(-1)))
    assert isinstance(model, GPT)
    sums, counts = model(batch, layout), model.counts(batch, layout)
    expected = 0.0
    for number, probabilities in enumerate(seen):
        depth = max(0, number + 1 - config.num_layers)
        kept = probabilities[:, torch.from_numpy(layout.valid(0, depth))].flatten(0, 1)
        chosen = F.one_hot(kept.topk(config.experts_per_token).indices, 4).sum(1).double()
        expected += 4 * (chosen.sum(0) / chosen.sum() * kept.mean(0)).sum().item() / len(seen)
    assert len(seen) == config.num_layers + 3
    assert (sums[-1] / counts[-1]).item() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(sums[-1], model.embedding.weight)
    assert not gradient[0].any()
    assert gradient[1:].any()


def test_experts_of_a_depth_without_tokens_add_nothing():
    config = replace(SMALL, num_experts=4)
    layout = SequenceLayout.packed([0, 1, 3], 1, "contiguous", [1, 2])  # no token is two ahead of another
    batch, model = batch_of(layout, config), model_of(config)
    batch["loss_mask"][:] = 0
    sums, counts = model(batch, layout), model.counts(batch, layout)
    aux = config.aux_loss_factor * sums[-1] / counts[-1]
    assert aux.item() == pytest.approx(loss_reference(model, batch, layout).item(), rel=1e-12)
