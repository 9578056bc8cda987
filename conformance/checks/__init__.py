"""The rules: plain functions on tensors, modules and optimizers, one file per chapter, without pytest.

Each raises :class:`conformance.errors.Violation`, an AssertionError that says what was expected and what was seen,
so you can call them in your own tests.
"""

from conformance.checks.accumulation import gradients_agree
from conformance.checks.causality import looks_back_only
from conformance.checks.decay import decay_groups_cover
from conformance.checks.embedding import embedding_swap_lossless
from conformance.checks.initialization import initialised
from conformance.checks.optimizer import accepts_only_supported_keywords
from conformance.checks.precision import loss_in_float32

__all__ = [
    "accepts_only_supported_keywords",
    "decay_groups_cover",
    "embedding_swap_lossless",
    "gradients_agree",
    "initialised",
    "looks_back_only",
    "loss_in_float32",
]
