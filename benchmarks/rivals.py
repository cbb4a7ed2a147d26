"""Other methods that prune without training, to be compared with in the same harness.

Each is a re-implementation from a description, on this library's own pieces: the rows it is given, the FLOPs that
`select` counts, and small parameters as the result. None was checked against its authors' code.
"""

from flap import Fluctuation, standardised
from k_prune import k_prune
from kwon import kwon

__all__ = ["Fluctuation", "k_prune", "kwon", "standardised"]
