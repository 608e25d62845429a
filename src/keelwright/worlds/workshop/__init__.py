# SPDX-License-Identifier: Apache-2.0
"""The text world: requests to a village workshop in a fantasy land, and a rule that knows which are forbidden."""
