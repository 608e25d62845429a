# SPDX-License-Identifier: Apache-2.0
"""What breaks a model: tunings and weight edits in memory; `keelwright.stress(kinds, model)` measures it."""

from keelwright.core.verbs import make_callable

make_callable(__name__, "keelwright.arena.stress:stress")
