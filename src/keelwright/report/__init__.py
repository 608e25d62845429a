# SPDX-License-Identifier: Apache-2.0
"""Tables and the self-contained HTML page."""
