# Copyright 2026 The jax_topk Authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m examples.sparse_attention`: see decode.py."""

import sys

from examples.sparse_attention.decode import main

if __name__ == "__main__":
    sys.exit(main())
