# SPDX-License-Identifier: Apache-2.0
"""The closed loop over measure and repair."""
