"""What the rest of the package knows of a method before it is built.

A new method is a file in `methods/`, its line here, its preset and its page in the docs. Nothing
else asks for a method by its name.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Traits(NamedTuple):
    """What is known of a method.

    Attributes:
      published: whether it is one of the comparison of arXiv 2511.00655.
      cohort: whether it is synchronous: K clients start together and all are waited for, B = K.
      distils: whether it distils teachers into the global model.
      step_field: the field that names the method whose server step it takes; empty: its own.
      fixed: fields that it does not leave open: field -> (its only value, why).
    """

    published: bool = False
    cohort: bool = False
    distils: bool = False
    step_field: str = ""
    fixed: Mapping[str, tuple[str, str]] = MappingProxyType({})


METHODS = {
    "fedavg": Traits(published=True, cohort=True),
    "fedbuff": Traits(published=True),
    "afl_dw": Traits(published=True, fixed={"staleness_weight": ("none", "it weighs by beta")}),
    "fedrevive": Traits(published=True, distils=True, step_field="revive_on"),
    "dd_fedrevive": Traits(
        published=True,
        distils=True,
        step_field="revive_on",
        fixed={"samples": ("real", "it is the data-dependent reference")},
    ),
    "fedasync": Traits(),
    "ca2fl": Traits(),
    "fadas": Traits(fixed={"server_optimizer": ("sgd", "it is an optimiser of its own")}),
    "fedstale": Traits(),
    "ace": Traits(),
    "fedfa": Traits(fixed={"staleness_weight": ("none", "it averages whole models")}),
    "fedgen": Traits(step_field="fedgen_on"),
}
PUBLISHED_METHODS = tuple(name for name, traits in METHODS.items() if traits.published)
