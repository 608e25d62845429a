# SPDX-License-Identifier: Apache-2.0
"""How do I get it back? Weight edits."""
