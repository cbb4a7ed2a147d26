"""Makes a multi-task language model small for one task: score its units, select, compact; no training.

```
load -> score -> select -> compact -> recover -> save
```

`prune` does all of it but loading and saving. The public names are listed in `__init__.pyi`, and each is imported on
first use, so `import jaxprune` itself costs nothing.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
