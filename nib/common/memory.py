"""Report running out of memory as one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nib.common.exits import RunError


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn out-of-memory errors of the body, on the host or a device, into a RunError that ends in `advice`."""
    try:
        yield
    except MemoryError:
        raise RunError(f"there is not enough memory. {advice}") from None
    except RuntimeError as error:
        from nib.common.device import is_out_of_memory  # imports torch, which prepare_data.py does without

        too_many_bytes = "Storage size calculation overflowed" in str(error)  # torch's message beyond 64 bits
        if not too_many_bytes and not is_out_of_memory(error):
            raise
        raise RunError(f"there is not enough memory. {advice}") from None
