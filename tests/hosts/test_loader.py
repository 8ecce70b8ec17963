"""The training order: a pure function of seed and epoch, and a place in it that can be kept."""

from __future__ import annotations

import copy
from itertools import chain

import pytest
import torch
from torch.utils.data import SequentialSampler, TensorDataset

from esper.errors import CheckpointError, ConfigError
from esper.hosts.loader import BatchLoader, EpochSampler


def make_loader(seed: int = 0, batch_size: int = 4, num_items: int = 18, **kwargs) -> BatchLoader:
    data = TensorDataset(torch.arange(num_items))
    return BatchLoader(data, batch_size, sampler=EpochSampler(num_items, seed=seed), **kwargs)


def epoch_of(loader: BatchLoader, epoch: int) -> list[list[int]]:
    loader.sampler.set_epoch(epoch)
    return [batch[0].tolist() for batch in loader]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first, second = make_loader(), make_loader()
    epoch_of(second, 0)
    torch.manual_seed(7)
    assert epoch_of(first, 3) == epoch_of(second, 3)
    assert epoch_of(first, 3) != epoch_of(first, 4)
    assert epoch_of(first, 3) != epoch_of(make_loader(seed=1), 3)
    assert epoch_of(make_loader(seed=0), 1) != epoch_of(make_loader(seed=1), 0)


def test_an_epoch_holds_every_item_once() -> None:
    batches = epoch_of(make_loader(), 2)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 2]
    assert sorted(chain.from_iterable(batches)) == list(range(18))
    assert len(epoch_of(make_loader(drop_last=True), 2)) == len(make_loader(drop_last=True)) == 4


def test_iterating_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    epoch_of(make_loader(), 0)
    list(EpochSampler(9, seed=0, num_samples=5, replacement=True))
    assert torch.equal(before, torch.random.get_rng_state())


def test_epoch_is_read_when_the_first_batch_is_drawn() -> None:
    loader = make_loader()
    early = iter(loader)  # as Lightning does, before set_epoch
    loader.sampler.set_epoch(5)
    assert [batch[0].tolist() for batch in early] == epoch_of(make_loader(), 5)


@pytest.mark.parametrize("position", [0, 1, 3, 5])
def test_a_loader_takes_up_the_place_of_another(position: int) -> None:
    whole = epoch_of(make_loader(), 2)
    loader = make_loader()
    loader.sampler.set_epoch(2)
    running = iter(loader)
    for _ in range(position):
        next(running)

    resumed = make_loader()
    resumed.load_state_dict(loader.state_dict())
    assert len(resumed) == 5
    expected = whole if position in (0, 5) else whole[position:]
    assert epoch_of(resumed, 2) == expected
    assert epoch_of(resumed, 2) == whole, "only the first iteration is a continuation"


def test_a_place_in_another_epoch_is_not_taken_up() -> None:
    loader = make_loader()
    next(iter(loader))
    resumed = make_loader()
    resumed.load_state_dict(loader.state_dict())
    assert epoch_of(resumed, 1) == epoch_of(make_loader(), 1)


def test_state_before_the_first_batch_after_a_resume_is_the_restored_one() -> None:
    loader = make_loader()
    next(iter(loader))
    resumed = make_loader()
    resumed.load_state_dict(loader.state_dict())
    assert resumed.state_dict() == loader.state_dict()


def test_a_copy_does_not_move_the_place() -> None:
    loader = make_loader()
    next(iter(loader))
    state = loader.state_dict()
    list(copy.copy(loader))
    assert loader.state_dict() == state


def test_a_place_in_data_cut_otherwise_is_refused() -> None:
    loader = make_loader()
    next(iter(loader))
    with pytest.raises(
        CheckpointError,
        match=r"after batch 1 of 5 of epoch 0.*seed: 0 then, 3 now, batch_size: 4 then, 2 now",
    ):
        make_loader(seed=3, batch_size=2).load_state_dict(loader.state_dict())


def test_a_finished_epoch_may_be_followed_by_another_batch_size() -> None:
    loader = make_loader()
    list(loader)
    other = make_loader(batch_size=9)
    other.load_state_dict(loader.state_dict())
    assert epoch_of(other, 1) == epoch_of(make_loader(batch_size=9), 1)


def test_replicas_share_an_epoch() -> None:
    shares = [
        list(
            chain.from_iterable(
                epoch_of(make_loader(num_items=7, batch_size=2, num_replicas=2, rank=rank), 0)
            )
        )
        for rank in (0, 1)
    ]
    assert [len(share) for share in shares] == [4, 4]
    assert set(shares[0]) | set(shares[1]) == set(range(7))


def test_sequential_order_and_partial_epochs() -> None:
    loader = BatchLoader(TensorDataset(torch.arange(5)), 2, sampler=SequentialSampler(range(5)))
    assert [batch[0].tolist() for batch in loader] == [[0, 1], [2, 3], [4]]
    sampler = EpochSampler(100, seed=0, num_samples=10)
    assert len(set(sampler)) == len(sampler) == 10


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(ConfigError, match="at most 4 samples, got num_samples=5"):
        EpochSampler(4, seed=0, num_samples=5)
    with pytest.raises(ConfigError, match="at least one item, got 0 items"):
        EpochSampler(0, seed=0)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        make_loader(batch_size=0)
    with pytest.raises(ConfigError, match="rank=2, num_replicas=2"):
        make_loader(num_replicas=2, rank=2)
