from __future__ import annotations

import pytest

from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.extras import missing, need


def test_missing_packages_are_named_with_the_install_command() -> None:
    need("this", "train", "numpy", "json.decoder")
    assert missing(["numpy", "no_such_package", "no_such_parent.child"]) == ["no_such_package", "no_such_parent.child"]
    with pytest.raises(UsageError) as e:
        need("XDF", "lsl", "numpy", "no_such_package")
    assert str(e.value) == "XDF needs the extra `lsl` (no_such_package missing): pip install 'stream-mmrnn[lsl]'"
