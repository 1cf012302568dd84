"""One table from codes to exceptions, and it is complete."""

from __future__ import annotations

import pytest

from qpostcopy.core import CoreSystemError, uffd_wake
from qpostcopy.core.calls import ERRORS, CoreError, lib


def test_every_code_but_ok_has_its_exception() -> None:
    assert set(ERRORS) == set(range(lib.QPC_OK + 1, lib.QPC_CODES))
    assert len(set(ERRORS.values())) == len(ERRORS)
    assert all(issubclass(error, CoreError) for error in ERRORS.values())


def test_an_error_tells_call_address_and_errno() -> None:
    with pytest.raises(CoreSystemError) as caught:
        uffd_wake(-1, 0x1000, 0x2000)
    assert str(caught.value) == "UFFDIO_WAKE: at 0x1000, length 8192: Bad file descriptor"
    assert caught.value.error_number == 9
