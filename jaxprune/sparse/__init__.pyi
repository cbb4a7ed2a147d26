"""The names of this room that are reachable as `jp.sparse`."""

from . import patterns as patterns
from . import saliency as saliency
from . import schedules as schedules
from .masks import apply_masks as apply_masks
from .masks import masks_of as masks_of
from .masks import one_shot as one_shot
from .masks import sparsity_of as sparsity_of
from .matrices import linear_maps as linear_maps
from .optimizer import sparse_optimizer as sparse_optimizer
