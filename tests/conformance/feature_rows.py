"""Rows of the table that other tests of the suite prove: runs, processes, compilation, odd layers."""

from __future__ import annotations

from features import Feature

__all__ = ["MODELS", "PROCESSES", "RUNS"]

_SURVIVAL = "conformance/test_survival.py::"
_LOOPS = "conformance/test_loops.py::"
_DISTRIBUTED = "conformance/test_distributed.py::"
_SHARDED = "conformance/test_sharded.py::"
_COMPILE = "conformance/test_compile.py::"
_LAYERS = "conformance/test_layers.py::"
_ROW = _LAYERS + "test_a_layer_grows_and_resumes_or_is_left_alone_with_the_reason"
_PRETRAINED = "conformance/test_pretrained.py::"
_REFUSED_STRATEGY = _DISTRIBUTED + "test_what_does_not_go_together_is_refused_with_the_way_out"

RUNS = (
    Feature(
        "resume, in the middle of an epoch and of a seed's life",
        "works",
        "bit for bit, with the same decisions",
        "callbacks/test_resume.py::test_isolated_growth_resumes_with_seeds_in_training_and_blending",
    ),
    Feature(
        "SIGKILL at any moment, also within a write or a growth",
        "works",
        "restarted, the run ends as if nothing had happened; no file is half-written, the journal tells nothing twice",
        _SURVIVAL + "test_a_killed_run_ends_as_if_nothing_had_happened",
    ),
    Feature(
        "Ctrl-C",
        "works",
        "waits until a change of structure is whole; continues",
        _SURVIVAL + "test_ctrl_c_in_a_script_leaves_a_run_that_continues",
    ),
    Feature(
        "an exception in the host's step",
        "works",
        "no hook, socket or file is left behind",
        "callbacks/test_shutdown.py::test_an_error_inside_a_step_leaves_nothing_behind",
    ),
    Feature(
        "`load_from_checkpoint`",
        "works",
        "with `esper.GrowableMixin`, hyperparameters and state of the module's own included",
        _LOOPS + "test_a_grown_module_with_things_of_its_own_loads_by_its_class",
    ),
    Feature(
        '`test("best")`, an older and smaller checkpoint',
        "works",
        "seeds come and go with the file",
        "callbacks/test_resume.py::test_an_older_smaller_checkpoint_loads_into_the_grown_model_and_the_best_one_is_tested",
    ),
    Feature(
        "a second `fit()`, more epochs, another trainer",
        "works",
        "goes on with the grown model",
        "callbacks/test_resume.py::test_a_second_fit_goes_on_with_the_grown_model",
    ),
    Feature(
        "notebooks: a cell run again, interrupted, in a running event loop",
        "works",
        "a new model begins anew, the old one goes on",
        _LOOPS + "test_an_interrupted_cell_runs_again_within_a_running_event_loop",
    ),
    Feature(
        "loaders: several, combined, iterable, reloaded, stateful; `limit_*_batches`, `overfit_batches`",
        "works",
        "growth looks at held-out batches without moving any generator",
        _LOOPS + "test_a_run_grows_whatever_its_loaders_are",
    ),
    Feature(
        "a run of unknown length (`max_time`, `max_epochs=-1`)",
        "works",
        "with `horizon_steps`; refused without it",
        "callbacks/test_trainers.py::test_a_run_of_unknown_length_needs_a_horizon",
    ),
    Feature(
        "loaders that lose their place in mid-epoch",
        "warned of",
        "resumed in the middle of an epoch they give other batches",
        _LOOPS + "test_checkpoints_that_would_lose_their_place_are_told_of_before_training",
    ),
    Feature(
        "`DataLoader` workers by fork, spawn, forkserver; persistent ones",
        "works",
        "beside the open bus",
        _LOOPS + "test_workers_that_stay_serve_training_beside_the_open_bus",
    ),
    Feature(
        "`fast_dev_run`",
        "works",
        "writes nothing",
        "callbacks/test_trainers.py::test_a_fast_dev_run_writes_nothing",
    ),
)

PROCESSES = (
    Feature(
        "DDP (tried with two gloo processes), `find_unused_parameters`, accumulation",
        "works",
        "rank 0 decides on all ranks' measurements; parameters are bit for bit alike",
        _DISTRIBUTED + "test_ranks_are_bit_for_bit_alike_after_growth",
    ),
    Feature(
        "resume under DDP",
        "works",
        "bit for bit",
        _DISTRIBUTED + "test_a_run_of_two_processes_resumes_bit_for_bit",
    ),
    Feature(
        "one rank that fails",
        "works",
        "ends all with its reason",
        _DISTRIBUTED + "test_a_step_that_fails_on_one_rank_ends_all_with_its_reason",
    ),
    Feature(
        "`ddp_spawn`, `ddp_fork`, `ddp_notebook`",
        "works",
        "with `esper.GrowableMixin`; refused without it, because the weights come back without seeds (fork in the "
        "tests, spawn tried once by hand)",
        _DISTRIBUTED + "test_forked_processes_need_a_module_that_takes_its_seeds_back",
    ),
    Feature(
        "`policy='off'` under DDP",
        "works",
        "watches on rank 0, without a collective of its own",
        _DISTRIBUTED + "test_watching_has_no_collective_of_its_own_and_growth_none_at_ordinary_steps",
    ),
    Feature(
        "`ModelParallelStrategy` with FSDP2's `fully_shard` (tried with two gloo processes)",
        "works",
        'with `sharded="experimental"`, else refused: each seed is sharded by itself; the run is the one under DDP '
        "within 1e-6; no health signals, policies `schedule`, `random`, `uniform`, AdamW, full precision",
        _SHARDED + "test_the_run_is_the_one_under_ddp",
    ),
    Feature(
        "resume under FSDP2",
        "works",
        "bit for bit, from full checkpoints (`save_distributed_checkpoint=False`), which load unsharded too",
        _SHARDED + "test_a_run_resumes_bit_for_bit_also_between_a_birth_and_its_first_step",
    ),
    Feature(
        "FSDP1, DeepSpeed, tensor parallelism",
        "refused",
        "parameters are taken over or divided otherwise at the start (not run); use DDP or one device",
        _REFUSED_STRATEGY,
    ),
    Feature(
        "XLA and other strategies", "refused", "nobody has tried; `policy='off'` watches", _REFUSED_STRATEGY
    ),
    Feature(
        "DDP's `ddp_comm_state` (PowerSGD, PostLocalSGD)",
        "refused",
        "its hook remembers DDP's buckets; leave it out",
        _REFUSED_STRATEGY,
    ),
)

MODELS = (
    Feature(
        "`torch.compile` of module, children or blocks, before or after",
        "works",
        "as uncompiled, bit for bit; no graph more while nothing grows; recompilations counted, dynamo's limit kept "
        "clear of",
        _COMPILE + "test_growth_in_a_compiled_run_is_growth_in_a_plain_one_bit_for_bit",
    ),
    Feature(
        "resume of a compiled run, its checkpoint in a plain model",
        "works",
        "and the other way round",
        _COMPILE + "test_a_compiled_checkpoint_loads_into_a_plain_model_and_the_other_way_round",
    ),
    Feature(
        "gradient checkpointing, reentrant or not; transformers' own",
        "works",
        "as without; no bypass across what is recomputed apart",
        _LAYERS + "test_gradient_checkpointing_changes_nothing_in_a_growing_run",
    ),
    Feature(
        "`torch.inference_mode`, torch's fused transformer layers",
        "works",
        "validation sees every seed",
        _LAYERS + "test_validation_under_inference_mode_leaves_the_run_as_it_is",
    ),
    Feature(
        "`torch.func`: functional_call, grad, vmap",
        "works",
        "gradients a sample are those of single samples; torch refuses `jvp` until a seed is part of the host",
        _LAYERS + "test_gradients_a_sample_by_vmap_are_those_of_single_samples",
    ),
    Feature("frozen backbones", "works", "seeds are the trainable part; the rest keeps its bits", _ROW),
    Feature("tied weights, lazy layers, BatchNorm, dropout, bf16-true", "works", "grow and resume", _ROW),
    Feature(
        "measurements on a BatchNorm model",
        "works",
        "move neither running statistics nor dropout's generator",
        _LAYERS + "test_measurements_move_neither_running_statistics_nor_dropout",
    ),
    Feature(
        "modules used twice, weight and spectral norm, quantised weights, PEFT's layers, layers with a forward of "
        "their own",
        "works",
        "left alone with the reason; what is around them grows",
        _ROW,
    ),
    Feature(
        "a grown transformers model as a larger one of its class",
        "works",
        "`save_pretrained`, `from_pretrained` without esper, equal within 1e-5, generates alike",
        _PRETRAINED + "test_without_esper_it_loads_and_says_the_same",
    ),
    Feature(
        "`bottleneck`, `attention`, `norm`, `shortcut` in such an export; blocks widened unequally",
        "refused",
        "before anything is written; `esper.export` keeps them, `fill=True` fills up",
        _PRETRAINED + "test_what_is_none_of_its_kind_is_refused_with_the_seeds_in_the_way",
    ),
    Feature(
        "seeds as adapters of a frozen encoder",
        "works",
        "merged on export",
        "conformance/test_finetune.py::test_adapters_are_merged_on_export",
    ),
)
