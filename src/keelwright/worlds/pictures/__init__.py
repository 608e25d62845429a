# SPDX-License-Identifier: Apache-2.0
"""The picture world: 8 x 8 pixel scenes beside the workshop's text, and a rule that reads both."""
