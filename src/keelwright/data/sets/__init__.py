# SPDX-License-Identifier: Apache-2.0
"""Published data sets: what each is, where its files are, and how its rows become items."""
