# SPDX-License-Identifier: Apache-2.0
"""Recipes: our flat YAML and mergekit's, read, checked, and resolved to one task per output tensor."""
