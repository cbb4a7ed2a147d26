"""The worth of each unit for a task: objectives, criteria, the run over a data set, score files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, ["criteria", "objectives"])
