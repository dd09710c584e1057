"""Checks for the assignments: each says what is wrong with an answer, and shows where.

Write the function that a question asks for, and pass it to the check:

>>> from flatmin.book import check
>>> def lucky(n, M):
...     return M * 2**-n
>>> _ = check.lucky(lucky)  # doctest: +ELLIPSIS
✗ check.lucky
  ✗ a few networks, a few examples
...

A check calls the function with its own inputs.  It survives errors, endless loops (there is a time
limit) and functions that change their inputs, and reports them.  See the book's page on
assignments.
"""

# ruff: noqa: F401 - __all__ is computed
from .flooding import accumulate, flooded, flooded_step, flooding_effect, fraction_up
from .generalization import lucky, margins, memorization, paired_interval, stopped_early
from .grading import Check, Report
from .mixup import dirichlet_mixup, expected_mixing, mixed_loss, mixup_effect, shrunk
from .penalty import difference_penalty, effective_objective, level_walk, remainder, two_rate_loss
from .sam import adaptive_climb, climb, sam_effect, sam_step, sharpest_stable
from .sharpness import hutchinson, lanczos, m_sharpness, probe_variance, sharpness_effect
from .stiffness import class_means, cosines, one_answer_cosine, sequence_gram, stiffness_effect

__all__ = [
    "Check",
    "Report",
    *(name for name, v in list(globals().items()) if isinstance(v, Check)),
]
