# SPDX-License-Identifier: Apache-2.0
"""The code world: one-line functions asked for in a few words, with unit tests, and organisms that write them."""
