"""The number format of a run: fp32, or bf16 or fp16 where the device is fast at it and nothing rules it out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

if TYPE_CHECKING:
    from nc_hf.training_args import NCTrainingArguments

Precision = Literal["auto", "fp32", "bf16", "fp16"]
HALVES = ("bf16", "fp16")


def check_precision(args: NCTrainingArguments) -> None:
    """Refuse a precision that `bf16` or `fp16` contradict where they are not None.

    Raises:
        ValueError: naming the settings and their values.
    """
    if args.bf16 and args.fp16:
        raise ValueError("`bf16` and `fp16` are both True, and a run has one precision. Set one of them.")
    for name in HALVES:
        given = getattr(args, name)
        if given is not None and args.precision != "auto" and given != (args.precision == name):
            raise ValueError(
                f"`precision: {args.precision}` and `{name}: {given}` contradict each other. Set precision alone, and "
                f"leave {name} out; in a copy of other arguments, where both have a value, set both."
            )


def allow_precision(args: NCTrainingArguments) -> None:
    """Let a trainer have another precision than the one before it, which `accelerate` keeps for the whole process."""
    kept = AcceleratorState._shared_state.get("_mixed_precision")
    if kept is not None and kept != args.mixed_precision:
        AcceleratorState._reset_state()


def choose_precision(args: NCTrainingArguments, launched: str) -> str:
    """The precision of a run: what the arguments say, else what `accelerate launch` says, else the fastest one.

    Args:
        args: checked by `check_precision`, on a device that is known.
        launched: of `accelerate launch --mixed_precision`; "no" where it says nothing.
    """
    if args.precision != "auto":
        return args.precision
    if args.bf16 or args.fp16:
        return "bf16" if args.bf16 else "fp16"
    ruled_out = [name for name in HALVES if getattr(args, name) is not None]
    choices = [] if launched == "no" else [launched]
    return next(name for name in (*choices, *_fast(args.device), "fp32") if name not in ruled_out)


def precision_to_measure(name: str) -> str:
    """The precision of a saved run where this device has instructions for it, else the fastest one.

    A CPU without bf16 takes seven times as long for it as for fp32.

    Args:
        name: of a recipe.
    """
    return name if name not in HALVES or name in _fast(PartialState().device) else "auto"


def _fast(device: torch.device) -> tuple[str, ...]:
    """What the device has instructions for, the best first."""
    if device.type == "cuda":
        return HALVES if torch.cuda.is_bf16_supported(including_emulation=False) else ("fp16",)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return ()
    capabilities = torch.cpu.get_capabilities()
    return ("bf16",) if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else ()
