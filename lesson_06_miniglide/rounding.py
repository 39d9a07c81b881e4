"""What half the digits cost: the same training steps in fp32 and in bf16, side by side."""

from dataclasses import replace

from lesson_06_miniglide.contenders import contender, training_step

STEPS = 50


def losses(name, config):
    """Of STEPS training steps on one batch."""
    step = training_step(contender(name, config), config)
    return [step()["loss"] for _ in range(STEPS)]


def compare_losses(config):
    """A row a network: how far apart the losses are."""
    rows = []
    for name in config.networks:
        fp32, bf16 = (losses(name, replace(config, fp32=fp32)) for fp32 in (True, False))
        rows.append(
            {
                "network": name,
                "batch": config.batch_size,
                "first_loss": fp32[0],
                "last_loss_fp32": fp32[-1],
                "last_loss_bf16": bf16[-1],
                "furthest_apart": max(abs(a - b) / a for a, b in zip(fp32, bf16)),
            }
        )
    return rows
