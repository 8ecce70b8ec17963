"""Rows picked for statistics and scores: aligned, deterministic, and the true patches of a convolution."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from esper.errors import GrowthError
from esper.kasmina.sampling import (
    bypass_patches,
    coprime_stride,
    plan_rows,
    sample_elements,
    sample_rows,
    unfold_patches,
)

CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(3, 5, 3),
    "padded": lambda: nn.Conv2d(3, 5, 3, padding=1),
    "strided": lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)),
    "dilated": lambda: nn.Conv2d(3, 5, 3, dilation=2, padding=2),
    "reflect": lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(3, 5, 3, padding=2, padding_mode="circular"),
    "pointwise": lambda: nn.Conv2d(3, 5, 1, stride=2),
    "same": lambda: nn.Conv2d(3, 5, (2, 5), padding="same"),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_sampling_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    conv = nn.utils.skip_init(nn.Conv2d, 3, 5, 3)
    x = torch.zeros(4, 3, 8, 8)
    sample_rows(x, channels_first=True)
    sample_elements(x)
    unfold_patches(x, conv, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_sample_rows_of_a_small_batch_is_all_of_it() -> None:
    x = torch.randn(8, 5)
    assert torch.equal(sample_rows(x), x)
    assert torch.equal(sample_rows(x[0]), x[:1])


def test_sample_rows_keeps_the_caps_and_owns_its_memory() -> None:
    x = torch.randn(100, 7, 300, requires_grad=True)
    sample = sample_rows(x, max_rows=32, max_units=64)
    assert sample.shape[0] <= 32
    assert sample.shape[1] <= 64
    assert not sample.requires_grad
    assert sample.untyped_storage().nbytes() == sample.numel() * 4


def test_sample_rows_of_a_sequence_visits_every_position() -> None:
    position = torch.arange(64.0).expand(64, 64).unsqueeze(2)
    assert sample_rows(position, max_rows=64).unique().numel() > 50


def test_sample_rows_of_channels_equals_rows_of_moved_channels() -> None:
    x = torch.randn(6, 4, 5, 7)
    moved = sample_rows(x.movedim(1, -1), max_rows=50)
    assert torch.equal(sample_rows(x, channels_first=True, max_rows=50), moved)


def test_sample_rows_refuses_a_scalar_and_a_zero_cap() -> None:
    with pytest.raises(GrowthError, match=r"expected an activation \[\*, C\]"):
        sample_rows(torch.tensor(1.0))
    with pytest.raises(GrowthError, match="limit of at least 1"):
        sample_rows(torch.ones(3, 2), max_rows=0)


def test_sample_elements_takes_the_same_elements_again() -> None:
    weight = torch.arange(100.0 * 100).reshape(100, 100)
    sample = sample_elements(weight, 512)
    assert sample.numel() <= 512
    assert torch.equal(sample, sample_elements(weight.clone(), 512))
    assert (sample % 100).unique().numel() == 100  # every column is looked at


def test_coprime_stride() -> None:
    assert coprime_stride(10, 20, 4) == 1
    assert coprime_stride(4096, 64, 64) == 65


def test_plan_prefers_examples_to_positions() -> None:
    assert plan_rows(2048, (), 1024).num_rows == 1024
    plan = plan_rows(32, (64,), 1024)
    assert len(plan.examples) == 32
    assert 16 <= plan.rows_per_example <= 32
    assert plan_rows(3, (4, 4), 1024).num_rows == 48


def test_plan_rows_are_aligned_across_layouts() -> None:
    x = torch.randn(10, 6, 5, 4)
    plan = plan_rows(10, (6, 5), max_rows=60)
    assert torch.equal(plan.rows(x), plan.rows(x.movedim(-1, 1), channels_first=True))
    assert plan.rows(x).shape == (plan.num_rows, 4)


def test_plan_refuses_another_grid_and_nothing() -> None:
    with pytest.raises(GrowthError, match=r"expected 4 examples on the grid \(6,\)"):
        plan_rows(4, (6,)).rows(torch.zeros(4, 5, 2))
    with pytest.raises(GrowthError, match="at least one example"):
        plan_rows(0)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_times_weight_are_the_output(name: str) -> None:
    conv = CONVOLUTIONS[name]()
    x = torch.randn(4, 3, 9, 8)
    with warnings.catch_warnings():
        # torch mentions, once a process, that an even kernel with padding="same" costs a copy.
        warnings.filterwarnings("ignore", message="Using padding='same'")
        out = conv(x)
    plan = plan_rows(4, tuple(out.shape[2:]), max_rows=40)
    rows = unfold_patches(x, conv, plan) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(rows, plan.rows(out, channels_first=True))


def test_patches_refuse_a_foreign_plan_and_image() -> None:
    conv = nn.Conv2d(3, 5, 3)
    with pytest.raises(GrowthError, match=r"output grid \(6, 6\)"):
        unfold_patches(torch.zeros(2, 3, 8, 8), conv, plan_rows(2, (8, 8)))
    with pytest.raises(GrowthError, match=r"expected an image batch \[N, 3, H, W\]"):
        unfold_patches(torch.zeros(2, 4, 8, 8), conv)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_bypass_patches_are_those_under_the_centre_tap(stride: int, padding: int) -> None:
    """A target kernel that is zero but for its centre makes target(source(x)) a function of these patches."""
    source = nn.Conv2d(2, 3, 3, padding=1, stride=stride, bias=False)
    target = nn.Conv2d(3, 4, 3, padding=padding, stride=stride, bias=False)
    with torch.no_grad():
        centre = target.weight[:, :, 1:2, 1:2].clone()
        target.weight.zero_()
        target.weight[:, :, 1:2, 1:2] = centre
    x = torch.randn(3, 2, 12, 10)
    hidden = source(x)
    out = target(hidden)
    plan = plan_rows(3, tuple(out.shape[2:]), max_rows=30)
    rows = bypass_patches(x, source, target, (hidden.shape[2], hidden.shape[3]), plan)
    composed = rows @ source.weight.flatten(1).T @ centre.flatten(1).T
    torch.testing.assert_close(composed, plan.rows(out, channels_first=True))


def test_bypass_patches_follow_the_image_through_pooling() -> None:
    """Where a pooling layer stands between, a row is centred within the window that was pooled."""
    source = nn.Conv2d(1, 1, 1, bias=False)
    target = nn.Conv2d(1, 1, 3, padding=1)
    x = torch.arange(64.0).reshape(1, 1, 8, 8)  # the value is the place
    plan = plan_rows(1, (4, 4))
    places = bypass_patches(x, source, target, (4, 4), plan)[:, 0].long()
    assert torch.equal(places // 8 // 2 * 4 + places % 8 // 2, torch.arange(16))
