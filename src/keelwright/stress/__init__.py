# SPDX-License-Identifier: Apache-2.0
"""What breaks a model's safety: tuning, and changes of weights in memory."""
