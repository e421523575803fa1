"""Which settings of a stage decide the weights that it ends with."""

from __future__ import annotations

OTHER_PREFIXES = ("logging_", "log_level", "save_", "eval_", "hub_", "per_device_eval_", "trackio_", "do_")
OTHERS = (
    "batch_eval_metrics",
    "channels_last",
    "dataloader_multiprocessing_context",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_timeout",
    "disable_tqdm",
    "enable_jit_checkpoint",
    "include_for_metrics",
    "log_on_each_node",
    "output_dir",
    "prediction_loss_only",
    "project",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "skip_memory_metrics",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
)


CHOOSING = ("eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps")


def decides_weights(name: str, chooses: bool = False) -> bool:
    """Whether a training argument says more than where things lie, how fast, and what is logged, saved or measured.

    Args:
        name: of the argument.
        chooses: the best of the saved weights is taken at the end, so it matters when they are measured and saved.
    """
    return (chooses and name in CHOOSING) or not (name.startswith(OTHER_PREFIXES) or name in OTHERS)
