"""Triton kernels and their launches; importing this needs the package triton. Definitions: the modules of `atp.ops`."""
