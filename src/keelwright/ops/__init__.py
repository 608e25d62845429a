# SPDX-License-Identifier: Apache-2.0
"""Pure tensor and statistics functions that two or more methods share."""
