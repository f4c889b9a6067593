"""What `Dispatch` launches itself is the variant of a kernel that Triton would have launched for the same arguments."""

from __future__ import annotations

import random
from typing import Any

import torch

from not_interpreted import run_compiling


class Specialized:
    """In place of a kernel: it asks Triton which variant it would launch for the arguments."""

    def __init__(self, kernel: Any, launched: list[str]) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.name, self.launched = kernel.__name__, launched

    def variant(self, *arguments: Any, **constants: Any) -> list[str]:
        bound, specialization, options = self.bind(*arguments, **constants)
        return [*map(str, specialization), str(options), *bound]

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments, **constants: Compiled(self, self.variant(*arguments, **constants))


class Compiled:
    """In place of what Triton compiled for a variant: a launch must be of this variant."""

    def __init__(self, kernel: Specialized, variant: list[str]) -> None:
        self.kernel, self.variant = kernel, variant

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*everything: Any) -> None:
            assert self.kernel.variant(*everything) == self.variant, (self.kernel.name, everything)
            self.kernel.launched.append(self.kernel.name)

        return launch


def tensor(chance: random.Random, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """One that may begin anywhere."""
    size, begin = torch.Size(shape).numel(), chance.choice([0, 0, 0, 1, 16 // dtype.itemsize])
    return torch.zeros(size + begin, dtype=dtype)[begin:].view(shape)


def launch_all(launched: list[str], rounds: int) -> None:
    """Launch every kernel of rows with many kinds of arguments."""
    from overlap_mtp.kernels import rows

    for one in vars(rows).values():
        if isinstance(one, rows.Dispatch):
            one._kernel = Specialized(one._kernel, launched)
    chance = random.Random(0)
    for _ in range(rounds):
        dtype = chance.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16])
        length, count = chance.choice([1, 2, 16, 17, 32]), chance.choice([1, 3, 16, 48])
        depths, batch_rows, tensors = (chance.choice([1, 2]) for _ in range(3))
        is_batch_first = chance.random() < 0.5

        def some(
            tensors=tensors, dtype=dtype, shape=(length, batch_rows, 16), first=is_batch_first
        ) -> list[torch.Tensor]:
            made = [
                tensor(chance, dtype, *(shape[1], shape[0], 16) if first else shape) for _ in range(tensors)
            ]
            return [one.transpose(0, 1) for one in made] if first else made

        def index(*shape: int) -> torch.Tensor:
            return tensor(chance, torch.int32, *shape)

        buffer = tensor(chance, dtype, count, tensors * batch_rows * 16)
        fingerprint = chance.choice([0, 1, 16, 2**31, 2**62 + 5])
        headers = chance.choice([(), (index(2), index(2), fingerprint, torch.zeros(4, dtype=torch.int32))])
        rows.pack_rows(some(), index(count), buffer, fingerprint)
        rows.unroll_own_rows(some(), index(depths, length), [some() for _ in range(depths)])
        rows.unroll_received_rows(buffer, index(depths, count), [some() for _ in range(depths)], *headers)
        rows.sum_rows([some() for _ in range(depths)], index(depths, length), some())
        rows.pack_sums([some() for _ in range(depths)], index(depths, count), buffer, fingerprint)
        rows.add_rows(buffer, index(count), index(chance.choice([1, 2, 16]), count), some(), *headers)


def test_what_is_launched_again_is_what_triton_would_launch():
    words = run_compiling(__file__)
    launches = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    names = ("pack_rows", "unroll_own_rows", "unroll_received_rows", "sum_rows", "pack_sums", "add_rows")
    assert {f"{name}_kernel" for name in names} == {*launches}
    assert min(launches.values()) > 100


if __name__ == "__main__":
    noted: list[str] = []
    launch_all(noted, rounds=400)
    for name in sorted({*noted}):
        print(name, noted.count(name))
