# SPDX-License-Identifier: Apache-2.0
"""The out-of-core weight engine and live trials."""
