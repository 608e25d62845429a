# SPDX-License-Identifier: Apache-2.0
"""Running a program that nobody has read: a warm process that forks, locks the fork up, and says how it ended."""
