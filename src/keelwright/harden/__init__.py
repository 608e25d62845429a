# SPDX-License-Identifier: Apache-2.0
"""How a model is prepared for change, or tuned without losing its safety."""
