"""Build, the loop, optimizers, schedules, checkpoints."""
