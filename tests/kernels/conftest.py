"""These tests run Triton's interpreter, which must be chosen before triton is imported, so in a process of their own:

TRITON_INTERPRET=1 pytest tests/kernels
"""

import os

import pytest

_HERE = os.path.dirname(__file__)


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if str(item.path).startswith(_HERE):
            item.add_marker(pytest.mark.skip(reason="needs a process of its own: TRITON_INTERPRET=1 pytest tests/kernels"))
