"""Rank collapse and entropy collapse: measures, bounds, and Sinkhorn's rate.

Attention averages tokens, so with depth they approach one another (rank collapse), and
its weights may concentrate on single tokens (entropy collapse). These are pure
functions of arrays, for jit, vmap and both modes of differentiation; leading axes are
batch. They compute and return in the input's dtype, or in float32 if that is wider.
They raise TypeError for a dtype and ValueError for a shape or a name that do not fit.
"""

from ._bounds import Normaliser as Normaliser
from ._bounds import column_sum_bound as column_sum_bound
from ._bounds import dong_log_bound as dong_log_bound
from ._bounds import log_deviation as log_deviation
from ._bounds import pure_attention_log_bound as pure_attention_log_bound
from ._bounds import reported_log_bound as reported_log_bound
from ._measures import Norm as Norm
from ._measures import attention_entropy as attention_entropy
from ._measures import effective_rank as effective_rank
from ._measures import relative_residual as relative_residual
from ._measures import residual as residual
from ._measures import stable_rank as stable_rank
from ._over_depth import Measures as Measures
from ._over_depth import measures_over_depth as measures_over_depth
from ._over_depth import residual_over_depth as residual_over_depth
from ._rates import convergence_rate as convergence_rate
from ._rates import iterations_to_reduce as iterations_to_reduce
from ._rates import remaining_error as remaining_error
from ._summary import Summary as Summary
from ._summary import summarize as summarize
