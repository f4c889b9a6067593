"""Loss and gradients under tensor, context and data parallelism, and sizes that cannot be."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import parity
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from overlap_mtp import SequenceLayout, prepare
from overlap_mtp.exchange.group import _timeout_of
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.loss import token_mask
from overlap_mtp.training.parallel import ParallelDims, ParallelMesh, parallelize
from overlap_mtp.training.trainer import NonFiniteLossError, StepReport, TrainConfig, Trainer

from rank_pool import RankPool, device_of, run_on_forks

ROOT = Path(__file__).parents[2]

CONFIG = ModelConfig(
    hidden_size=32, num_layers=1, num_depths=2, num_heads=4, num_kv_heads=2, ffn_size=48, vocab_size=64
)


# The whole matrix takes 2 cores 6 minutes (experiments/parity.py): here all of the merge request's sizes, and of data
# parallelism and experts what fits four ranks, with one of eight each. Eight ranks: packed with recompute, or neither.
CASES = [
    case
    for case in parity.matrix("float64")
    if (case.ranks <= 4 and (case.recompute or (case.dp == 1 and not case.num_experts)))
    or (
        case.ranks == 8
        and case.recompute == (case.documents == "packed")
        and (
            (case.dp == 1 and not case.num_experts)
            or (case.recompute and (case.tp, case.cp) in ((2, 2), (2, 4)))
        )
    )
]
CASES += [parity.Case(2, 2, 1, "packed", True, "float32", num_experts) for num_experts in (0, 4)]
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


@pytest.fixture(scope="module")
def rows() -> dict[parity.Case, dict]:
    """Those of as many ranks in one launch."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(parity, "run_on_ranks", run_on_forks)
        found = parity.measure(CASES, "cpu", Path(folder))["rows"]
    names = parity.Case.__dataclass_fields__
    return {parity.Case(**{name: row[name] for name in names}): row for row in found}


@pytest.mark.parametrize(("gradient", "passed"), [(1.0, True), (1.1, False), (float("nan"), False)])
def test_a_gradient_that_is_off_or_nan_fails(gradient, passed):
    """Wherever it is among those that are right."""
    expected = {"loss": 1.0, "gradients": {name: torch.ones(3) for name in "abc"}}
    for name in "abc":
        found = {"loss": 1.0, "gradients": expected["gradients"] | {name: torch.tensor([1.0, gradient, 1.0])}}
        row = parity.errors(found, expected, 1e-5)
        assert row["passed"] == passed
        assert passed or row["worst"] == name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, asdict(case).values())))
def test_loss_and_every_gradient_equal_one_process(rows, case):
    row = rows[case]
    assert row["loss_error"] <= TOLERANCE[case.dtype], row
    assert row["gradient_error"] <= TOLERANCE[case.dtype], row
    assert case.dtype == "float64" or row["gradient_error"] > 1e-9  # it was computed in float32


@pytest.mark.multi_gpu
def test_four_ranks_equal_one_process_on_the_gpus_there_are(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two or more GPUs")
    cases = [
        parity.Case(1, 4, 1, "packed", False, "float32", 4),
        parity.Case(2, 2, 1, "packed", True, "float32", 4),
        parity.Case(1, 4, 1, "dense", True, "bfloat16"),
        parity.Case(2, 1, 2, "dense", False, "bfloat16"),
    ]
    for row in parity.measure(cases, "cuda", tmp_path, share_gpus=True)["rows"]:
        assert 0 < row["gradient_error"] <= parity.TOLERANCE[row["dtype"]], row
        assert row["loss_error"] <= parity.TOLERANCE[row["dtype"]], row


def test_the_matrix_is_that_of_the_merge_request():
    plain = [case for case in parity.matrix("float64") if case.dp == 1 and not case.num_experts]
    assert len(plain) == 8 * 2 * 2
    assert {(case.tp, case.cp) for case in plain} == set(parity.SIZES)
    assert all(case.ranks <= 8 for case in parity.matrix("float64"))


@pytest.mark.parametrize(
    ("sizes", "change", "seq_len", "world", "words"),
    [
        (
            ParallelDims(2, 2, 2),
            {},
            64,
            4,
            r"dp \* cp \* tp must be the number of ranks: 2 \* 2 \* 2 = 8, got 4",
        ),
        (ParallelDims(1, 3, 1), {}, 64, 3, r"seq_len must be a multiple of 2 \* cp = 6, got 64"),
        (
            ParallelDims(1, 2, 4),
            {"num_kv_heads": 4},
            20,
            8,
            r"seq_len / cp must be a multiple of tp = 4, got 10",
        ),
        (ParallelDims(1, 1, 4), {}, 64, 4, "num_kv_heads must be a multiple of tp = 4, got 2"),
        (ParallelDims(1, 1, 2), {"ffn_size": 33}, 64, 2, "ffn_size must be a multiple of tp = 2, got 33"),
        (ParallelDims(1, 1, 2), {"vocab_size": 65}, 64, 2, "vocab_size must be a multiple of tp = 2, got 65"),
    ],
)
def test_sizes_that_disagree_are_named(sizes, change, seq_len, world, words):
    with pytest.raises(ValueError, match=words):
        sizes.check(replace(CONFIG, **change), seq_len, "zigzag", world)


@pytest.mark.parametrize(
    "sizes",
    [
        ParallelDims(),
        ParallelDims(1, 8, 1),
        ParallelDims(2, 2, 2),
        ParallelDims(1, 4, 2),
        ParallelDims(4, 1, 2),
    ],
)
def test_context_parallelism_with_mtp_is_legal(sizes):
    sizes.check(CONFIG, 64, "zigzag", sizes.world)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="cp must be >= 1, got 0"):
        ParallelDims(cp=0)


def refusals(world: dist.ProcessGroup) -> list[str]:
    """What a mesh, a model and a step say of sizes that do not fit if nobody called ParallelDims.check before."""
    said = []
    with pytest.raises(ValueError, match="tp") as refused:
        ParallelMesh.make(ParallelDims(1, 2, 2), "cpu")
    said.append(str(refused.value))
    parallel = parity.mesh_of(ParallelDims(1, 2, 4), "cpu")
    with pytest.raises(ValueError, match="tp") as refused:
        parallelize(GPT(replace(parity.CONFIG, num_kv_heads=2), parallel.cp_group), parallel)
    said.append(str(refused.value))
    model = parallelize(GPT(parity.CONFIG, parallel.cp_group), parallel)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), TrainConfig(1), parallel)
    for layout in (SequenceLayout.dense(20, 2), SequenceLayout.dense(64, 4)):
        with pytest.raises(ValueError, match="cp") as refused:
            trainer.step([({}, layout)])
        said.append(str(refused.value))
    model.mtp.roller.close()
    return said


def test_the_library_names_them_without_being_asked(pool: RankPool):
    for found in pool.run(refusals, 8):
        assert found == [
            "dp * cp * tp must be the number of ranks: 1 * 2 * 2 = 4, got 8 ranks",
            "num_kv_heads must be a multiple of tp = 4, got 2",
            "seq_len / cp must be a multiple of tp = 4, got 10",
            "the layout's cp_size must be the mesh's cp: 4 is not 2",
        ]


@dataclass(frozen=True)
class Setting:
    """How `step` takes its step."""

    config: ModelConfig
    normalisation: str = "token"
    schedule: str = "prefetch"
    recompute: bool = False


def step(
    world: dist.ProcessGroup | None, sizes: ParallelDims | None, setting: Setting
) -> tuple[StepReport, dict[str, torch.Tensor]]:
    """One step on four sequences with unequal numbers of valid tokens, the last with none, shared out over dp ranks.

    Its report, and the gradients, whole.
    """
    parallel = parity.mesh_of(sizes, "cpu") if sizes else None
    torch.manual_seed(0)
    model = GPT(setting.config, parallel.cp_group if parallel else None, setting.schedule).double()
    model.recompute_layers(setting.recompute)
    cp, dp, dp_rank = (sizes.cp, sizes.dp, parallel.dp_rank) if sizes and parallel else (1, 1, 0)
    if parallel:
        parallelize(model, parallel)
    batches = []
    for number in range(4):
        documents = "packed" if number % 2 else "dense"
        layout = parity.layout_of(documents, cp)
        full = parity.batch_of(documents, 4, setting.config.vocab_size)
        full = {name: tensor[number, None] for name, tensor in full.items()}
        full["loss_mask"][:, : 50 * number if number < 3 else None] = 0
        if setting.config.derive_labels:
            del full["labels"]
        if setting.schedule == "prepared":
            full = prepare(full, layout, setting.config.depths_rolled)
        batches.append(({n: layout.shard(t, model.cp_rank) for n, t in full.items()}, layout))
    mine = batches[dp_rank::dp]
    recipe = TrainConfig(1, clip_norm=parity.NEVER, accumulate=len(mine), normalisation=setting.normalisation)
    report = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), recipe, parallel).step(mine)
    model.mtp.roller.close()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return report, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def assert_alike(
    found: tuple[StepReport, dict[str, torch.Tensor]], expected: tuple[StepReport, dict[str, torch.Tensor]]
) -> None:
    for name, value in asdict(expected[0]).items():
        assert asdict(found[0])[name] == pytest.approx(value, rel=1e-9), name
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).norm() / gradient.norm()) <= 1e-10, name


@pytest.mark.parametrize("sizes", [ParallelDims(2, 2, 2), ParallelDims(4, 1, 2), ParallelDims(1, 8, 1)])
def test_what_is_logged_is_counted_once(pool: RankPool, sizes):
    """Sums over sums of tokens, over dp, cp, tp and accumulated microbatches: what one process would log."""
    setting = Setting(replace(CONFIG, num_experts=4, detach_mtp=True))
    expected = step(None, None, setting)
    for found in pool.run(step, 8, sizes, setting):
        assert_alike(found, expected)


ALL_AT_ONCE = replace(CONFIG, num_depths=3, num_experts=4, repeat_mtp_layer=True, derive_labels=True)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(ALL_AT_ONCE, "batch", "prepared"),
        Setting(replace(ALL_AT_ONCE, detach_mtp=True), "token", "overlap", recompute=True),
    ],
    ids=["batch-prepared", "token-overlap-detached-recompute"],
)
def test_all_options_at_once_are_those_of_one_process(pool: RankPool, setting):
    expected = step(None, None, setting)
    for found in pool.run(step, 8, ParallelDims(2, 2, 2), setting):
        assert_alike(found, expected)


def differences_of_variants(world: dist.ProcessGroup, sizes: ParallelDims) -> list[str]:
    """Of steps that are to give the same bits: by any schedule, and recomputed."""
    plain = Setting(replace(CONFIG, num_experts=4))
    report, gradients = step(world, sizes, plain)
    variants = [replace(plain, schedule=schedule) for schedule in ("sync", "merged", "overlap", "prepared")]
    wrong = []
    for variant in [*variants, replace(plain, recompute=True)]:
        other, found = step(world, sizes, variant)
        names = ["report"] if other != report else []
        names += [name for name, gradient in gradients.items() if not torch.equal(found[name], gradient)]
        wrong += [f"{variant.schedule}, recompute {variant.recompute}: {name}" for name in names]
    return wrong


@pytest.mark.slow
def test_schedules_and_recomputing_give_the_same_bits(pool: RankPool):
    assert pool.run(differences_of_variants, 8, ParallelDims(2, 2, 2)) == [[]] * 8


def not_finite(world: dist.ProcessGroup, sizes: ParallelDims) -> tuple[str, bool]:
    """What is said of a step whose batch 7 is bad, on one cp rank alone; and whether the weights are as before."""
    parallel = parity.mesh_of(sizes, "cpu")
    torch.manual_seed(0)
    model = parallelize(GPT(CONFIG, parallel.cp_group), parallel)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), TrainConfig(1, accumulate=2), parallel)
    layout, full = parity.layout_of("packed", sizes.cp), parity.batch_of("packed", 4, CONFIG.vocab_size)
    full["loss_mask"][3, 100] = float("inf")
    mine = parity.share_out(full, layout, parallel, device_of(world))
    before = [p.full_tensor() for p in model.parameters()]
    with pytest.raises(NonFiniteLossError) as raised:
        trainer.step(mine, where="step 2", first_batch=4)
    model.mtp.roller.close()
    after = [p.full_tensor() for p in model.parameters()]
    return str(raised.value), all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_loss_that_is_not_finite_is_named_alike_on_all_ranks(pool: RankPool):
    for said, is_as_before in pool.run(not_finite, 8, ParallelDims(2, 2, 2)):
        assert said.startswith("step 2: the LM loss of batch 7 (microbatch 1 of dp rank 1) is ")
        assert is_as_before


def weighed_losses(world: dist.ProcessGroup) -> list[StepReport]:
    """In bfloat16, of tokens that all weigh 1, then 0.3, which bfloat16 does not hold."""
    parallel, reports = parity.mesh_of(ParallelDims(2, 2, 2), "cpu"), []
    layout = parity.layout_of("packed", 2)
    for weight in (1.0, 0.3):
        torch.manual_seed(0)
        model = GPT(replace(CONFIG, num_experts=4), parallel.cp_group)
        parallelize(model, parallel, torch.bfloat16)
        full = {name: tensor[:1] for name, tensor in parity.batch_of("packed", 1, 64).items()}
        full["loss_mask"] = torch.full_like(full["loss_mask"], weight)
        batch = {name: layout.shard(tensor, parallel.cp_rank) for name, tensor in full.items()}
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), TrainConfig(1), parallel)
        reports.append(trainer.step([(batch, layout)]))
        model.mtp.roller.close()
    return reports


def test_a_mask_weighs_in_bfloat16_what_it_is_counted_as(pool: RankPool):
    for ones, weighed in pool.run(weighed_losses, 8):
        for name in ("loss", "lm_loss", "mtp_losses", "aux_loss"):
            assert asdict(weighed)[name] == pytest.approx(asdict(ones)[name], rel=1e-6), name
        assert weighed.acceptance == pytest.approx(ones.acceptance, rel=1e-6)


def mesh_timeouts(world: dist.ProcessGroup) -> set[object]:
    parallel = ParallelMesh.make(ParallelDims(2, 2, 2), "cpu", timedelta(seconds=77))
    return {_timeout_of(group, "cpu") for group in parallel.groups}


def test_a_mesh_waits_as_long_as_it_is_told(pool: RankPool):
    assert pool.run(mesh_timeouts, 8) == [{timedelta(seconds=77)}] * 8


@pytest.mark.parametrize("documents", ["dense", "packed"])
@pytest.mark.parametrize("cp", [2, 4])
def test_other_numbers_of_tokens_count_on_each_rank(documents, cp):
    """In what parity and golden values are measured on."""
    layout, mask = parity.layout_of(documents, cp), parity.batch_of(documents, 4, 64)["loss_mask"]
    counts = torch.stack(
        [
            token_mask(layout.shard(mask, r), layout, r, 0, like=layout.shard(mask, r)).sum(-1)
            for r in range(cp)
        ]
    )
    assert all(len(set(row)) > 1 for row in counts.T.tolist()), counts
    assert len(set(counts.sum(0).tolist())) == 4, counts


def with_and_without_compiling(
    world: dist.ProcessGroup, sizes: ParallelDims, recompute: bool
) -> dict[str, float]:
    """Relative errors of a step's loss and gradients, of compiled layers to those that are not."""
    case = parity.Case(sizes.tp, sizes.cp, sizes.dp, "packed", recompute, "float32", 4)
    device, layout = device_of(world), parity.layout_of("packed", sizes.cp)
    found = []
    torch.compiler.reset()
    for compiled in (False, True):
        parallel = parity.mesh_of(sizes, device.type)
        torch.manual_seed(0)
        model = parity.new_model(case, device, parallel.cp_group)
        model.recompute_layers(recompute)
        parallelize(model, parallel)
        if compiled:
            model.compile_layers()
        full = parity.batch_of("packed", 1, model.config.vocab_size)
        batch = {name: layout.shard(tensor, model.cp_rank).to(device) for name, tensor in full.items()}
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), TrainConfig(1), parallel)
        loss = trainer.step([(batch, layout)]).loss
        model.mtp.roller.close()
        found.append({name: p.grad.full_tensor() for name, p in model.named_parameters()})
        found[-1]["loss"] = torch.tensor(loss)
    eager, fused = found
    return {name: float((fused[name] - eager[name]).norm() / eager[name].norm()) for name in eager}


@pytest.mark.multi_gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_train_alike_on_gpus(gpu_pool: RankPool, recompute):
    size = gpu_pool.world_size
    for found in gpu_pool.run(
        with_and_without_compiling, size, ParallelDims(1, size, 1), recompute, limit_s=240
    ):
        assert max(found.values()) <= parity.TOLERANCE["float32"], found
        assert max(found.values()) > 0  # it was compiled: it rounds otherwise


def refused(world: dist.ProcessGroup) -> None:
    parallel = parity.mesh_of(ParallelDims(1, 2, 4), "cpu")
    model = parallelize(GPT(parity.CONFIG, parallel.cp_group), parallel)
    with pytest.raises(ValueError, match="compiled layers and tp > 1 do not go together"):
        model.compile_layers()


def test_compiled_layers_are_not_split(pool: RankPool):
    pool.run(refused, 8)
