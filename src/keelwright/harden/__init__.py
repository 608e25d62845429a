# SPDX-License-Identifier: Apache-2.0
"""How a model is prepared for tuning, or tuned safely; `keelwright.harden(method, model, out=...)` does it."""

from keelwright.core.verbs import make_callable

make_callable(__name__, "keelwright.arena.harden:harden")
