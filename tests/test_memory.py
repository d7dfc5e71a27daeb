"""Which tensors share elements, against the sets of their places in memory."""

import random
import time

import pytest
import torch

from lamina._util.tensors import overlapping, relation


def places(tensor: torch.Tensor) -> set[int]:
    """The bytes of a tensor, counted from the beginning of its storage."""
    size = tensor.element_size()
    numbers = torch.arange(tensor.untyped_storage().nbytes() // size)
    offsets = numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return {int(at) * size + byte for at in offsets.reshape(-1) for byte in range(size)}


def any_view(storage: torch.Tensor, rng: random.Random) -> torch.Tensor:
    ndim = rng.randint(0, 3)
    shape = [rng.randint(1, 4) for _ in range(ndim)]
    stride = [rng.choice([0, 1, 2, 3, 4, 6, 8, 12]) for _ in range(ndim)]
    return storage.as_strided(shape, stride, rng.randint(0, 40))


def test_any_two_views_share_what_their_places_share():
    rng, storage = random.Random(0), torch.zeros(200)
    seen = []
    for _ in range(1000):
        one, other = any_view(storage, rng), any_view(storage, rng)
        shared = bool(places(one) & places(other))
        assert (relation(one, other) != "apart") == shared
        assert overlapping([one, other]) == ([(0, 1)] if shared else [])
        seen.append(shared)
    assert 100 < sum(seen) < 900


def test_each_of_many_views_is_found():
    rng, storage = random.Random(1), torch.zeros(300)
    for _ in range(100):
        views = [any_view(storage, rng) for _ in range(8)]
        found = overlapping(views)
        touched = {index for pair in found for index in pair}
        bytes_of = list(map(places, views))
        for index, mine in enumerate(bytes_of):
            others = set().union(*bytes_of[:index], *bytes_of[index + 1 :])
            assert (index in touched) == bool(mine & others)
        assert all(bytes_of[one] & bytes_of[other] for one, other in found)


def test_dtypes_of_other_sizes_are_compared_by_bytes():
    storage = torch.zeros(8, dtype=torch.float32)
    narrow = storage.view(torch.float16)
    assert relation(storage[::2], narrow[2::4]) == "apart"
    assert relation(storage[::2], narrow[1::4]) == "view"
    assert relation(storage, storage.view(torch.int32)) == "view"


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        (lambda x: x, lambda x: x, "same"),
        (lambda x: x[:3], lambda x: x[:3].view_as(x[:3]), "same"),
        (lambda x: x, lambda x: x.T, "transposed"),
        (lambda x: x[:, :2], lambda x: x[:, :2].T, "transposed"),
        (lambda x: x[:2], lambda x: x[1:3], "view"),
        (lambda x: x[:2], lambda x: x[1:3].T, "view"),
        (lambda x: x[0], lambda x: x[:, 0], "view"),
        (lambda x: x[:2], lambda x: x[2:], "apart"),
        (lambda x: x[:, :2], lambda x: x[:, 2:], "apart"),
        (lambda x: x[:0], lambda x: x, "apart"),
        (lambda x: x, lambda x: x.clone(), "apart"),
        (lambda x: x.to("meta"), lambda x: x.to("meta"), "apart"),
    ],
)
def test_how_two_tensors_lie(one, other, kind):
    matrix = torch.zeros(4, 4)
    assert relation(one(matrix), other(matrix)) == kind


def test_large_tensors_are_not_read():
    whole = torch.empty(30_000, 3, 4096, dtype=torch.bfloat16, device="cpu").movedim(1, 0)
    begin = time.perf_counter()
    assert relation(whole[0], whole[1]) == "apart"
    assert relation(whole[0], whole[0].T) == "transposed"
    assert relation(whole[:, ::2], whole[:, 1::2].transpose(0, 2)) == "apart"
    assert time.perf_counter() - begin < 1.0
