"""The short form of `python -m tests.soak_arrivals`."""

import pytest

from tests.soak_arrivals import check, soak


@pytest.mark.slow
def test_nothing_wears_out(tmp_path):
    """Memory by the line through readings of 2,000 arrivals; the long form looks at 18,000."""
    check(soak("fedbuff", arrivals=3000, warm_up=1000, folder=tmp_path))
