"""Labels that follow the picture: mean-field inference of a fully connected CRF, and the Gaussian sums under it."""

from .energy import crf_energy
from .gaussian import gaussian_sums
from .mean_field import dense_crf
from .native import lattice_form

__all__ = ["crf_energy", "dense_crf", "gaussian_sums", "lattice_form"]
