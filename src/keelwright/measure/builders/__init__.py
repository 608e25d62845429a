# SPDX-License-Identifier: Apache-2.0
"""Builders: how the sets of a part become the items that are asked."""
