# SPDX-License-Identifier: Apache-2.0
"""Protocols, configs, errors, seeds and the catalogue: what every room shares."""
