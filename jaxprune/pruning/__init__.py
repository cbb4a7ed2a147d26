"""The units that stay, and the repair of what is left: budgets, selection, rounds, recovery, checks, the record."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, ["budgets", "pooling", "recoveries"])
