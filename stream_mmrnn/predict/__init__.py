"""Predict: align feature vectors into ticks, and step the model with them.

The generator `predict` turns messages into predictions; `StepEngine` holds the sessions' state.
"""

import sys

from stream_mmrnn.core.callable_package import CallablePackage

sys.modules[__name__].__class__ = CallablePackage  # `predict(...)` works: see core.callable_package
