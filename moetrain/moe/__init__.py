"""The MoE layer and its options. Importing the package registers every option: a new file here is a new option."""

import importlib
import pkgutil

from moetrain.moe import balance, dispatchers, gates, placement, routers

for _room in (gates, routers, balance, placement, dispatchers):
    for _module in pkgutil.iter_modules(_room.__path__):
        importlib.import_module(f"{_room.__name__}.{_module.name}")
