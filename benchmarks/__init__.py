# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: time and memory, compared by ratio within one run."""
