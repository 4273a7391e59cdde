"""To be preloaded by a worker of Dask: it cannot open what is in the folder HIDDEN, as if it were
on a machine that does not have it."""

import os
import sys


def _refuse(event, arguments):
    if event in ("open", "os.mkdir", "os.listdir", "os.scandir") and str(arguments[0]).startswith(
        os.environ["HIDDEN"]
    ):
        raise PermissionError(13, "hidden", str(arguments[0]))


sys.addaudithook(_refuse)
