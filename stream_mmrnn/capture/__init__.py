"""Capture: read a device and make features of what it gives.

Sources open devices, encoders turn samples into feature vectors, and the generator `capture` joins the two.
"""

import sys

from stream_mmrnn.core.callable_package import CallablePackage

sys.modules[__name__].__class__ = CallablePackage  # `capture(...)` works: see core.callable_package
