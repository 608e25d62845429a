# SPDX-License-Identifier: Apache-2.0
"""The protocol: one cell is a model under a stress, with or without a defence, measured."""
