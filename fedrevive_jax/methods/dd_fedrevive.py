"""DD-FedRevive: FedRevive with `samples=real`, the data-dependent upper reference.

Nothing is synthesised and nothing has to warm up; the comparison uses a constant beta, a higher
distillation temperature and no weight decay (arXiv 2511.00655, appendix). As in the authors' code
there is no loss guard, teachers are drawn for by the true class histograms, and the samples are
augmented as those of the clients. `revive_on` holds here too.
"""

from fedrevive_jax.methods.fedrevive import create

__all__ = ["create"]
