# SPDX-License-Identifier: Apache-2.0
"""The version of keelwright, where every room can read it."""

__version__ = "0.1.0"
