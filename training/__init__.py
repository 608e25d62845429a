# SPDX-License-Identifier: Apache-2.0
"""How the classifiers that keelwright ships were trained."""
