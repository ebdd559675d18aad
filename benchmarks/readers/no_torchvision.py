"""A stand-in for torchvision: its wheel on PyPI is built for CUDA and does not load beside a CPU build of torch."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType

NAMES = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")


class _Empty:
    """Loads modules in which every name is a class that nobody makes an object of."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make a module."""
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Give it any name that is asked for."""
        module.__getattr__ = lambda name: _missing(name) if name.startswith("__") else object  # type: ignore[method-assign]


def _missing(name: str) -> type:
    raise AttributeError(name)


def stand_in() -> None:
    """Put empty modules in the place of torchvision, where torch is a CPU build."""
    import torch

    if torch.version.cuda is None:
        for name in NAMES:
            spec = ModuleSpec(name, _Empty(), is_package=True)  # type: ignore[arg-type]
            sys.modules[name] = module_from_spec(spec)
            _Empty().exec_module(sys.modules[name])
