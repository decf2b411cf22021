"""Learning decisions while LoRA tunes: schedule, losses, proximal step, calibration, the learner, saved state."""
