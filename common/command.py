"""From a dataclass to a command: parse the flags, run, and answer bad input in one line."""

import sys
from dataclasses import fields, replace

import torch
import tyro

from common.memory import keep_freed_memory


class UserError(Exception):
    """Something the person at the keyboard can put right. Its text says what is wrong and what to do."""


def run_command(main, config_type, saved_config=None, argv=None):
    """Parse `argv` into `config_type` and call `main(config)`. A UserError ends in one line and exit code 2.

    saved_config: (resume, config_type) -> config. With `--resume`, flags that are not given keep the values
    it returns.
    """
    keep_freed_memory()
    try:
        config = tyro.cli(config_type, args=argv)
        if saved_config and config.resume:
            saved = saved_config(config.resume, config_type)
            config = replace(tyro.cli(config_type, args=argv, default=saved), **lists_given(config))
        check_flags(config)
        main(config)
    except UserError as error:
        refuse(error)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". GPU")[0]
        refuse(f"{reason}; try {what_takes_less_memory(config)}")
    except KeyboardInterrupt:
        sys.exit(130)


def lists_given(config):
    """Of the flags that may be given several times what was given: tyro appends it to the default."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {k: v for k, v in values.items() if isinstance(v, tuple) and v != getattr(type(config), k)}


def refuse(error):
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def what_takes_less_memory(config):
    ways = {"batch_size": "a smaller --batch-size", "activation_checkpointing": "--activation-checkpointing"}
    return " or ".join(way for name, way in ways.items() if hasattr(config, name)) or "--device cpu"


# Flags that count something, or measure a time or a rate; None stands for "not given".
POSITIVE = {"steps", "time_limit", "batch_size", "learning_rate", "num_samples", "checkpoint_every"}
POSITIVE |= {"sample_steps", "eval_steps", "num_eval", "times", "rounds"}
POSITIVE |= {"image_limit", "epochs", "grad_accum", "checkpoint_time", "sample_every", "timesteps"}
POSITIVE |= {"num_channels", "num_head_channels", "num_res_block", "xf_width", "xf_layers", "xf_heads"}
SHARES = {"drop_caption", "ema_decay", "validation_fraction"}


def check_flags(config):
    """Refuse, before anything is done, what can be seen to be wrong. Raises UserError."""
    pick_device(getattr(config, "device", "auto"))
    if getattr(config, "resume", None) and getattr(config, "dry_run", False):
        raise UserError("--dry-run beside --resume would end the run after two steps; leave one of them out")
    for field in fields(config):
        value = getattr(config, field.name)
        flag = as_flag(field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if field.name in POSITIVE and number is not None and not 0 < number < float("inf"):
                bound = "finite" if number > 0 else "greater than zero"
                raise UserError(f"{flag} is {number}; it must be {bound}")
        if value == "":
            raise UserError(f"{flag} is empty; leave it out, or name something")
        if field.name in ("sample_steps", "eval_steps") and value > 1000:
            raise UserError(f"{flag} is {value}; there are 1000 timesteps")
        if field.name == "num_eval" and value < 2:
            raise UserError(f"{flag} is {value}; of fewer than 2 samples there is no spread to measure")
        if field.name == "seed" and not 0 <= value < 2**31:
            raise UserError(f"{flag} is {value}; it must lie between 0 and 2147483647")
        if field.name in SHARES and not 0 <= value <= 1:
            raise UserError(f"{flag} is {value}; it must lie between 0 and 1")
        if field.name == "guidance_scale" and value is not None and not 0 <= value < float("inf"):
            raise UserError(f"{flag} is {value}; it must be 0 (no caption), 1 (plain caption) or greater")


def as_flag(name):
    """A configuration's field as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def check_choice(flag, value, known):
    if value not in known:
        raise UserError(f"{flag} {value} is unknown; choose {', '.join(map(str, known))}")


def pick_device(name="auto"):
    """The device called `name`; `auto` is the GPU where there is one. Raises UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); try --device cpu") from None


def is_fast_at_bf16(device):
    """NVIDIA since Ampere; CPUs with AVX512-BF16 or AMX. Others compute in it a hundred times slower."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (cpu_has("avx512_bf16") or cpu_has("amx_tile"))


def cpu_has(instructions):
    """As far as PyTorch says: the question is private there, so perhaps absent."""
    return getattr(torch.cpu, f"_is_{instructions}_supported", bool)()


def autocast(device):
    """bf16 where the hardware is fast at it, else fp32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=is_fast_at_bf16(device))
