"""The names of this room that are reachable as `jp.sparse`."""

from . import patterns as patterns
from . import schedules as schedules
from .masks import WeightFisher as WeightFisher
from .masks import WeightMagnitude as WeightMagnitude
from .masks import WeightMovement as WeightMovement
from .masks import apply_masks as apply_masks
from .masks import masks_of as masks_of
from .masks import one_shot as one_shot
from .masks import sparse_optimizer as sparse_optimizer
from .masks import sparsity_of as sparsity_of
from .patterns import linear_maps as linear_maps
