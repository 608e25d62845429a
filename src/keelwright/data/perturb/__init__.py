# SPDX-License-Identifier: Apache-2.0
"""Programming problems put badly: versioned sets of perturbations, as data, and the families that apply them."""
