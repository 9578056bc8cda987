"""What results were obtained with: versions and machine."""

import importlib.metadata
import os
import platform
from pathlib import Path

from conformance.version import DISTRIBUTION, suite_version

PACKAGES = ("torch", "lightning", "bitsandbytes", "grokadamw")


def environment() -> dict[str, str]:
    """Return versions and machine as text, for reports."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "gpu": gpu,
        DISTRIBUTION: suite_version(),
        **{name: package_version(name) for name in PACKAGES},
    }


def package_version(name: str) -> str:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Return the processor's name, as precisely as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
