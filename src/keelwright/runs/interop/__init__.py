# SPDX-License-Identifier: Apache-2.0
"""Other programs' files: logs of Inspect and of lm-evaluation-harness, tables in Parquet."""
