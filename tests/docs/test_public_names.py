"""The public names can be imported from `stream_mmrnn`, docs/api.md lists exactly these, and docs use no other."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

import stream_mmrnn
from stream_mmrnn.core import errors, types

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_public_name_can_be_imported() -> None:
    pytest.importorskip("nats", reason="ClusterClient needs it: pip install '.[cluster]'")
    for name in stream_mmrnn.__all__:
        assert callable(getattr(stream_mmrnn, name)), name
    assert set(stream_mmrnn.__all__) < set(dir(stream_mmrnn))


@pytest.mark.process
def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import stream_mmrnn; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    imported = set(ast.literal_eval(done.stdout))
    assert not [name for name in imported if name.startswith("stream_mmrnn.")]
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"stream_mmrnn"}


def test_types_and_errors_are_public() -> None:
    for module in (types, errors):
        classes = {n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__}
        assert classes <= set(stream_mmrnn.__all__)


def test_the_version_is_the_packages() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", stream_mmrnn.__version__)


def test_type_checkers_see_the_names_that_the_program_sees() -> None:
    """The imports for type checkers and the table of modules are two lists of the same."""
    body = ast.parse(Path(stream_mmrnn.__file__).read_text(encoding="utf-8")).body
    (block,) = [node for node in body if isinstance(node, ast.If)]
    imports = [(node.module, alias) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert all(alias.name == alias.asname for _, alias in imports)  # else it is not exported
    seen = {alias.name: module for module, alias in imports}
    assert seen == {name: f"stream_mmrnn.{module}" for name, module in stream_mmrnn._HOMES.items()}


@pytest.mark.process
@pytest.mark.parametrize(
    "imports",
    [
        "from stream_mmrnn import capture, predict",
        "import stream_mmrnn.predict.engine, stream_mmrnn.capture.pipeline; from stream_mmrnn import capture, predict",
        "from stream_mmrnn import capture, predict; import stream_mmrnn.predict.engine, stream_mmrnn.capture.pipeline",
        "from stream_mmrnn.predict import engine; import stream_mmrnn as s; predict, capture = s.predict, s.capture",
    ],
)
def test_a_function_with_the_name_of_a_package_is_found_in_any_order_of_imports(imports: str) -> None:
    code = f"""
{imports}
import inspect, sys
assert list(predict([], None, None)) == []
assert list(capture([], sys.modules["stream_mmrnn"].Stream.of("text"), "", {{}}, print)) == []
assert list(inspect.signature(predict).parameters)[:3] == ["envelopes", "aligner", "engine"]
import stream_mmrnn.predict.engine as engine
assert engine.StepEngine is __import__("stream_mmrnn").StepEngine
assert sys.modules["stream_mmrnn.predict"] is predict
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def listed() -> list[str]:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    # a function with the name of its package is named by its module, and shown by its public name
    text = re.sub(r"\.(\w+)\.pipeline\.\1\n    options: {heading: stream_mmrnn\.\1}", r".\1", text)
    return re.findall(r"^::: stream_mmrnn\.(\S+)$", text, re.M)


def test_the_reference_lists_exactly_the_public_names() -> None:
    names = listed()
    assert len(names) == len(set(names))
    assert set(names) == set(stream_mmrnn.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_import_from_the_package_alone(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"^ *(?:from|import) stream_mmrnn\.[\w.]+", text, re.M)
    for names in re.findall(r"^ *from stream_mmrnn import (.+)$", text, re.M):
        assert {name.strip() for name in names.split(",")} <= set(stream_mmrnn.__all__)
