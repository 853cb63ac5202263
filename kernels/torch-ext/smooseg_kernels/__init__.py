"""The SmooSeg objective and related energies over all pairs of patches, exact, without the patch-by-patch matrix.

The package needs PyTorch, and Triton on a GPU. Every function checks its arguments and takes `impl`: "dense" (the
formulas as written, any dtype, the oracle), "torch" (sums over patches instead of a patch-by-patch matrix, everywhere),
"triton" (the same in fused kernels) or "auto". Letters mean the same in every docstring: B images, P patches of one
image, D feature channels, Z code channels, K prototypes, T pair sets, H heads. Mathematics: Lan et al., NeurIPS 2023,
arXiv 2310.17874.
"""

from . import layers
from .contrast import contrastive_loss
from .crf import crf_energy, dense_crf, gaussian_sums
from .dispatch import resolve_impl
from .edges import guided_filter, joint_upsample
from .energies import smooseg_loss, smoothness_energy
from .pair_energies import pair_energy
from .prototypes import assign, prototype_loss, prototype_probabilities
from .similarity import histogram_quantiles, similarity_statistics
from .types import ContrastiveTerms, PairEnergy, SimilarityStatistics, SmooSegLoss, SmoothnessLossTerms, SmoothnessTerms

__version__ = "0.1.0"

__all__ = [
    "ContrastiveTerms",
    "PairEnergy",
    "SimilarityStatistics",
    "SmooSegLoss",
    "SmoothnessLossTerms",
    "SmoothnessTerms",
    "assign",
    "contrastive_loss",
    "crf_energy",
    "dense_crf",
    "gaussian_sums",
    "guided_filter",
    "histogram_quantiles",
    "joint_upsample",
    "layers",
    "pair_energy",
    "prototype_loss",
    "prototype_probabilities",
    "resolve_impl",
    "similarity_statistics",
    "smooseg_loss",
    "smoothness_energy",
]
