# SPDX-License-Identifier: Apache-2.0
"""The lab: small synthetic worlds with exact judges."""
