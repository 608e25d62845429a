# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, adapters, tokenizers, chat templates and the generation engine."""
