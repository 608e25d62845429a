# SPDX-License-Identifier: Apache-2.0
"""Screens of training data: what a service can put between uploaded rows and the training run."""
