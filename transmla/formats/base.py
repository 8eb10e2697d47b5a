"""The contract of an export format."""

from __future__ import annotations

NATIVE, OWN = "native", "transmla"
