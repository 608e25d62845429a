# SPDX-License-Identifier: Apache-2.0
"""Judges for answers of real models."""
