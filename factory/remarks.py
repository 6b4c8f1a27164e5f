"""Remarks of libraries that read like errors and say nothing to a user; they are kept off the screen one by one.

Whatever else these libraries say is said: only messages that begin as written here are dropped.
"""

from __future__ import annotations

import logging

# Logger and how the message begins.
_REMARKS = {
    # A kernel for 4-bit products on some CPUs, from the hub; bitsandbytes' own is used without it.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    # Said at every product of an 8-bit layer: that is how 8 bits are computed, and --precision asked for them.
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast from",
    # The type of the dequantised base, which is the one that was asked for.
    "transformers.integrations.bitsandbytes": "The modules are dequantized in",
}


class _Without(logging.Filter):
    """Drops the messages that begin in one way."""

    def __init__(self, beginning: str):
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)


_FILTERS = {logger: _Without(beginning) for logger, beginning in _REMARKS.items()}


def hush_remarks() -> None:
    """Drop these remarks from now on: before bitsandbytes is imported, for one is made then."""
    for logger, without in _FILTERS.items():
        logging.getLogger(logger).addFilter(without)  # the same one twice is one
