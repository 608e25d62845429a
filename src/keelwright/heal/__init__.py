# SPDX-License-Identifier: Apache-2.0
"""The closed loop over measure and repair; `keelwright.heal(aligned, tuned, out=...)` runs it."""

from keelwright.core.verbs import make_callable

make_callable(__name__, "keelwright.heal.loop:heal")
