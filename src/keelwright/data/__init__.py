# SPDX-License-Identifier: Apache-2.0
"""Rows and task files: reading, checking, encoding."""
