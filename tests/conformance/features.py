"""Callbacks, optimizers and loops beside growth: what works, what is refused, and the test that says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

__all__ = ["FEATURES", "Feature", "markdown"]


class Feature(NamedTuple):
    """One row of the table; plain text and markdown.

    Attributes:
        feature: What a user has in the trainer or module.
        outcome: Whether growth goes together with it. ``refused`` is said before training starts.
        how: What was looked at, or the way out.
        test: File below ``tests`` and function.
    """

    feature: str
    outcome: Literal["works", "refused", "warned of"]
    how: str
    test: str


_CALLBACKS = "conformance/test_callbacks.py::test_a_callback_works_beside_growth"
_AVERAGES = "callbacks/test_averaging.py::"
_TRAINERS = "callbacks/test_trainers.py::"
_OPTIMIZERS = "conformance/test_optimizers.py::"
_HERE = "conformance/test_callbacks.py::"

FEATURES = (
    Feature(
        "`EMAWeightAveraging`, `WeightAveraging`",
        "works",
        "the copy grows and is culled along, by name, before or behind ours in the list; validation and checkpoints "
        "have the grown average; resumes bit for bit; begins again after a rollback",
        _AVERAGES + "test_each_average_belongs_to_its_own_tensor",
    ),
    Feature(
        "`StochasticWeightAveraging`",
        "works",
        "the same; a seed counts from its first value; BatchNorm renewed",
        _AVERAGES + "test_a_stochastic_average_counts_a_seed_from_its_first_value",
    ),
    Feature(
        "an `AveragedModel` inside the module",
        "refused",
        "pairs by position; use Lightning's averaging callbacks",
        _AVERAGES + "test_an_average_inside_the_module_is_refused_before_training",
    ),
    Feature(
        "`ModelSummary`, `RichModelSummary`",
        "works",
        "a small table after each growth or cull: seed, place, parameters before and after, trainable ones",
        _HERE + "test_each_change_of_structure_is_told_beside_a_model_summary",
    ),
    Feature(
        "`LearningRateFinder`, `BatchSizeFinder`",
        "works",
        "the run is bit for bit the one without the finder's trial; also between two growths",
        _HERE + "test_a_finders_trial_leaves_no_trace_in_a_growing_run",
    ),
    Feature(
        "resuming with a finder",
        "refused",
        "Lightning would begin at step 0; remove the finder",
        _HERE + "test_resuming_with_a_finder_is_refused",
    ),
    Feature(
        "`ModelPruning`",
        "refused",
        "its masks are in no rollback, copy or checkpoint; prune the exported network",
        _HERE + "test_pruning_is_refused_before_training",
    ),
    Feature(
        "`BackboneFinetuning`, `BaseFinetuning`",
        "works",
        "seeds of a frozen backbone train, later ones join the unfrozen group; resumes, in either order of the list",
        _HERE + "test_a_backbone_grows_while_frozen_and_after_and_resumes",
    ),
    Feature(
        "`GradientAccumulationScheduler`",
        "works",
        "growth is planned over the steps that each epoch really takes",
        _CALLBACKS,
    ),
    Feature("`EarlyStopping`, `Timer`, `LambdaCallback`", "works", "grows until the stop", _CALLBACKS),
    Feature(
        "`ModelCheckpoint` (`save_top_k`, `every_n_train_steps`, `monitor`)",
        "works",
        "every kept file loads with its own structure",
        _CALLBACKS,
    ),
    Feature(
        "`OnExceptionCheckpoint`",
        "works",
        "goes on bit for bit after an exception between steps",
        _HERE + "test_a_run_goes_on_from_the_checkpoint_of_an_exception",
    ),
    Feature("`LearningRateMonitor`", "works", "names and values of all series as without growth", _CALLBACKS),
    Feature(
        "`ThroughputMonitor`, `DeviceStatsMonitor`, progress bars", "works", "report as usual", _CALLBACKS
    ),
    Feature(
        "every scheduler of `torch.optim.lr_scheduler`, `SWALR`",
        "works",
        "rates of all groups equal those of the run without growth; resumes",
        _OPTIMIZERS + "test_a_schedule_goes_on_as_without_growth",
    ),
    Feature(
        "named parameter groups, decay and no-decay",
        "works",
        "`param_names` follow, resumed too",
        _OPTIMIZERS + "test_a_schedule_goes_on_as_without_growth",
    ),
    Feature(
        "optimizers of torch: AdamW to Muon, fused, foreach, amsgrad",
        "works",
        "updates of the host stay bit-identical",
        "kasmina/test_optimizer.py::test_growth_and_removal_leave_host_updates_bit_identical",
    ),
    Feature(
        "LBFGS, SparseAdam, sharded optimizers",
        "refused",
        "cannot take new parameters; each with what to use",
        "kasmina/test_optimizer.py::test_optimizers_that_cannot_grow_are_refused",
    ),
    Feature(
        "manual optimization, several optimizers",
        "works",
        "each seed in its layer's optimizer; needs a `validation_step` that returns the loss",
        _TRAINERS + "test_manual_optimization_with_two_optimizers_grows_at_whole_batches",
    ),
    Feature(
        "networks that are toggled (GANs)",
        "works",
        "`requires_grad` of seeds follows; no seed between the two networks; what the first loss does not reach is "
        "left alone",
        _OPTIMIZERS + "test_toggled_networks_grow_each_in_its_own_optimizer",
    ),
    Feature(
        "isolated seeds (`lifecycle.mode`) under manual optimization",
        "warned of",
        "`self.clip_gradients` by norm counts them; clip by value",
        _OPTIMIZERS + "test_isolated_seeds_under_manual_optimization_come_with_a_warning",
    ),
    Feature(
        "`accumulate_grad_batches`, clipping by norm and value",
        "works",
        "grows at the boundaries only; an isolated seed does not count in the clipping",
        _TRAINERS + "test_accumulated_batches_grow_at_their_boundaries_only",
    ),
    Feature(
        "precision bf16-mixed, bf16-true",
        "works",
        "seeds take the host's dtype",
        _TRAINERS + "test_reduced_precision",
    ),
    Feature(
        "precision 16-mixed (tried on the CPU)",
        "works",
        "a young seed's overflow makes the scaler skip no step of the host",
        _OPTIMIZERS + "test_a_young_seed_does_not_make_the_scaler_skip_the_hosts_step",
    ),
)


def markdown(rows: Sequence[Feature] = FEATURES) -> str:
    """The rows as a markdown table."""
    lines = ["| beside growth | | how |", "|---|---|---|"]
    return "\n".join(lines + [f"| {row.feature} | {row.outcome} | {row.how} |" for row in rows])
