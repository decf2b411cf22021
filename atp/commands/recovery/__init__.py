"""The parts of `atp recover`."""
