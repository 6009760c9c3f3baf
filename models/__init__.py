"""`import models` in a checkout: acmix.models itself, every file of it included, under a shorter name."""

import sys
from importlib import import_module
from pkgutil import iter_modules

from acmix import models

for _file in iter_modules(models.__path__):
    sys.modules[f"{__name__}.{_file.name}"] = import_module(f"{models.__name__}.{_file.name}")
sys.modules[__name__] = models
