"""Loss and gradients under tensor, context and data parallelism."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import parity
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from overlap_mtp import SequenceLayout, prepare
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.training.parallel import ParallelDims, ParallelMesh, parallelize
from overlap_mtp.training.trainer import NonFiniteLossError, StepReport, TrainConfig, Trainer

from rank_pool import RankPool, run_on_forks

CONFIG = ModelConfig(
    hidden_size=32, num_layers=1, num_depths=2, num_heads=4, num_kv_heads=2, ffn_size=48, vocab_size=64
)
# The whole matrix takes 2 cores 6 minutes (experiments/parity.py). These are all of the merge request's (tp, cp),
# packed with recompute, and dense without it (a test below shows that recomputing changes no bit). Data parallelism and
# experts are added on packed documents, with up to four ranks, and in one case each with eight.
CASES = [
    case
    for case in parity.matrix("float64")
    if case.activations == "none"
    and case.recompute == (case.documents == "packed")
    and (
        (case.dp == 1 and not case.num_experts)
        or (case.recompute and (case.ranks <= 4 or (case.tp, case.cp) in ((2, 2), (2, 4))))
    )
]
CASES += [parity.Case(2, 2, 1, "packed", True, "float32", num_experts) for num_experts in (0, 4)]
# test_activation_uses.py has more of these, on one backward pass instead of a step.
CASES += [
    case
    for case in parity.matrix("float64")
    if case.activations != "none"
    and (case.tp, case.cp, case.documents, case.recompute) == (2, 2, "packed", True)
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[parity.Case, dict]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parity, "run_on_ranks", run_on_forks)
        found = parity.measure(CASES, "cpu", tmp_path_factory.mktemp("parity"))["rows"]
    return dict(zip(sorted(CASES, key=lambda case: case.ranks), found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, asdict(case).values())))
def test_loss_and_every_gradient_equal_one_process(rows, case):
    row, tolerance = rows[case], {"float64": 1e-10, "float32": 1e-5}[case.dtype]
    assert row.items() >= asdict(case).items()
    assert row["loss_error"] <= tolerance, row
    assert row["gradient_error"] <= tolerance, row
    assert case.dtype == "float64" or row["gradient_error"] > 1e-9  # it was computed in float32


def refusals(world: dist.ProcessGroup) -> list[str]:
    """Return what a mesh, a model and a step say of dimensions that nobody checked, and of compiling with tp."""
    parallel = parity.mesh_of(ParallelDims(1, 2, 4), "cpu")
    wrong = GPT(replace(parity.CONFIG, num_kv_heads=2), parallel.cp_group)
    model = parallelize(GPT(parity.CONFIG, parallel.cp_group), parallel)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), TrainConfig(1), parallel)
    found = []
    for function, *arguments in (
        (ParallelMesh.make, ParallelDims(1, 2, 2), "cpu"),
        (parallelize, wrong, parallel),
        (trainer.step, [({}, SequenceLayout.dense(20, 2))]),
        (trainer.step, [({}, SequenceLayout.dense(64, 4))]),
        (model.compile_layers,),
    ):
        with pytest.raises(ValueError, match=r"tp|cp") as refused:
            function(*arguments)
        found.append(str(refused.value))
    model.mtp.roller.close()
    return found


def test_the_library_names_what_disagrees_without_being_asked(eight: RankPool):
    for *found, last in eight.run(refusals, 8):
        assert found == [
            "dp * cp * tp must be the number of ranks: 1 * 2 * 2 = 4, got 8 ranks",
            "num_kv_heads must be a multiple of tp = 4, got 2",
            "seq_len / cp must be a multiple of tp = 4, got 10",
            "the layout's cp_size must be the mesh's cp = 2, got 4",
        ]
        assert last.startswith("compiled layers and tp > 1 do not go together")


def mesh_timeouts(world: dist.ProcessGroup) -> set[object]:
    parallel = ParallelMesh.make(ParallelDims(2, 2, 2), "cpu", timedelta(seconds=77))
    return {group._get_backend(torch.device("cpu")).options._timeout for group in parallel.groups}


def test_a_mesh_waits_as_long_as_it_is_told(eight: RankPool):
    assert eight.run(mesh_timeouts, 8) == [{timedelta(seconds=77)}] * 8


@dataclass(frozen=True)
class Setting:
    """The options of `step`."""

    config: ModelConfig
    normalisation: str = "token"
    schedule: str = "prefetch"
    recompute: bool = False
    bfloat16: bool = False
    weight: float = 1.0  # of each token that counts
    tail: int = 0  # tokens after the packed documents


DIMS = ParallelDims(2, 2, 2)
Result = tuple[StepReport, dict[str, torch.Tensor]]


def step(world: dist.ProcessGroup | None, dims: ParallelDims | None, setting: Setting) -> Result:
    """Take a step on four sequences over dp ranks. Their numbers of valid tokens differ, and the last has none.

    Return the report, and the gradients, whole.
    """
    parallel = parity.mesh_of(dims, "cpu") if dims else None
    torch.manual_seed(0)
    model = GPT(setting.config, parallel.cp_group if parallel else None, setting.schedule)
    model.to(torch.float32 if setting.bfloat16 else torch.float64)
    model.recompute_layers(setting.recompute)
    cp, dp, dp_rank = (dims.cp, dims.dp, parallel.dp_rank) if dims and parallel else (1, 1, 0)
    if parallel:
        parallelize(model, parallel, torch.bfloat16 if setting.bfloat16 else None)
    batches = []
    for number in range(4):
        documents = "packed" if number % 2 else "dense"
        layout = parity.layout_of(documents, cp)
        full = parity.batch_of(documents, 4, setting.config.vocab_size)
        if documents == "packed" and setting.tail:  # in place of the last document
            layout = SequenceLayout.packed(
                [0, 64, 64, 192], cp, valid_lengths=[61, 0, 128], seq_len=192 + setting.tail
            )
        full = {name: tensor[number, None, : layout.seq_len] for name, tensor in full.items()}
        full["loss_mask"][:, : 50 * number if number < 3 else None] = 0
        full["loss_mask"] *= setting.weight
        if setting.config.derive_labels:
            del full["labels"]
        if setting.schedule == "prepared":
            full = prepare(full, layout, setting.config.depths_rolled)
        batches.append(({n: layout.shard(t, model.cp_rank) for n, t in full.items()}, layout))
    mine = batches[dp_rank::dp]
    config = TrainConfig(1, clip_norm=parity.NO_CLIPPING, normalisation=setting.normalisation)
    report = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), config, parallel).step(mine)
    model.mtp.roller.close()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return report, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


ALL_AT_ONCE = replace(CONFIG, num_depths=3, num_experts=4, repeat_mtp_layer=True, derive_labels=True)
DETACHED = Setting(replace(CONFIG, num_experts=4, detach_mtp=True))


@pytest.mark.parametrize(
    ("dims", "setting"),
    [
        ((4, 1, 2), DETACHED),
        ((1, 8, 1), DETACHED),
        ((1, 8, 1), Setting(replace(CONFIG, num_experts=4), tail=56)),  # 248 tokens are no multiple of 2 * cp
        ((2, 2, 2), Setting(replace(CONFIG, num_experts=4, derive_labels=True), tail=52)),
        ((2, 2, 2), Setting(ALL_AT_ONCE, "batch", "prepared")),
        ((2, 2, 2), Setting(replace(ALL_AT_ONCE, detach_mtp=True), "token", "overlap", recompute=True)),
    ],
)
def test_report_and_gradients_are_those_of_one_process_under_all_options(eight: RankPool, dims, setting):
    """Sums and counts are over dp, cp and accumulated microbatches, and count each token once."""
    report, gradients = step(None, None, setting)
    for found_report, found in eight.run(step, 8, ParallelDims(*dims), setting):
        for name, value in asdict(report).items():
            assert asdict(found_report)[name] == pytest.approx(value, rel=1e-9), name
        for name, gradient in gradients.items():
            assert float((found[name] - gradient).norm() / gradient.norm()) <= 1e-10, name


@pytest.mark.slow
def test_schedules_and_recomputing_give_the_same_bits(eight: RankPool):
    plain = Setting(replace(CONFIG, num_experts=4))
    expected = eight.run(step, 8, DIMS, plain)
    variants = [replace(plain, schedule=schedule) for schedule in ("sync", "merged", "overlap", "prepared")]
    for variant in [*variants, replace(plain, recompute=True)]:
        for (report, gradients), (other, found) in zip(
            expected, eight.run(step, 8, DIMS, variant), strict=True
        ):
            assert other == report, variant
            assert [name for name in gradients if not torch.equal(found[name], gradients[name])] == [], (
                variant
            )


def test_a_mask_weighs_in_bfloat16_what_it_is_counted_as(eight: RankPool):
    """Tokens of weight 0.3, which bfloat16 cannot hold, give the losses of tokens of weight 1."""
    ones = Setting(replace(CONFIG, num_experts=4), bfloat16=True)
    reports = [eight.run(step, 8, DIMS, setting)[0][0] for setting in (ones, replace(ones, weight=0.3))]
    for name in ("loss", "lm_loss", "mtp_losses", "aux_loss", "acceptance"):
        one, weighed = (getattr(report, name) for report in reports)
        assert weighed == pytest.approx(one, rel=1e-6), name


def not_finite(world: dist.ProcessGroup, dims: ParallelDims, ruined: bool = False) -> tuple[str, bool]:
    """Return the error of a step whose batch 7 is bad on one cp rank, and whether the weights are those before.

    With `ruined`, one weight of one rank is not a number before that step.
    """
    parallel = parity.mesh_of(dims, "cpu")
    torch.manual_seed(0)
    model = parallelize(GPT(CONFIG, parallel.cp_group), parallel)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), TrainConfig(1), parallel)
    layout, full = parity.layout_of("packed", dims.cp), parity.batch_of("packed", 4, CONFIG.vocab_size)
    full["loss_mask"][3, 100] = float("inf")
    mine = parity.share_out(full, layout, parallel, torch.device("cpu"))
    if ruined and world.rank() == 5:
        next(model.parameters()).to_local().data.view(-1)[0] = float("nan")
    before = [p.full_tensor() for p in model.parameters()]
    with pytest.raises(
        ValueError, match="the same number on all ranks, got 1 to 2: keep what some ranks have more"
    ):
        trainer.step(mine[: 1 + parallel.dp_rank])
    with pytest.raises(NonFiniteLossError) as raised:
        trainer.step(mine, where="step 2", first_batch=4)
    model.mtp.roller.close()
    after = [p.full_tensor() for p in model.parameters()]
    return str(raised.value), all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_loss_that_is_not_finite_is_named_on_all_ranks(eight: RankPool):
    for message, weights_are_unchanged in eight.run(not_finite, 8, DIMS):
        assert message.startswith("step 2: the LM loss of batch 7 (microbatch 1 of dp rank 1) is ")
        assert message.endswith("the weights are those of the step before")
        assert weights_are_unchanged


def test_the_error_of_a_ruined_model_does_not_vouch_for_its_weights(eight: RankPool):
    for message, _ in eight.run(not_finite, 8, DIMS, True):
        assert message.startswith("step 2: the ")
        assert message.endswith("left weights that are not finite: resume from a checkpoint before it")


def step_after_a_broken_one(world: dist.ProcessGroup) -> str:
    """Return the error of a step after one whose second microbatch has no labels."""
    parallel = parity.mesh_of(DIMS, "cpu")
    model = parallelize(GPT(CONFIG, parallel.cp_group), parallel)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), TrainConfig(1), parallel)
    layout, full = parity.layout_of("packed", 2), parity.batch_of("packed", 4, CONFIG.vocab_size)
    good = parity.share_out(full, layout, parallel, torch.device("cpu"))
    batch, layout = good[1]
    unlabelled = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with pytest.raises(ValueError, match="labels"):  # before any backward
        trainer.step([(unlabelled, layout), good[1]])
    trainer.step(good)
    with pytest.raises(ValueError, match="labels"):
        trainer.step([good[0], (unlabelled, layout)])
    with pytest.raises(RuntimeError) as raised:
        trainer.step(good)
    model.mtp.roller.close()
    return str(raised.value)


def test_no_step_adds_the_gradients_of_a_broken_one(eight: RankPool):
    for message in eight.run(step_after_a_broken_one, 8):
        assert message.startswith(
            "an earlier step ended between its microbatches, and its gradients are still "
        )


def refusals_of_tp_ranks(world: dist.ProcessGroup) -> list[str]:
    """Return what a step says if one tp rank of the eight has another number of microbatches, or other batches."""
    parallel = parity.mesh_of(DIMS, "cpu")
    model = parallelize(GPT(CONFIG, parallel.cp_group), parallel)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), TrainConfig(1), parallel)
    layout, full = parity.layout_of("packed", 2), parity.batch_of("packed", 4, CONFIG.vocab_size)
    mine, is_odd = parity.share_out(full, layout, parallel, torch.device("cpu")), world.rank() == 5
    names = [f"dp rank {parallel.dp_rank}, batch {number + is_odd}" for number in range(2)]
    named = [(batch, layout.of_batch(name)) for (batch, layout), name in zip(mine, names, strict=True)]
    found = []
    for microbatches in (mine[: 2 - is_odd], named):
        with pytest.raises(ValueError, match="tp ranks share") as raised:
            trainer.step(microbatches)
        found.append(str(raised.value))
    trainer.step(mine)
    model.mtp.roller.close()
    return found


def test_tp_ranks_with_other_batches_are_told(eight: RankPool):
    for messages in eight.run(refusals_of_tp_ranks, 8):
        assert [one[:61] for one in messages] == [
            "tp ranks share their tokens: give them the same batches, got "
        ] * 2
