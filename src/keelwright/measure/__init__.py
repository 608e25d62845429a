# SPDX-License-Identifier: Apache-2.0
"""How much safety did it cost? Suites, metrics, audits, comparisons."""
