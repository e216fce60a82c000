"""A package that can be called like the function that has its name.

`predict` is a room and the function that the room is for, and `stream_mmrnn` exports the function. Python sets the
attribute `stream_mmrnn.predict` to the package as soon as any module of the package is imported, so what
`from stream_mmrnn import predict` gives would depend on what was imported before. With this class it is always the
package, and calling the package calls the function. Python documents the assignment to a module's `__class__` for such
purposes ("Customizing module attribute access").
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """For the package `x.NAME`: a call goes to the function NAME of the module `x.NAME.pipeline`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def __signature__(self) -> Any:
        """What `inspect.signature` shows."""
        from inspect import signature

        return signature(self._function)

    @property
    def _function(self) -> Any:
        return getattr(import_module(f"{self.__name__}.pipeline"), self.__name__.rpartition(".")[2])
