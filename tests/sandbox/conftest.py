"""A sandbox of either kind of box; a kind that this machine has not is skipped."""

import pytest

from trl_prime.sandbox import LocalSandbox, SandboxUnavailable, boxes

from .helpers import BOXES


@pytest.fixture(scope="module", params=BOXES)
def box(request):
    if request.param == "bubblewrap" and boxes.find_bubblewrap() is None:
        pytest.skip("bubblewrap is not installed")
    return request.param


@pytest.fixture(scope="module")
def sandbox(box):
    try:
        made = LocalSandbox(box)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield made
    made.close()
