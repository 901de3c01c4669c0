"""Versions and device of the machine that computes a run."""

import platform

import torch

from maepretrain.runs.status import versions


def environment() -> dict[str, str]:
    """Versions of Python, the packages and the system, and the device."""
    values = {"python": platform.python_version()} | versions() | {"system": platform.platform()}
    if torch.cuda.is_available():
        values["device"] = torch.cuda.get_device_name()
        values["CUDA"] = str(torch.version.cuda)
    return values
