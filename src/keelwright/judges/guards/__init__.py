# SPDX-License-Identifier: Apache-2.0
"""Guard models as judges: each writes the exact text that its model was trained on, and reads that model's reply.

Prompts go out with `DecodingConfig(as_is=True)`: control tokens are spelled out here, and those that stand in the
judged texts are broken first (`judges.fences.defused`). A guard says safe or unsafe; it gives no score.
"""
